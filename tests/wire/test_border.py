"""What every call passes: key, versions, request ids, sizes, garbage, faults of our own."""

import asyncio
import logging
import urllib.request
from typing import Any

import grpc
import grpc.aio
import pytest
from gradwire import ServiceClient
from gradwire._wire import protocol_version
from gradwire.errors import FailedPreconditionError, error
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.tensor_pb2 import Tensor
from gradwire.v1.trainer_service_pb2 import AttachRequest, CreateRunRequest, GetServerInfoRequest, TrainRequest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.front_end import FrontEnd, Stream, front_end, front_end_on_a_thread
from tests.owners import error_of, with_key
from trainer_service.config import Limits
from trainer_service.rpc import border
from trainer_service.runs.registry import Runs

METHOD = "/gradwire.v1.TrainerService/"


async def assert_still_trains(trainer: FrontEnd, run_id: str) -> None:
    stream = await trainer.attach(run_id)
    seq_id = stream.attached.next_seq_id
    await stream.send(seq_id, optim_step={})
    assert (await stream.receive()).WhichOneof("result") == "optim_step"
    await stream.close()


async def test_a_call_without_a_known_key_is_refused_and_one_with_any_known_key_passes():
    async with front_end(api_keys=("first", "second")) as trainer:
        info = trainer.stub.GetServerInfo
        missing = await error_of(info(GetServerInfoRequest()))
        assert (missing.reason, missing.code) == ("INVALID_API_KEY", grpc.StatusCode.UNAUTHENTICATED.value[0])
        assert "is missing" in missing.message
        wrong = await error_of(info(GetServerInfoRequest(), metadata=with_key("firs")))
        assert "not one this server knows" in wrong.message
        assert "firs" not in wrong.message
        for key in ("first", "second"):
            await info(GetServerInfoRequest(), metadata=with_key(key))


async def test_the_stream_asks_for_the_key_too():
    async with front_end(api_keys=("key",)) as trainer:
        run = (await trainer.stub.CreateRun(CreateRunRequest(), metadata=with_key("key"))).run
        stream = Stream(trainer.stub.Train())
        assert (await stream.ended()).reason == "INVALID_API_KEY"
        stream = await trainer.attach(run.run_id, metadata=with_key("key"))
        await stream.send(1, zero_grad={})
        assert (await stream.receive()).WhichOneof("result") == "zero_grad"


