"""Every unary call of TrainerService with one odd value is answered, or refused as the caller's: never INTERNAL."""

import asyncio
from collections import Counter
from typing import Any

import grpc
import grpc.aio
import numpy as np
from gradwire._wire.codec import batch_message, tensor_message
from gradwire.errors import from_rpc_error
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1 import trainer_service_pb2 as pb
from gradwire.v1.run_metrics_pb2 import GetMetricsRequest

from tests.engines import make_batch
from tests.front_end import front_end
from tests.odd_values import odd
from trainer_service.config import Limits

_BATCH = batch_message(make_batch(3, 2))
_NAMES = {
    method.input_type.name: method.name
    for method in pb.DESCRIPTOR.services_by_name["TrainerService"].methods
    if not (method.client_streaming or method.server_streaming)
}

USED = {"seq_id": 1, "request_id": "used"}
"""What a good request has in place of a number or an id of its own."""


def good_requests(run_id: str) -> list[Any]:
    """One that works for every unary call but DeleteRun, with every field set."""
    about = {"run_id": run_id, "seq_id": USED["seq_id"]}
    return [
        pb.GetServerInfoRequest(),
        pb.GetTokenizerRequest(),
        pb.CreateRunRequest(
            request_id=USED["request_id"], display_name="a", lora_rank=2, lora_alpha=1.0, seed=1, train_mlp=True
        ),
        pb.GetRunRequest(run_id=run_id),
        pb.ListRunsRequest(),
        ops.ForwardRequest(**about, batch=_BATCH, loss_fn="cross_entropy", loss_fn_config={"a": 1.0}),
        ops.ForwardBackwardRequest(**about, batch=_BATCH, loss_fn="cross_entropy", loss_fn_config={"a": 1.0}),
        ops.BackwardRequest(**about, forward_seq_id=1, gradients=tensor_message(np.ones(5, np.float32))),
        ops.OptimStepRequest(**about, learning_rate=1e-3, beta1=0.9, eps=1e-8, weight_decay=0.1, grad_clip_norm=1.0),
        ops.ZeroGradRequest(**about),
        ops.CancelRequest(**about, forward_seq_ids=[1], taint=True),
        ops.SaveWeightsForSamplerRequest(**about, name="a", overwrite=True),
        ops.SaveStateRequest(**about, name="a", overwrite=True, ttl_seconds=60),
        ops.LoadStateRequest(**about, path=f"gradwire://{run_id}/state/a", with_optimizer=True),
        pb.ForkRunRequest(run_id=run_id, step=0, request_id=USED["request_id"], display_name="b"),
        pb.ReplayRunRequest(run_id=run_id),
        pb.GetAnswerRequest(run_id=run_id, seq_id=2, timeout_ms=1),
        GetMetricsRequest(run_id=run_id),
    ]


async def outcome_of(call: Any, request: Any, what: str) -> str:
    """What a call ends with: "OK" or a reason."""
    for field, used in USED.items():
        if field in request.DESCRIPTOR.fields_by_name and getattr(request, field) == used:
            request.ClearField(field)
    try:
        await call(request, timeout=60)
        return "OK"
    except grpc.aio.AioRpcError as exc:
        refused = from_rpc_error(exc)
        assert refused.reason not in ("INTERNAL", ""), (what, refused.message)
        assert len(refused.message) < 2_000, what
        return refused.reason


async def test_a_call_with_one_odd_value_is_no_fault_of_ours() -> None:
    outcomes: dict[str, Counter[str]] = {}
    async with front_end(limits=Limits(max_runs=1_000)) as trainer:
        run_id = await trainer.create_run()
        for good in good_requests(run_id):
            name = _NAMES[type(good).DESCRIPTOR.name]
            requests = [("", good), *odd(good)]
            call = getattr(trainer.stub, name)
            found = await asyncio.gather(*(outcome_of(call, each, f"{name} {what}") for what, each in requests))
            outcomes[name] = Counter(found)
        assert (await trainer.stub.OptimStep(ops.OptimStepRequest(run_id=run_id))).step > 1
    assert set(outcomes) == {*_NAMES.values()} - {"DeleteRun"}
    assert all(outcome["OK"] for name, outcome in outcomes.items() if name not in ("LoadState", "GetTokenizer")), (
        outcomes
    )
