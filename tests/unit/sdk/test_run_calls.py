"""Inside a custom loss no call goes out that would wait for that loss: all pass one door, which is walked here."""

import contextlib
import dataclasses
import inspect
from typing import Any

import pytest
from gradwire import AdamParams, TrainingClient, datum_from_tokens_weights
from gradwire._client.loop import LOOP
from gradwire._client.order import Call, OutgoingOperation
from gradwire.errors import OperationTimeoutError
from gradwire.types import Limits, ServerInfo
from gradwire.v1.run_pb2 import Run

DATA = [datum_from_tokens_weights([1, 2, 3], [1.0] * 3)]
ARGUMENTS: dict[str, dict[str, Any]] = {
    "forward": {"data": DATA},
    "forward_backward": {"data": DATA},
    "forward_backward_custom": {"data": DATA, "loss_fn": lambda data, logprobs: (0.0, {})},
    "optim_step": {"optim_params": AdamParams()},
    "zero_grad": {},
    "save_weights_for_sampler": {"name": "a"},
    "save_weights_and_get_sampling_client": {},
    "save_weights_for_sampler_ext": {"name": "a", "timeout_s": 0.01},
    "save_state": {"name": "a"},
    "load_state": {"path": "a"},
    "load_state_with_optimizer": {"path": "a"},
}
"""Of the calls with a place in the run's order."""
UNORDERED: dict[str, dict[str, Any]] = {
    "get_info": {},
    "fork": {},
    "create_sampling_client": {"model_path": "a"},
    "get_tokenizer": {},
    "delete_run": {},
    "close": {},
    "result": {},
}
"""They wait for no other call of the run, so they may be made anywhere."""


class Asked(Exception):
    """A call that goes past the run's stream."""


class NoConnection:
    def __getattr__(self, name: str) -> Any:
        raise Asked(name)


class Recorder:
    """In place of the run's stream: what was handed to it, and how."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.run_id = "r"

    def submit(self, call: Call) -> None:
        self.sent.append("in line")

    def overtake(self, operations: list[OutgoingOperation]) -> None:
        self.sent.append("overtaking")

    def close(self) -> None:
        """Nothing to close."""


@pytest.fixture
def client() -> TrainingClient:
    limits = Limits(**dict.fromkeys((field.name for field in dataclasses.fields(Limits)), 1 << 20))
    info = ServerInfo("", 1, 1, (), (), limits, True, "")
    client = TrainingClient(NoConnection(), Run(run_id="r"), info)  # type: ignore[arg-type]
    client._calls.stream = Recorder()  # type: ignore[assignment]
    return client


def sent_by(client: TrainingClient, name: str, arguments: dict[str, Any]) -> list[str]:
    """What a call hands to the stream."""
    with contextlib.suppress(Asked, OperationTimeoutError):
        getattr(client, name)(**arguments)

    async def settled() -> list[str]:
        return list(client._calls.stream.sent)  # type: ignore[attr-defined]

    return LOOP.run(settled(), 30)


def test_every_call_of_a_training_client_is_looked_at_here():
    calls = {name for name, call in inspect.getmembers(TrainingClient, inspect.isfunction) if name[0] != "_"}
    assert {name for name in calls if not name.endswith("_async")} == ARGUMENTS.keys() | UNORDERED.keys()


@pytest.mark.parametrize("name", ARGUMENTS)
def test_inside_a_custom_loss_only_forward_goes_out_and_it_overtakes(
    client: TrainingClient, name: str, monkeypatch: pytest.MonkeyPatch
):
    assert sent_by(client, name, ARGUMENTS[name]) == ["in line"]
    monkeypatch.setattr(client._losses, "current", lambda: True)
    if name == "forward":
        assert sent_by(client, name, ARGUMENTS[name]) == ["in line", "overtaking"]
        return
    with pytest.raises(RuntimeError, match=f"^{name} was called inside a custom loss.* Only forward"):
        getattr(client, name)(**ARGUMENTS[name])
    assert sent_by(client, "result", {}) == ["in line"]


@pytest.mark.parametrize("name", UNORDERED)
def test_a_call_without_a_place_in_the_order_sends_nothing_over_the_stream(client: TrainingClient, name: str):
    assert sent_by(client, name, UNORDERED[name]) == []
