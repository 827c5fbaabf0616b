"""What tells one operation from another."""

from typing import Any

import pytest
from gradwire._wire.wire_format import embed, fields, outline
from gradwire.errors import error
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.datum_pb2 import DatumBatch
from gradwire.v1.tensor_pb2 import DATA_TYPE_FLOAT32, Tensor
from gradwire.v1.trainer_service_pb2 import TrainRequest, TrainResponse
from gradwire.v1.worker_service_pb2 import WorkerCommand

from trainer_service.runs.operation import Operation


def tensor(*values: int) -> Tensor:
    return Tensor(data=bytes(values) * 1000, dtype=DATA_TYPE_FLOAT32, shape=[250 * len(values)])


def forward_backward(seq_id: int = 1, acked_seq_id: int = 0, **changes: Any) -> TrainRequest:
    inputs = {"target_tokens": tensor(1), "weights": tensor(2), "advantages": tensor(3), **changes.pop("inputs", {})}
    batch = DatumBatch(tokens=tensor(4), cu_seqlens=tensor(5), loss_fn_inputs=inputs)
    operation = ops.ForwardBackwardRequest(**{"batch": batch, "loss_fn": "cross_entropy", **changes})
    return TrainRequest(seq_id=seq_id, acked_seq_id=acked_seq_id, forward_backward=operation)


def digest(request: TrainRequest) -> bytes:
    return Operation(request, request.SerializeToString()).digest()


def test_number_and_acknowledgement_are_not_part_of_the_content():
    assert digest(forward_backward(1)) == digest(forward_backward(2, acked_seq_id=300))
    step = ops.OptimStepRequest(learning_rate=1.0)
    assert digest(TrainRequest(seq_id=1, optim_step=step)) == digest(TrainRequest(seq_id=2, optim_step=step))


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_fn": "other"},
        {"loss_fn_config": {"clip": 0.2}},
        {"inputs": {"weights": tensor(9)}},
        {"inputs": {"target_tokens": tensor(2), "weights": tensor(1)}},
        {"inputs": {"more": tensor(3)}},
        {"batch": DatumBatch(tokens=tensor(4), cu_seqlens=tensor(5))},
        {"batch": None, "data": []},
    ],
)
def test_any_change_of_the_content_is_another_operation(changes: dict[str, Any]):
    assert digest(forward_backward()) != digest(forward_backward(**changes))


def test_the_same_content_under_another_kind_is_another_operation():
    batch = DatumBatch(tokens=tensor(4))
    kinds = [
        TrainRequest(forward=ops.ForwardRequest(batch=batch)),
        TrainRequest(forward_backward=ops.ForwardBackwardRequest(batch=batch)),
        TrainRequest(zero_grad=ops.ZeroGradRequest()),
        TrainRequest(cancel=ops.CancelRequest()),
        TrainRequest(backward=ops.BackwardRequest()),
    ]
    assert len({digest(request) for request in kinds}) == len(kinds)


def test_backward_differs_by_its_gradients_and_its_forward():
    requests = [
        TrainRequest(backward=ops.BackwardRequest(forward_seq_id=number, gradients=tensor(value)))
        for number in (1, 2)
        for value in (1, 2)
    ]
    assert len({digest(request) for request in requests}) == 4


@pytest.mark.parametrize("kind", ["forward", "forward_backward"])
def test_the_order_of_map_entries_is_not_part_of_the_content(kind: str):
    """Go, for one, encodes maps in another order every time."""
    keys = [f"key{number}" for number in range(200)]
    made: list[TrainRequest] = []
    for order in (keys, list(reversed(keys))):
        request = TrainRequest()
        content = getattr(request, kind)
        for key in order:
            content.loss_fn_config[key] = 1.0
            content.batch.loss_fn_inputs[key].data = b"x"
        made.append(request)
    assert made[0].SerializeToString() != made[1].SerializeToString()
    assert digest(made[0]) == digest(made[1])