async def test_health_needs_no_key_and_reflection_does():
    async with front_end(api_keys=("key",)) as trainer:
        health: Any = health_pb2_grpc.HealthStub(trainer.channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        channel: Any = trainer.channel
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reflection.ServerReflectionInfo(iter([question])).read()
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        answer = await reflection.ServerReflectionInfo(iter([question]), metadata=with_key("key")).read()
        names = [service.name for service in answer.list_services_response.service]
        assert "gradwire.v1.TrainerService" in names


async def test_a_protocol_version_it_cannot_speak_is_refused_naming_both():
    async with front_end() as trainer:
        for spoken in ((), (("gradwire-protocol-version", "1"),)):
            await trainer.stub.GetServerInfo(GetServerInfoRequest(), metadata=spoken)
        for version in ("2", "0", "new"):
            refused = await error_of(
                trainer.stub.GetServerInfo(GetServerInfoRequest(), metadata=(("gradwire-protocol-version", version),))
            )
            assert refused.reason == "PROTOCOL_VERSION_UNSUPPORTED"
            assert refused.metadata == {"client": version, "server": "1"}
            assert "same gradwire on both sides" in refused.message


async def test_a_request_id_comes_back_and_one_is_made_where_there_is_none():
    async with front_end() as trainer:
        call = trainer.stub.GetServerInfo(GetServerInfoRequest(), metadata=(("gradwire-request-id", "mine"),))
        assert dict(await call.initial_metadata())["gradwire-request-id"] == "mine"
        call = trainer.stub.GetServerInfo(GetServerInfoRequest())
        assert len(dict(await call.initial_metadata())["gradwire-request-id"]) == 16


async def test_a_fault_of_our_own_tells_the_request_id_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def broken(self: Runs) -> None:
        raise TypeError("__init__() got an unexpected keyword argument 'secret'")

    monkeypatch.setattr(Runs, "list", broken)
    async with front_end() as trainer:
        fault = await error_of(
            trainer.stub.ListRuns(GetServerInfoRequest(), metadata=(("gradwire-request-id", "mine"),))
        )
        assert fault.reason == "INTERNAL"
        assert fault.metadata == {"request_id": "mine"}
        assert "mine" in fault.message
        assert "secret" not in fault.message
        logged = [record for record in caplog.records if record.exc_info and "secret" in str(record.exc_info[1])]
        assert logged


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff\xff", b"\x0a\xff", b"not a protobuf at all"])
async def test_garbage_bytes_end_a_call_with_a_sentence_and_the_run_still_trains(garbage: bytes):
    async with front_end() as trainer:
        run_id = await trainer.create_run()
        for method in ("CreateRun", "GetServerInfo", "ForwardBackward"):
            broken = await error_of(trainer.channel.unary_unary(METHOD + method)(garbage))
            assert broken.reason == "PROTOCOL_VIOLATION"
            assert "cannot be parsed" in broken.message
        await assert_still_trains(trainer, run_id)


@pytest.mark.parametrize("attached", [False, True])
async def test_garbage_bytes_end_a_stream_with_a_sentence_and_the_run_still_trains(attached: bool):
    async with front_end() as trainer:
        run_id = await trainer.create_run()
        call = trainer.channel.stream_stream(METHOD + "Train", response_deserializer=_keep)()
        if attached:
            await call.write(TrainRequest(attach=AttachRequest(run_id=run_id)).SerializeToString())
            await call.read()
        await call.write(b"\xff\xff\xff\xff")
        broken = await Stream(call).ended()
        assert broken.reason == "PROTOCOL_VIOLATION"
        await assert_still_trains(trainer, run_id)


def _keep(data: bytes) -> bytes:
    return data


def too_large(size_bytes: int) -> ops.ForwardBackwardRequest:
    request = ops.ForwardBackwardRequest()
    request.batch.tokens.CopyFrom(Tensor(data=bytes(size_bytes)))
    return request


@pytest.mark.parametrize("times", [1.5, 3])
async def test_a_message_over_the_limit_is_refused_saying_the_limit_and_the_run_still_trains(times: float):
    limit = 1 << 20
    async with front_end(limits=Limits(max_message_bytes=limit)) as trainer:
        run_id = await trainer.create_run()
        request = too_large(int(times * limit))
        unary = await error_of(trainer.stub.ForwardBackward(request))
        stream = await trainer.attach(run_id)
        await stream.send(1, forward_backward=request)
        for refused in (unary, await stream.ended()):
            assert refused.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
            assert str(limit) in refused.message or str(2 * limit) in refused.message
        if times < 2:
            assert unary.reason == "LIMIT_EXCEEDED"
            assert unary.metadata["limit"] == str(limit)
        await assert_still_trains(trainer, run_id)
        assert trainer.operations() == [(1, "optim_step")]


async def test_a_call_that_ends_without_its_message_is_refused():
    async with front_end() as trainer:
        nothing: list[bytes] = []
        refused = await error_of(trainer.channel.stream_unary(METHOD + "CreateRun")(iter(nothing)))
        assert (refused.reason, "without a message" in refused.message) == ("PROTOCOL_VIOLATION", True)


async def test_large_messages_of_one_key_hold_so_much_memory_at_once_and_those_of_others_count_for_themselves(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("trainer_service.rpc.bounded_messages.MAX_HELD_BYTES", 1_500_000)
    ours, others = with_key("ours"), with_key("others")
    request = too_large(500_000)
    async with front_end(api_keys=("ours", "others")) as trainer:
        runs = []
        for metadata in (ours, ours, others):
            runs.append((await trainer.stub.CreateRun(CreateRunRequest(), metadata=metadata)).run.run_id)
        trainer.worker.gate.clear()
        calls = []
        for count, (run_id, metadata) in enumerate(zip((runs[0], runs[2]), (ours, others), strict=True), start=1):
            request.run_id = run_id
            calls.append(trainer.stub.ForwardBackward(request, metadata=metadata))
            await trainer.worker.has_waiting(count)
        request.run_id = runs[1]
        refused = await error_of(trainer.stub.ForwardBackward(request, metadata=ours))
        assert (refused.reason, refused.metadata["limit"]) == ("LIMIT_EXCEEDED", "1500000")
        # Small ones are not counted.
        zeroing = trainer.stub.ZeroGrad(ops.ZeroGradRequest(run_id=runs[1]), metadata=ours)
        await trainer.worker.has_waiting(3)
        trainer.worker.gate.set()
        await asyncio.gather(*calls, zeroing)
        await trainer.stub.ForwardBackward(request, metadata=ours)


async def test_a_long_message_still_reaches_the_client():
    async with front_end() as trainer:
        refused = await error_of(trainer.create_run(base_model="x" * 4_000))
        assert refused.reason == "BASE_MODEL_MISMATCH"
        assert refused.code == grpc.StatusCode.FAILED_PRECONDITION.value[0]
        assert len(refused.message) < 2000


async def test_a_client_that_goes_away_is_no_error(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING)
    async with front_end() as trainer:
        run_id = await trainer.create_run()
        trainer.worker.gate.clear()
        for _ in range(20):
            stream = Stream(trainer.stub.Train())
            await stream.send(attach=AttachRequest(run_id=run_id))
            stream.call.cancel()
            call = trainer.stub.ZeroGrad(ops.ZeroGradRequest(run_id=run_id))
            await asyncio.sleep(0.002)
            call.cancel()
        trainer.worker.gate.set()
        await asyncio.sleep(0.05)
        await assert_still_trains(trainer, run_id)
    assert [record.getMessage() for record in caplog.records] == []


async def test_metrics_count_calls_operations_and_what_the_worker_counts():
    async with front_end() as trainer:
        address, stop = trainer.server.metrics.serve("127.0.0.1:0")
        try:
            trainer.worker.counters = {"gradwire_worker_forward_passes_total": 3, "gradwire_worker_held_graphs": 1}
            run_id = await trainer.create_run()
            await assert_still_trains(trainer, run_id)
            await error_of(trainer.create_run(base_model="another"))
            text = await asyncio.to_thread(_read, f"http://{address}/metrics")
        finally:
            stop()
    for line in (
        'gradwire_calls_total{code="OK",method="/gradwire.v1.TrainerService/CreateRun"} 1.0',
        'gradwire_calls_total{code="FAILED_PRECONDITION",method="/gradwire.v1.TrainerService/CreateRun"} 1.0',
        'gradwire_operations_total{kind="optim_step",outcome="ok"} 1.0',
        'gradwire_operation_execute_ms_count{kind="optim_step"} 1.0',
        "gradwire_operations_in_flight 0.0",
        "gradwire_runs 1.0",
        "gradwire_worker_forward_passes_total 3.0",
        "gradwire_worker_held_graphs 1.0",
    ):
        assert line in text, text


def _read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as response:
        return response.read().decode()


def test_the_sdk_refuses_a_trainer_of_another_protocol_version_naming_both(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(protocol_version, "PROTOCOL_VERSION", 2)
    with (
        front_end_on_a_thread() as trainer,
        ServiceClient(f"http://{trainer.address}") as service,
        pytest.raises(
            FailedPreconditionError, match=r"speaks protocol version 2, but the trainer .* speaks 1 to 1"
        ) as no,
    ):
        service.create_training_client()
    assert no.value.reason == "PROTOCOL_VERSION_UNSUPPORTED"
    assert trainer.worker.executed == []


async def test_a_refusal_of_a_call_that_is_over_already_is_no_fault():
    """As when grpc itself refused its message meanwhile; anything but a cancellation would be a traceback."""

    class Over:
        def trailing_metadata(self) -> None:
            return None

        async def abort(self, *_: object) -> None:
            raise grpc.aio.InternalError('Failed "execute_batch"')

    over: Any = Over()
    with pytest.raises(asyncio.CancelledError):
        await border._abort(over, error("PROTOCOL_VIOLATION", "The call ended without a message."))
