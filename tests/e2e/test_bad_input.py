"""Bad input gets an answer that says what is wrong, and the run trains on."""

import dataclasses
from collections.abc import Callable

import grpc
import numpy as np
import pytest
import torch
from gradwire import AdamParams, Datum, ModelInput, ServiceClient, TrainingClient
from gradwire.errors import (
    GradwireError,
    InvalidArgumentError,
    NotFoundError,
    PriorOperationFailedError,
    from_rpc_error,
)
from gradwire.v1.operation_pb2 import ForwardBackwardRequest
from gradwire.v1.trainer_service_pb2 import AttachRequest, TrainRequest

from tests.trainer_process import TrainerProcess


def datum(num_tokens: int = 4, **changes: object) -> Datum:
    tokens = [5 + i % 100 for i in range(num_tokens)]
    inputs = {"target_tokens": tokens, "weights": [1.0] * num_tokens}
    return Datum(ModelInput.from_ints(changes.pop("tokens", tokens)), inputs | changes)


def assert_still_trains(client: TrainingClient) -> None:
    """One clean step. A failed pass before may have marked the accumulation; zero_grad clears that."""
    client.zero_grad()
    before = client.get_info().step
    client.forward_backward([datum(), datum(7)], "cross_entropy")
    assert client.optim_step().result(60).step == before + 1


BAD_DATA: list[tuple[str, Callable[[], list[Datum]], str, str]] = [
    ("no data", list, "INVALID_FIELD", "data is empty"),
    ("an empty datum", lambda: [datum(), datum(0)], "INVALID_FIELD", r"data\[1\].model_input has no tokens"),
    (
        "no target_tokens",
        lambda: [Datum(ModelInput.from_ints([5]), {"weights": [1.0]})],
        "INVALID_FIELD",
        r'data\[0\].loss_fn_inputs\["target_tokens"\] is missing',
    ),
    (
        "no weights",
        lambda: [Datum(ModelInput.from_ints([5]), {"target_tokens": [6]})],
        "INVALID_FIELD",
        r'data\[0\].loss_fn_inputs\["weights"\] is missing',
    ),
    (
        "lengths that differ",
        lambda: [datum(), datum(weights=[1.0])],
        "INVALID_FIELD",
        r'data\[1\].*"weights".* has 1 val',
    ),
    (
        "a token outside the vocabulary",
        lambda: [datum(), datum(tokens=[5, 6, 999, 8])],
        "INVALID_FIELD",
        r"data\[1\].model_input.tokens\[2\].*999",
    ),
    (
        "a negative token",
        lambda: [datum(tokens=[5, -1, 7, 8])],
        "INVALID_FIELD",
        r"data\[0\].model_input.tokens\[1\].*-1",
    ),
    (
        "a target outside the vocabulary",
        lambda: [datum(target_tokens=[5, 6, 7, 4000])],
        "INVALID_FIELD",
        r'data\[0\].loss_fn_inputs\["target_tokens"\]\[3\].*4000',
    ),
    (
        "a NaN weight",
        lambda: [datum(), datum(weights=[1.0, float("nan"), 1.0, 1.0])],
        "INVALID_FIELD",
        r'data\[1\].loss_fn_inputs\["weights"\]\[1\].*nan',
    ),
    ("an infinite weight", lambda: [datum(weights=[float("inf")] * 4)], "INVALID_FIELD", r"\[0\].*inf"),
    ("a sequence too long", lambda: [datum(), datum(65)], "SEQUENCE_TOO_LONG", r"data\[1\].*65.*64"),
    ("float targets", lambda: [datum(target_tokens=[1.5] * 4)], "INVALID_FIELD", "dtype"),
    ("weights of another shape", lambda: [datum(weights=np.ones((4, 2)))], "INVALID_FIELD", "weights"),
]


@pytest.mark.parametrize(("make", "reason", "message"), [row[1:] for row in BAD_DATA], ids=[row[0] for row in BAD_DATA])
def test_bad_data_is_refused_by_name_and_the_run_trains_on(
    client: TrainingClient, make: Callable[[], list[Datum]], reason: str, message: str
):
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        client.forward_backward(make(), "cross_entropy").result(60)
    assert caught.value.reason == reason
    assert caught.value.field_violations
    assert isinstance(caught.value, ValueError)
    assert_still_trains(client)


@pytest.mark.parametrize("call", ["forward", "forward_backward", "forward_backward_custom"])
def test_bad_data_in_a_call_sent_in_pieces_is_refused_with_the_callers_place(client: TrainingClient, call: str):
    client._calls.limits = dataclasses.replace(client._calls.limits, target_message_bytes=2_000)
    batch = [datum() for _ in range(200)]
    batch[150] = datum(tokens=[5, 6, 999, 8])
    loss = [lambda d, lp: (-lp[0].sum(), {})] if call == "forward_backward_custom" else []
    with pytest.raises(InvalidArgumentError, match=r"^data\[150\].model_input.tokens\[2\] is 999") as caught:
        getattr(client, call)(batch, *loss).result(60)
    assert caught.value.field_violations[0][0] == caught.value.metadata["field"] == "data[150].model_input.tokens[2]"
    assert_still_trains(client)


def test_an_unknown_loss_is_refused_with_the_known_ones(client: TrainingClient):
    with pytest.raises(InvalidArgumentError, match="cross_entropy") as caught:
        client.forward_backward([datum()], "cross_entropie").result(60)
    assert caught.value.reason == "UNKNOWN_LOSS"
    assert "cross_entropy" in caught.value.metadata["known"]
    assert_still_trains(client)


