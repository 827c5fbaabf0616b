"""How much memory peers can make a trainer take, with and without a key, while another key's run trains on."""

import gzip
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from gradwire._wire.wire_format import embed
from gradwire.errors import GradwireError, from_rpc_error
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.tensor_pb2 import Tensor
from gradwire.v1.trainer_service_pb2 import AttachRequest, CreateRunRequest, TrainRequest
from gradwire.v1.trainer_service_pb2_grpc import TrainerServiceStub
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.bystander import Bystander
from tests.front_end_process import FrontEndProcess, front_end_process
from tests.raw_http2 import RawHttp2, message_header
from trainer_service.rpc import bounded_messages

FORWARD_BACKWARD = "/gradwire.v1.TrainerService/ForwardBackward"
CHECK = "/grpc.health.v1.Health/Check"
KEY = "the-key"
WITH_KEY = (("authorization", f"Bearer {KEY}"),)
MIB = 1 << 20
UNLIMITED = [("grpc.max_send_message_length", -1)]


@pytest.fixture(scope="module")
def trainer() -> Iterator[FrontEndProcess]:
    with front_end_process(KEY) as running:
        yield running


@pytest.fixture
def grows_by(trainer: FrontEndProcess) -> Iterator[Callable[[], int]]:
    """Says by how much the trainer has grown at most, in MiB; a run of another key trains before and after."""
    with Bystander(f"http://{trainer.address}", KEY):
        trainer.forget_peak()
        before = trainer.memory_bytes()
        yield lambda: (trainer.peak_memory_bytes() - before) // MIB


