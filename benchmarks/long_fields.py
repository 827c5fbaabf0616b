"""What one client's long strings and lists cost another one's training; a part of benchmarks/fuzz.py."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from gradwire import AdamParams, SamplingParams, ServiceClient, TrainingClient, datum_from_tokens_weights

from benchmarks.processes import resident_mib
from tests.long_fields import send_long_fields
from tests.trainer_process import TrainerProcess

_SLOWEST = 8
"""Rows printed of all fields."""
_QUIET_S = 3.0
"""For how long steps are taken undisturbed, to compare with."""
_TEXT_REQUESTS = 64


class Steps:
    """Another client's training: how long its steps take."""

    def __init__(self, client: TrainingClient) -> None:
        self._client = client
        self._data = [datum_from_tokens_weights(list(range(3, 19)), [1.0] * 16)]
        self._took_ms: list[float] = []

    def step(self) -> None:
        """One step."""
        start_s = time.monotonic()
        self._client.forward_backward(self._data, "cross_entropy")
        self._client.optim_step(AdamParams(learning_rate=1e-4)).result(60)
        self._took_ms.append((time.monotonic() - start_s) * 1000)

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Steps one after the other while the block lasts."""
        ended = threading.Event()

        def run() -> None:
            while not ended.is_set():
                self.step()

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def taken(self) -> str:
        """Median and longest since the last call, ms."""
        took, self._took_ms = sorted(self._took_ms), []
        return f"{took[len(took) // 2]:.0f} | {took[-1]:.0f}"


def measure_long_fields(trainer: TrainerProcess, service: ServiceClient, size_mib: int) -> None:
    """Prints the fields that took longest, and the steps of another run beside each kind of attack.

    Args:
        trainer: On a tiny model.
        service: To it.
        size_mib: Of a string; see send_long_fields.
    """
    with service.create_training_client() as attacked, service.create_training_client() as client:
        steps = Steps(client)
        steps.step()
        steps.taken()
        before_mib = resident_mib(trainer.process.pid), resident_mib(trainer.worker_pid())
        rows = []
        with steps.going_on():
            time.sleep(_QUIET_S)
            rows.append(("nothing", steps.taken()))
            answers = list(send_long_fields(trainer.address, size_mib << 20, run_id=attacked.run_id))
            rows.append((f"{len(answers)} fields of {size_mib} MiB, one after the other", steps.taken()))
            _sample_text(service)
            rows.append((f"{_TEXT_REQUESTS} prompts of 256 KiB of text at once", steps.taken()))
            sampler = service.create_sampling_client()
            for stops in ([], ["stop"], [f"stop {number:03} {'x' * 20}" for number in range(128)]):
                params = SamplingParams(max_tokens=50, stop=stops)
                start_s = time.monotonic()
                sampler.sample([5, 6, 7], 128, params).result(60)
                took_ms = (time.monotonic() - start_s) * 1000
                rows.append((f"128 samples, {len(stops)} stop strings, {took_ms / 50:.0f} ms a token", steps.taken()))
        print("\n| slowest fields | MiB | status | ms |\n|---|---|---|---|")
        for answer in sorted(answers, key=lambda answer: -answer.took_s)[:_SLOWEST]:
            status = answer.status.partition(":")[0]
            print(
                f"| {answer.method} {answer.field} | {answer.size_bytes / 2**20:.1f} | {status} | "
                f"{answer.took_s * 1000:.0f} |"
            )
        print("\n| beside | median step of another run, ms | longest |\n|---|---|---|")
        for what, taken in rows:
            print(f"| {what} | {taken} |")
        after_mib = resident_mib(trainer.process.pid), resident_mib(trainer.worker_pid())
        print(
            f"\nResident: trainer {before_mib[0]:.0f} → {after_mib[0]:.0f} MiB, "
            f"worker {before_mib[1]:.0f} → {after_mib[1]:.0f} MiB"
        )


def _sample_text(service: ServiceClient) -> None:
    """Prompts as long as text may be, all at once; a tiny model's context holds none of them."""
    from gradwire.transport import LOOP
    from gradwire.v1.sampling_service_pb2 import SampleRequest
    from gradwire.v1.sampling_service_pb2_grpc import SamplingServiceStub

    connection = service._connection
    request = SampleRequest(prompt_text="a b " * 65_536)

    async def call() -> str:
        try:
            stub = SamplingServiceStub(connection.channel())
            async for _ in stub.Sample(request, metadata=connection.metadata):
                pass
        except Exception as exc:
            return str(exc)
        return "OK"

    for answer in [LOOP.submit(call()) for _ in range(_TEXT_REQUESTS)]:
        assert "SEQUENCE_TOO_LONG" in answer.result(300) or "tokens" in answer.result(), answer.result()
