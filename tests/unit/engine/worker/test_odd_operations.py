"""A request with one odd value is executed, or refused as the caller's; never is it a fault of Gradwire's own."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradwire._wire.codec import Batch, batch_message, tensor_message
from gradwire.errors import from_status
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.datum_pb2 import Datum, ModelInput
from gradwire.v1.tensor_pb2 import FloatValues, IntValues, Tensor
from gradwire.v1.trainer_service_pb2 import CreateRunRequest, TrainRequest
from gradwire.v1.worker_service_pb2 import WorkerCommand, WorkerCreateRun, WorkerDeleteRun, WorkerEvent

from tests.engines import RUN, make_batch, make_engine
from tests.odd_values import odd
from trainer_service.engine.worker.commands import Commands

BATCH = make_batch(3, 2)
RATIOS = {name: np.full(5, -0.5, np.float32) for name in ("logprobs", "advantages")}
RATIO_BATCH = Batch(
    BATCH.tokens_T, BATCH.cu_seqlens, {"target_tokens": BATCH.loss_fn_inputs["target_tokens"], **RATIOS}
)
BY_HAND = Datum(
    model_input=ModelInput(tokens=[1, 2]),
    loss_fn_inputs={
        "target_tokens": Tensor(ints=IntValues(values=[2, 3])),
        "weights": Tensor(floats=FloatValues(values=[0, 1])),
    },
)
GOOD: dict[str, Any] = {
    "forward": ops.ForwardRequest(batch=batch_message(BATCH), loss_fn="cross_entropy"),
    "forward_backward": ops.ForwardBackwardRequest(
        batch=batch_message(RATIO_BATCH), loss_fn="ppo", loss_fn_config={"clip_low_threshold": 0.5}
    ),
    "forward_backward by hand": ops.ForwardBackwardRequest(data=[BY_HAND], loss_fn="cross_entropy"),
    "backward": ops.BackwardRequest(forward_seq_id=1, gradients=tensor_message(np.ones(5, np.float32))),
    "optim_step": ops.OptimStepRequest(learning_rate=1e-3, grad_clip_norm=1, weight_decay=0.1),
    "cancel": ops.CancelRequest(forward_seq_ids=[1]),
    "save_state": ops.SaveStateRequest(name="a", overwrite=True, ttl_seconds=60),
    "load_state": ops.LoadStateRequest(path=f"gradwire://{RUN}/state/kept"),
    "save_weights_for_sampler": ops.SaveWeightsForSamplerRequest(name="a", overwrite=True),
}


def never(event: WorkerEvent) -> None:
    raise AssertionError(event)


class Driver:
    """Sends operations in order."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.commands = Commands(make_engine(model, folder), never)
        self.seq_id = 0
        self.outcomes: Counter[str] = Counter()

    def execute(self, **fields: Any) -> WorkerEvent:
        command = WorkerCommand(**{"run_id": RUN, **fields})
        event = self.commands.execute(self.commands.prepare(command))
        assert event is not None
        return event

    def send(self, kind: str, request: Any) -> str:
        """What an operation ends with: "OK" or a reason."""
        self.seq_id += 1
        event = self.execute(request=TrainRequest(seq_id=self.seq_id, **{kind: request}))
        ended = event.response.WhichOneof("result")
        return from_status(event.response.error).reason if ended == "error" else "OK"


@pytest.fixture
def driver(tmp_path: Path, tiny_llama: Path) -> Driver:
    return Driver(tmp_path, tiny_llama)


@pytest.mark.parametrize("case", GOOD)
def test_an_operation_with_one_odd_value_is_no_fault_of_ours(driver: Driver, case: str) -> None:
    kind, good = case.split()[0], GOOD[case]
    keep = ops.ForwardRequest(batch=batch_message(BATCH), keep_graph=True)
    train = ops.ForwardBackwardRequest(data=[BY_HAND], loss_fn="cross_entropy")
    assert driver.send("save_state", ops.SaveStateRequest(name="kept")) == "OK"
    for what, request in odd(good):
        assert driver.send("zero_grad", ops.ZeroGradRequest()) == "OK"
        if kind == "optim_step":
            assert driver.send("forward_backward", train) == "OK"
        if kind in ("backward", "cancel"):
            assert driver.send("forward", keep) == "OK"
            if kind == "backward" and not what.startswith("forward_seq_id"):
                request.forward_seq_id = driver.seq_id
        reason = driver.send(kind, request)
        assert reason not in ("INTERNAL", ""), what
        driver.outcomes[reason] += 1
    assert driver.outcomes["OK"]
    assert driver.outcomes.total() > driver.outcomes["OK"] or kind == "cancel"
    assert driver.send("zero_grad", ops.ZeroGradRequest()) == "OK"
    assert driver.send("load_state", ops.LoadStateRequest(path=f"gradwire://{RUN}/state/kept")) == "OK"
    assert driver.send("forward_backward", train) == "OK"
    assert driver.send("optim_step", ops.OptimStepRequest()) == "OK"


def test_a_run_with_one_odd_setting_is_no_fault_of_ours(driver: Driver) -> None:
    good = CreateRunRequest(lora_rank=2, lora_alpha=4, seed=1, train_mlp=True, train_attn=True, train_unembed=True)
    for what, request in odd(good):
        event = driver.execute(run_id="run-2", create_run=WorkerCreateRun(request=request))
        if event.done.HasField("error"):
            reason = from_status(event.done.error).reason
            assert reason not in ("INTERNAL", ""), what
            driver.outcomes[reason] += 1
        driver.execute(run_id="run-2", delete_run=WorkerDeleteRun())
    assert driver.outcomes["INVALID_FIELD"] > 5