def tiny_datums(size_bytes: int) -> bytes:
    """An encoded ForwardBackwardRequest of nothing but datums, which take many times their encoding when parsed."""
    datum = ops.ForwardBackwardRequest(data=[{"model_input": {"tokens": [1]}}]).SerializeToString()
    return datum * (size_bytes // len(datum))


def health(channel: grpc.Channel) -> Any:
    return health_pb2_grpc.HealthStub(channel)


def refusal(call: Callable[[], Any]) -> GradwireError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    return from_rpc_error(error)


def test_large_messages_without_a_key_are_refused_unread(trainer: FrontEndProcess, grows_by: Callable[[], int]):
    request = tiny_datums(60 * MIB)
    with grpc.insecure_channel(trainer.address, UNLIMITED) as channel:
        calls = [channel.unary_unary(FORWARD_BACKWARD).future(request, timeout=60) for _ in range(4)]
        for call in calls:
            assert refusal(call.result).reason == "INVALID_API_KEY"
    assert grows_by() < 48


@pytest.mark.parametrize("method", [FORWARD_BACKWARD, "/gradwire.v1.TrainerService/Train", "/nobody/Knows"])
def test_messages_without_a_key_that_never_end_are_not_kept(
    method: str, trainer: FrontEndProcess, grows_by: Callable[[], int]
):
    peers = [RawHttp2(trainer.address) for _ in range(5)]
    for peer in peers:
        peer.settings_came()
        for _ in range(2):
            call = peer.call(method)
            peer.send(call, message_header(1 << 30) + bytes(40 * MIB))
            peer.wait_ended(call)
    assert grows_by() < 48
    for peer in peers:
        peer.close()


def test_a_flood_of_calls_without_a_key_is_refused_as_it_comes(trainer: FrontEndProcess, grows_by: Callable[[], int]):
    peers = [RawHttp2(trainer.address) for _ in range(4)]
    for peer in peers:
        peer.settings_came()
    for peer in peers:
        calls = [peer.call(FORWARD_BACKWARD) for _ in range(250)]
        for call in calls:
            peer.send(call, message_header(1 << 30) + bytes(MIB), wait_s=0)
        for call in calls:
            peer.wait_ended(call)
    # What all calls together may hold before any is refused, and what a call itself takes.
    assert grows_by() < 4 * 250 * (128 + 32) // 1024
    for peer in peers:
        peer.close()


def test_health_checks_that_never_end_are_given_up_and_health_answers_on(
    trainer: FrontEndProcess, grows_by: Callable[[], int]
):
    with RawHttp2(trainer.address) as peer:
        peer.settings_came()
        calls = [peer.call(CHECK) for _ in range(16)]
        sent = sum(peer.send(call, message_header(1 << 30) + bytes(60 * MIB)) for call in calls)
        for call in calls:
            peer.wait_ended(call)
    assert sent < len(calls) * 60 * MIB
    assert grows_by() < 4 * bounded_messages.KEYLESS_GROWTH_BYTES // MIB
    with grpc.insecure_channel(trainer.address) as channel:
        check = health(channel).Check
        assert check(health_pb2.HealthCheckRequest(), timeout=60).status == health_pb2.HealthCheckResponse.SERVING
        too_large = health_pb2.HealthCheckRequest(service="x" * 100_000)
        refused = refusal(lambda: check(too_large, timeout=60))
        assert (refused.reason, refused.metadata) == ("LIMIT_EXCEEDED", {"limit": "65536"})


def test_only_so_many_calls_without_a_key_are_under_way_and_a_key_passes_them(
    trainer: FrontEndProcess, grows_by: Callable[[], int]
):
    watch = "/grpc.health.v1.Health/Watch"
    with RawHttp2(trainer.address) as peer, grpc.insecure_channel(trainer.address) as channel:
        peer.settings_came()
        calls = [peer.call(watch) for _ in range(bounded_messages.KEYLESS_CALLS_PER_HOST)]
        for call in calls:
            peer.send(call, message_header(0), end=True)
        peer.wait_answered(calls)
        stub = health(channel)
        refused = refusal(lambda: next(stub.Watch(health_pb2.HealthCheckRequest(), timeout=60)))
        assert (refused.reason, refused.metadata["limit"]) == (
            "LIMIT_EXCEEDED",
            str(bounded_messages.KEYLESS_CALLS_PER_HOST),
        )
        stub.Check(health_pb2.HealthCheckRequest(), timeout=60)
        assert next(stub.Watch(health_pb2.HealthCheckRequest(), timeout=60, metadata=WITH_KEY))
    assert grows_by() < 48


@pytest.mark.parametrize("metadata", [(), WITH_KEY])
def test_compressed_messages_are_refused_and_not_unpacked(
    metadata: tuple[tuple[str, str], ...], trainer: FrontEndProcess, grows_by: Callable[[], int]
):
    zeros = gzip.compress(bytes(200 * MIB), 1)
    with RawHttp2(trainer.address) as peer:
        peer.settings_came()
        call = peer.call(FORWARD_BACKWARD, (*metadata, ("grpc-encoding", "gzip")))
        peer.send(call, message_header(len(zeros), compressed=True) + zeros, end=True)
        peer.wait_ended(call)
    assert grows_by() < 48


def test_a_client_that_compresses_is_told(trainer: FrontEndProcess):
    with (
        grpc.insecure_channel(trainer.address, compression=grpc.Compression.Gzip) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        TrainerServiceStub(channel).CreateRun(CreateRunRequest(base_model="x" * 1000), metadata=WITH_KEY)
    error: Any = caught.value
    assert (error.code(), "'gzip' is disabled" in error.details()) == (grpc.StatusCode.UNIMPLEMENTED, True)


def test_a_message_of_millions_of_fields_is_refused_before_it_is_parsed_and_so_is_one_in_the_stream(
    trainer: FrontEndProcess, grows_by: Callable[[], int]
):
    request = tiny_datums(60 * MIB)
    with grpc.insecure_channel(trainer.address, UNLIMITED) as channel:
        refused = [
            refusal(lambda: channel.unary_unary(FORWARD_BACKWARD)(request, timeout=60, metadata=WITH_KEY)),
            refusal(lambda: _second_message(channel, _as_operation(request))),
        ]
    for each in refused:
        assert (each.reason, each.metadata["limit_name"]) == ("LIMIT_EXCEEDED", "max_message_fields")
    # Their bytes, copied, and nothing of what they would become.
    assert grows_by() < 400


def _as_operation(request: bytes) -> bytes:
    number = TrainRequest.DESCRIPTOR.fields_by_name["forward_backward"].number
    return b"\x08\x01" + b"".join(embed(number, request))


def _second_message(channel: grpc.Channel, second: bytes) -> None:
    run_id = TrainerServiceStub(channel).CreateRun(CreateRunRequest(), metadata=WITH_KEY).run.run_id
    first = TrainRequest(attach=AttachRequest(run_id=run_id)).SerializeToString()
    train = channel.stream_stream("/gradwire.v1.TrainerService/Train")
    for _ in train(iter([first, second]), timeout=60, metadata=WITH_KEY):
        pass


def _tensors(count: int, size_bytes: int) -> Message:
    request = ops.ForwardBackwardRequest()
    for i in range(count):
        request.batch.loss_fn_inputs[f"input {i}"].CopyFrom(Tensor(data=bytes(size_bytes)))
    return request


def test_large_tensors_count_as_nothing_and_everything_else_counts():
    tensors = _tensors(6, MIB).SerializeToString()
    assert bounded_messages.typed_bytes(tensors, ops.ForwardBackwardRequest) < 200
    typed = ops.ForwardBackwardRequest(data=[{"loss_fn_inputs": {"a": {"ints": {"values": range(100_000)}}}}])
    encoded = typed.SerializeToString()
    assert len(encoded) - 20 < bounded_messages.typed_bytes(encoded, ops.ForwardBackwardRequest) <= len(encoded)
    text = ops.ForwardBackwardRequest(loss_fn="x" * 100_000).SerializeToString()
    assert bounded_messages.typed_bytes(text, ops.ForwardBackwardRequest) == len(text)
    many = tiny_datums(2 * MIB)
    assert bounded_messages.typed_bytes(many, ops.ForwardBackwardRequest) > bounded_messages.MAX_TYPED_BYTES