def test_an_unknown_setting_of_a_loss_is_refused(client: TrainingClient):
    with pytest.raises(InvalidArgumentError, match="temperature"):
        client.forward_backward([datum()], "cross_entropy", {"temperature": 1.0}).result(60)
    assert_still_trains(client)


def test_a_step_that_leaves_float32_is_refused_and_the_run_trains_on(client: TrainingClient):
    client.forward_backward([datum()], "cross_entropy")
    client.optim_step().result(60)
    before = client.forward([datum()]).result(60).loss_fn_outputs[0]["logprobs"].data
    client.forward_backward([datum()], "cross_entropy")
    with pytest.raises(GradwireError, match="learning_rate is 1e\\+38") as caught:
        client.optim_step(AdamParams(learning_rate=1e38, weight_decay=1e38)).result(60)
    assert caught.value.reason == "NON_FINITE"
    assert client.forward([datum()]).result(60).loss_fn_outputs[0]["logprobs"].data == before
    assert_still_trains(client)


@pytest.mark.parametrize("name", ["", "../up", "/etc/passwd", "a/b", ".hidden", "x" * 200, "new\nline", "nul\0"])
def test_a_checkpoint_name_that_is_no_plain_name_is_refused(client: TrainingClient, name: str):
    with pytest.raises(InvalidArgumentError, match="name"):
        client.save_weights_for_sampler(name).result(60)
    assert_still_trains(client)


def test_a_failed_pass_refuses_the_step_in_flight_behind_it_and_the_next_batch_goes(client: TrainingClient):
    good, bad = [datum()], [datum(tokens=[5, 6, 999, 8])]
    client.forward_backward(good, "cross_entropy")
    failing = client.forward_backward(bad, "cross_entropy")
    step = client.optim_step()
    with pytest.raises(InvalidArgumentError):
        failing.result(60)
    with pytest.raises(PriorOperationFailedError) as caught:
        step.result(60)
    assert caught.value.failed_seq_id == 2
    client.forward_backward(good, "cross_entropy")
    assert client.optim_step().result(60).step == 1


def test_a_custom_loss_over_bad_data_fails_alone(client: TrainingClient):
    with pytest.raises(InvalidArgumentError, match="999"):
        client.forward_backward_custom([datum(tokens=[5, 6, 999, 8])], lambda d, lp: (lp[0].sum(), {})).result(60)
    client.forward_backward_custom([datum()], lambda d, lp: (-lp[0].sum(), {}))
    assert client.optim_step().result(60).step == 1


def test_a_nan_from_a_custom_loss_is_refused_before_it_reaches_the_parameters(client: TrainingClient):
    with pytest.raises(GradwireError, match="is nan") as caught:
        client.forward_backward_custom([datum()], lambda d, lp: (torch.log(lp[0].sum()), {})).result(60)
    assert caught.value.reason == "NON_FINITE"
    assert_still_trains(client)


def test_an_unknown_run_is_not_found(service: ServiceClient):
    with pytest.raises(NotFoundError, match="run-nowhere") as caught:
        service.training_client("run-nowhere")
    assert caught.value.reason == "RUN_NOT_FOUND"


def raw_stream_error(trainer: TrainerProcess, run_id: str, *messages: bytes) -> GradwireError:
    """What a stream ends with after these bytes, sent behind an attach."""
    attach = TrainRequest(attach=AttachRequest(run_id=run_id, client_id="raw")).SerializeToString()
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(trainer.address, options) as channel:
        call = channel.stream_stream("/gradwire.v1.TrainerService/Train")
        with pytest.raises(grpc.RpcError) as caught:
            for _ in call(iter([attach, *messages]), timeout=30):
                pass
    return from_rpc_error(caught.value)


def test_garbage_on_the_stream_ends_it_with_a_status_and_the_trainer_lives(
    trainer: TrainerProcess, service: ServiceClient
):
    client = service.create_training_client()
    error = raw_stream_error(trainer, client.run_id, b"\xff\xfe garbage \x00" * 10)
    assert isinstance(error, InvalidArgumentError)
    assert error.reason == "PROTOCOL_VIOLATION"
    assert_still_trains(client)
    client.delete_run()


def test_a_message_over_the_limit_is_refused_saying_the_limit(trainer: TrainerProcess, service: ServiceClient):
    client = service.create_training_client()
    limit = service.get_server_info().limits.max_message_bytes
    request = TrainRequest(seq_id=1, forward_backward=ForwardBackwardRequest(loss_fn="x" * (limit + 1)))
    error = raw_stream_error(trainer, client.run_id, request.SerializeToString())
    assert error.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert str(limit) in str(error)
    assert_still_trains(client)
    client.delete_run()


def test_the_sdk_refuses_a_datum_over_the_limit_before_sending_it(client: TrainingClient):
    limits = dataclasses.replace(client._calls.limits, max_message_bytes=1_000, target_message_bytes=500)
    client._calls.limits = client._stream._limits = limits
    long = datum(64, target_tokens=np.ones((64, 8), np.int64), weights=np.ones((64, 8)))
    with pytest.raises(GradwireError, match=r"^data\[1\] takes .* 1000 bytes") as caught:
        client.forward_backward([datum(3, target_tokens=np.ones((3, 8), np.int64), weights=np.ones((3, 8))), long])
    assert caught.value.reason == "LIMIT_EXCEEDED"
    assert_still_trains(client)
