"""What one client's long strings and lists cost another one's training; a part of benchmarks/fuzz.py."""

import queue
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from gradwire import AdamParams, SamplingParams, ServiceClient, datum_from_tokens_weights

from benchmarks.processes import resident_mib
from tests.long_fields import send_long_fields
from tests.trainer_process import TrainerProcess

_SLOWEST = 8
"""Rows printed of all fields."""
_QUIET_S = 3.0
"""For how long steps are taken undisturbed, to compare with."""
_TEXT_REQUESTS = 64


class Steps:
    """Another client's training, in a process of its own: how long its steps take.

    Args:
        base_url: Of the trainer.
    """

    def __init__(self, base_url: str) -> None:
        command = [sys.executable, __file__, base_url]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.taken()

    def __enter__(self) -> "Steps":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # Its input ends, and so does it.

    def taken(self) -> str:
        """Median and longest since the last call, ms; waits for the step under way."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()


def train(base_url: str) -> None:
    """Takes steps, and tells how long they took whenever it is asked by a line, until there are no more."""
    asked: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            asked.put(line)
        asked.put("")

    threading.Thread(target=read, daemon=True).start()
    data = [datum_from_tokens_weights(list(range(3, 19)), [1.0] * 16)]
    with ServiceClient(base_url) as service, service.create_training_client() as client:
        took_ms: list[float] = []
        while True:
            start_s = time.monotonic()
            client.forward_backward(data, "cross_entropy")
            client.optim_step(AdamParams(learning_rate=1e-4)).result(120)
            took_ms.append((time.monotonic() - start_s) * 1000)
            if asked.empty():
                continue
            if not asked.get():
                break
            print(f"{sorted(took_ms)[len(took_ms) // 2]:.0f} | {max(took_ms):.0f}", flush=True)
            took_ms.clear()
        client.delete_run()


def measure_long_fields(trainer: TrainerProcess, service: ServiceClient, size_mib: int) -> None:
    """Prints the fields that took longest, and the steps of another run beside each kind of attack.

    Args:
        trainer: On a tiny model.
        service: To it.
        size_mib: Of a string; see send_long_fields.
    """
    with service.create_training_client() as attacked, Steps(trainer.base_url) as steps:
        before_mib = resident_mib(trainer.process.pid), resident_mib(trainer.worker_pid())
        rows = []
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
    from gradwire._client.loop import LOOP
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


if __name__ == "__main__":
    train(sys.argv[1])