def test_what_was_typed_by_hand_is_the_same_however_it_was_sent():
    request = TrainRequest()
    datum = request.forward.data.add()
    datum.model_input.tokens.extend([1, 2])
    datum.loss_fn_inputs["target_tokens"].ints.values.extend([2, 3])
    assert digest(request) == Operation.made(request).digest()
    assert digest(forward_backward()) == Operation.made(forward_backward()).digest()


def test_what_an_outline_leaves_out_is_part_of_the_content():
    def in_outline(value: int, form: str) -> Operation:
        large = Tensor(data=bytes([value]) * 5000, dtype=DATA_TYPE_FLOAT32, shape=[1250])
        made: dict[str, Any] = {
            "forward": {"batch": {"tokens": large}},
            "forward_backward": {"data": [{"loss_fn_inputs": {"weights": large}}]},
            "backward": {"gradients": large},
        }
        encoded = TrainRequest(seq_id=1, **{form: made[form]}).SerializeToString()
        request = TrainRequest.FromString(outline(memoryview(encoded), TrainRequest.DESCRIPTOR))
        assert request.ByteSize() < 100
        assert Operation(request, encoded).digest() == digest(TrainRequest.FromString(encoded))
        return Operation(request, encoded)

    for form in ("forward", "forward_backward", "backward"):
        assert in_outline(1, form).digest() != in_outline(2, form).digest()


def test_unknown_fields_do_no_harm():
    inner = ops.ForwardRequest(batch=DatumBatch(tokens=tensor(1))).SerializeToString() + b"\xa3\x06\xa4\x06"
    encoded = b"".join(embed(TrainRequest.DESCRIPTOR.fields_by_name["forward"].number, inner))
    request = TrainRequest.FromString(encoded)
    assert len(Operation(request, encoded).digest()) == 16


def test_an_encoded_request_embeds_as_if_the_message_had_been_set():
    request = forward_backward()
    number = WorkerCommand.DESCRIPTOR.fields_by_name["request"].number
    command = WorkerCommand(command_id=7, run_id="run").SerializeToString()
    joined = WorkerCommand.FromString(b"".join((command, *embed(number, request.SerializeToString()))))
    assert joined == WorkerCommand(command_id=7, run_id="run", request=request)


def test_fields_step_over_every_wire_type():
    response = TrainResponse(seq_id=1 << 40, queue_ms=1.5)
    response.zero_grad.SetInParent()
    encoded = memoryview(response.SerializeToString())
    assert [number for number, _, _ in fields(encoded)] == [
        1,
        2,
        TrainResponse.DESCRIPTOR.fields_by_name["zero_grad"].number,
    ]
    assert b"".join(whole for _, whole, _ in fields(encoded)) == encoded
    with pytest.raises(ValueError, match="wire type 3"):
        list(fields(memoryview(b"\x1b\x08\x01\x1c")))


def test_of_a_refused_operation_flags_and_numbers_remain_and_a_repeat_is_told_by_its_refusal():
    many: dict[str, Any] = {"forward_seq_ids": list(range(5)), "taint": True}
    refusal, other = (error("LIMIT_EXCEEDED", text) for text in ("too many", "too long"))
    refused = Operation.refused("cancel", ops.CancelRequest(**many), refusal, seq_id=7)
    assert refused.request == TrainRequest(seq_id=7, cancel={"taint": True})
    assert (refused.seq_id, refused.kind) == (7, "cancel")
    again = Operation.refused("cancel", ops.CancelRequest(**many), refusal, seq_id=7)
    others = [
        Operation.refused("cancel", ops.CancelRequest(**many), other, seq_id=7),
        Operation.refused("forward", ops.ForwardRequest(), refusal, seq_id=7),
        Operation.made(refused.request),
    ]
    assert refused.digest() == again.digest()
    assert refused.digest() not in {operation.digest() for operation in others}
