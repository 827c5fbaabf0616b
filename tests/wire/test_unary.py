"""The unary twins of the ordered operations."""

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest
from gradwire.errors import from_rpc_error
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.trainer_service_pb2 import DeleteRunRequest, GetRunRequest, GetServerInfoRequest, ListRunsRequest

from tests.fakes import FakeWorker
from tests.front_end import front_end
from trainer_service.config import Limits


async def reason_of(call: Any) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value).reason


async def test_an_operation_without_seq_id_takes_the_next_number():
    async with front_end() as trainer:
        run_id = await trainer.create_run()
        for step in (1, 2):
            assert (await trainer.stub.OptimStep(ops.OptimStepRequest(run_id=run_id))).step == step
        assert trainer.operations() == [(1, "optim_step"), (2, "optim_step")]


async def test_times_are_in_the_trailing_metadata():
    async with front_end(worker=FakeWorker(latency_s=0.01)) as trainer:
        run_id = await trainer.create_run()
        call = trainer.stub.ZeroGrad(ops.ZeroGradRequest(run_id=run_id))
        await call
        trailing = dict(await call.trailing_metadata())
        assert float(trailing["gradwire-execute-ms"]) == pytest.approx(10)
        assert float(trailing["gradwire-queue-ms"]) >= 0
        assert float(trailing["gradwire-transfer-ms"]) > 0


async def test_a_repeat_with_its_seq_id_executes_once():
    async with front_end() as trainer:
        run_id = await trainer.create_run()
        request = ops.OptimStepRequest(run_id=run_id, seq_id=1)
        first, again = await asyncio.gather(trainer.stub.OptimStep(request), trainer.stub.OptimStep(request))
        assert first.step == again.step == 1
        assert (await trainer.stub.OptimStep(request)).step == 1
        other = ops.OptimStepRequest(run_id=run_id, seq_id=1, learning_rate=1.0)
        assert await reason_of(trainer.stub.OptimStep(other)) == "SEQ_ID_CONFLICT"
        gap = ops.OptimStepRequest(run_id=run_id, seq_id=9)
        assert await reason_of(trainer.stub.OptimStep(gap)) == "SEQ_ID_GAP"
        assert trainer.operations() == [(1, "optim_step")]


async def test_a_seq_id_of_zero_is_refused_as_such():
    async with front_end() as trainer:
        run_id = await trainer.create_run()
        for _ in range(2):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await trainer.stub.OptimStep(ops.OptimStepRequest(run_id=run_id, seq_id=0))
            refused = from_rpc_error(caught.value)
            assert (refused.reason, refused.metadata["field"]) == ("INVALID_FIELD", "seq_id")
            assert refused.message.startswith("seq_id is 0; operations count from 1")
            await trainer.stub.ZeroGrad(ops.ZeroGradRequest(run_id=run_id))
        assert trainer.operations() == [(1, "zero_grad"), (2, "zero_grad")]


async def test_a_client_that_gave_up_waiting_gets_the_answer_when_it_repeats():
    async with front_end(worker=FakeWorker(latency_s=0.1)) as trainer:
        run_id = await trainer.create_run()
        request = ops.OptimStepRequest(run_id=run_id, seq_id=1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await trainer.stub.OptimStep(request, timeout=0.02)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert (await trainer.stub.OptimStep(request)).step == 1


async def test_the_same_operation_sent_by_stream_and_by_call_is_one():
    async with front_end() as trainer:
        run_id = await trainer.create_run()
        stream = await trainer.attach(run_id)
        await stream.send(1, optim_step={})
        await stream.receive()
        await stream.close()
        assert (await trainer.stub.OptimStep(ops.OptimStepRequest(run_id=run_id, seq_id=1))).step == 1
        assert trainer.operations() == [(1, "optim_step")]


async def test_refused_while_a_client_is_attached():
    async with front_end() as trainer:
        run_id = await trainer.create_run()
        stream = await trainer.attach(run_id)
        assert await reason_of(trainer.stub.ZeroGrad(ops.ZeroGradRequest(run_id=run_id))) == "RUN_ATTACHED"
        await stream.close()
        await trainer.stub.ZeroGrad(ops.ZeroGradRequest(run_id=run_id))


async def test_refused_where_a_client_attached_while_it_waited():
    async with front_end(limits=Limits(max_in_flight_operations=1)) as trainer:
        run_id = await trainer.create_run()
        trainer.worker.gate.clear()
        first = asyncio.ensure_future(trainer.stub.ZeroGrad(ops.ZeroGradRequest(run_id=run_id)))
        await trainer.worker.has_waiting(1)
        second = asyncio.ensure_future(trainer.stub.OptimStep(ops.OptimStepRequest(run_id=run_id)))
        await asyncio.sleep(0.1)
        stream = await trainer.attach(run_id)
        trainer.worker.gate.set()
        await first
        assert await reason_of(second) == "RUN_ATTACHED"
        await stream.send(stream.attached.next_seq_id, zero_grad={})
        assert (await stream.receive()).WhichOneof("result") == "zero_grad"
        assert trainer.operations() == [(1, "zero_grad"), (2, "zero_grad")]


async def test_an_unknown_run_is_not_found_by_every_call():
    async with front_end() as trainer:
        stub = trainer.stub
        assert await reason_of(stub.GetRun(GetRunRequest(run_id="run-0"))) == "RUN_NOT_FOUND"
        assert await reason_of(stub.DeleteRun(DeleteRunRequest(run_id="run-0"))) == "RUN_NOT_FOUND"
        assert await reason_of(stub.Forward(ops.ForwardRequest(run_id="run-0"))) == "RUN_NOT_FOUND"
        assert await reason_of(stub.OptimStep(ops.OptimStepRequest())) == "RUN_NOT_FOUND"


async def test_server_info_answers_while_loading_and_says_what_is_going_on():
    async with front_end(worker=FakeWorker(ready=None, status_message="loading fake")) as trainer:
        info = await trainer.stub.GetServerInfo(GetServerInfoRequest())
        assert (info.ready, info.status_message, len(info.models)) == (False, "loading fake", 0)
        assert info.limits.max_message_bytes == 64 * 1024 * 1024
        assert (info.min_protocol_version, info.max_protocol_version) == (1, 1)
        assert await reason_of(trainer.create_run()) == "WORKER_NOT_READY"
        trainer.worker.become_ready()
        info = await trainer.stub.GetServerInfo(GetServerInfoRequest())
        assert (info.ready, info.models[0].architecture, info.losses[0].name) == (True, "Fake", "cross_entropy")


async def test_runs_are_listed_newest_first():
    async with front_end() as trainer:
        older = await trainer.create_run(display_name="a")
        newer = await trainer.create_run(display_name="b")
        runs = (await trainer.stub.ListRuns(ListRunsRequest())).runs
        assert [(run.run_id, run.display_name) for run in runs] == [(newer, "b"), (older, "a")]
        assert runs[0].created_at.seconds > 1_700_000_000
