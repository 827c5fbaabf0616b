"""What a future needs lives as long as it is under way, whoever forgets its client; nothing lives longer."""

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from gradwire import APIFuture, SamplingClient, SamplingParams, ServiceClient, datum_from_tokens_weights
from gradwire.errors import OperationCancelledError

from tests.front_end import FrontEnd, front_end_on_a_thread
from tests.waiting import DEADLINE_S
from trainer_service.config import Limits

DATA = [datum_from_tokens_weights([1, 2, 3], [1.0] * 3)]


@pytest.fixture(scope="module")
def trainer() -> Iterator[FrontEnd]:
    with front_end_on_a_thread(limits=Limits(max_runs=1000)) as trainer:
        yield trainer


def connect(trainer: FrontEnd) -> ServiceClient:
    return ServiceClient(f"http://{trainer.address}", timeout_s=30)


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what
        gc.collect()
        time.sleep(0.02)


class Held:
    """Keeps the fake device from working, so that calls stay under way."""

    def __init__(self, trainer: FrontEnd) -> None:
        self._gate = trainer.worker.gate
        self._loop: Any = trainer.worker._task.get_loop()

    def __enter__(self) -> "Held":
        self._loop.call_soon_threadsafe(self._gate.clear)
        return self

    def release(self) -> None:
        self._loop.call_soon_threadsafe(self._gate.set)

    def __exit__(self, *_: object) -> None:
        self.release()


def forward(service: ServiceClient) -> APIFuture[Any]:
    return service.create_training_client().forward_backward(DATA)


def custom(service: ServiceClient) -> APIFuture[Any]:
    def loss(data: Any, logprobs: Any) -> Any:
        return sum(each.sum() for each in logprobs), {}

    client = service.create_training_client()
    client.optim_step()
    return client.forward_backward_custom(DATA, loss)


def save(service: ServiceClient) -> APIFuture[Any]:
    return service.create_training_client().save_weights_for_sampler("final")


@pytest.mark.parametrize("call", [forward, custom, save])
@pytest.mark.filterwarnings("ignore:.*does not depend on the logprobs")
def test_a_future_completes_whose_client_and_service_nobody_has_any_more(
    trainer: FrontEnd, call: Callable[[ServiceClient], APIFuture[Any]]
):
    # As a helper that returns only the future does; while it is under way, all that can be is collected.
    future = call(connect(trainer))
    gc.collect()
    assert future.result(30) is not None


def test_calls_made_in_one_line_complete(trainer: FrontEnd):
    assert connect(trainer).create_training_client().forward_backward(DATA).result(30).metrics


def test_a_sampler_of_a_forgotten_client_comes(trainer: FrontEnd):
    sampler = connect(trainer).create_training_client().save_weights_and_get_sampling_client()
    gc.collect()
    assert isinstance(sampler.result(30), SamplingClient)
    future = sampler.sample([1, 2, 3], 1, SamplingParams(max_tokens=1))
    del sampler
    gc.collect()
    assert future.result(30).sequences[0].tokens == [7]


def test_frozen_weights_whose_client_is_forgotten_before_they_are_made_are_let_go(trainer: FrontEnd):
    client = connect(trainer).create_training_client()
    closed: list[str] = []
    original = trainer.server.sampling.close

    async def close(sampler: Any) -> None:
        closed.append(str(sampler))
        await original(sampler)

    trainer.server.sampling.close = close
    try:
        client.save_weights_and_get_sampling_client()
        client.zero_grad().result(30)
        wait_for(lambda: closed, "the frozen weights were kept")
    finally:
        trainer.server.sampling.close = original


@pytest.mark.parametrize("forgotten", [False, True])
def test_closing_fails_what_is_under_way_with_a_sentence(trainer: FrontEnd, forgotten: bool):
    service = connect(trainer)
    client = service.create_training_client()
    with Held(trainer):
        future = client.forward_backward(DATA)
        if forgotten:
            del client
            gc.collect()
            service.close()
        else:
            client.close()
        with pytest.raises(OperationCancelledError, match="training client was closed"):
            future.result(30)
    service.close()


def test_a_closed_client_refuses_further_calls(trainer: FrontEnd):
    with connect(trainer) as service:
        client = service.create_training_client()
        client.close()
        with pytest.raises(OperationCancelledError, match="training client was closed"):
            client.zero_grad().result(30)


def sockets() -> int:
    found = 0
    for handle in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{handle}").startswith("socket:")
        except OSError:
            continue
    return found


def test_nothing_is_left_of_clients_that_are_forgotten(trainer: FrontEnd):
    forward(connect(trainer)).result(30)
    gc.collect()
    wait_for(lambda: not streams(), "a stream was left")
    before, threads = sockets(), threading.active_count()
    for call in (forward, custom, save) * 3:
        call(connect(trainer)).result(30)
    wait_for(lambda: not streams() and sockets() <= before, "connections were left")
    wait_for(lambda: threading.active_count() <= threads, "threads were left")


def streams() -> list[object]:
    from gradwire._client.loop import LOOP

    return [task for task in list(LOOP._tasks) if task.get_name().startswith("gradwire-run")]


LEAVES = """
import sys, gradwire
from gradwire import datum_from_tokens_weights
service = gradwire.ServiceClient("http://" + sys.argv[1])
client = service.create_training_client()
client.forward_backward([datum_from_tokens_weights([1, 2, 3], [1.0] * 3)])
futures = [client.optim_step() for _ in range(20)]
sampler = client.save_weights_and_get_sampling_client()
stream = sampler.stream([1, 2, 3], 1, gradwire.SamplingParams(max_tokens=None))
if sys.argv[2] == "dropped":
    del client, service, sampler
print("ends", flush=True)
"""


@pytest.mark.parametrize("how", ["kept", "dropped"])
def test_a_script_that_waits_for_nothing_ends(trainer: FrontEnd, how: str):
    done = subprocess.run(
        [sys.executable, "-c", LEAVES, trainer.address, how], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ends\n", "")
