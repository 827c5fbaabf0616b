"""GetAnswer: what came of an operation, asked for by its number."""

import asyncio
import contextlib
import sqlite3
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from gradwire import AdamParams, ServiceClient
from gradwire.errors import GradwireError, OperationTimeoutError, OutOfRangeError, error, from_rpc_error, from_status
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1 import trainer_service_pb2 as pb

from tests.fakes import FakeWorker
from tests.front_end import FrontEnd, front_end, front_end_on_a_thread
from tests.waiting import until


async def answer_of(trainer: FrontEnd, run_id: str, seq_id: int, timeout_ms: int = 0) -> pb.GetAnswerResponse:
    return await trainer.stub.GetAnswer(pb.GetAnswerRequest(run_id=run_id, seq_id=seq_id, timeout_ms=timeout_ms))


async def refusal(call: Any) -> GradwireError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


async def test_an_answer_is_what_the_stream_said_also_after_it_was_acknowledged():
    async with front_end() as trainer:
        run_id = await trainer.create_run()
        stream = await trainer.attach(run_id)
        await stream.send(1, optim_step={})
        first = await stream.receive()
        assert (await answer_of(trainer, run_id, 1)).response == first
        await stream.send(2, acked_seq_id=1, zero_grad={})
        await stream.receive()
        # No longer in memory: from the journal.
        assert (await answer_of(trainer, run_id, 1)).response == first
        # Whoever is attached stays so.
        await stream.send(3, optim_step={})
        assert (await stream.receive()).optim_step.step == 2
        assert [seq_id for seq_id, _ in trainer.operations()] == [1, 2, 3]


async def test_one_that_is_not_answered_yet_is_pending_and_waited_for():
    async with front_end() as trainer:
        run_id = await trainer.create_run()
        trainer.worker.gate.clear()
        operation = asyncio.ensure_future(trainer.stub.OptimStep(ops.OptimStepRequest(run_id=run_id)))
        await trainer.worker.has_waiting(1)
        pending = await answer_of(trainer, run_id, 1, timeout_ms=20)
        assert pending.pending
        assert not pending.HasField("response")
        waiting = [asyncio.create_task(answer_of(trainer, run_id, 1, timeout_ms=30_000)) for _ in range(2)]
        await asyncio.sleep(0.05)
        trainer.worker.gate.set()
        for found in await asyncio.gather(*waiting):
            assert not found.pending
            assert found.response.optim_step.step == 1
        assert (await operation).step == 1


async def test_a_failed_operations_answer_is_its_error():
    async with front_end() as trainer:
        run_id = await trainer.create_run()
        trainer.worker.failures[run_id, 1] = error("NO_GRADIENTS", "Nothing was accumulated.")
        await refusal(trainer.stub.OptimStep(ops.OptimStepRequest(run_id=run_id)))
        assert from_status((await answer_of(trainer, run_id, 1)).response.error).reason == "NO_GRADIENTS"


async def test_a_trainer_answers_for_the_one_before_it(tmp_path: Path):
    async with front_end(data_dir=tmp_path) as trainer:
        run_id = await trainer.create_run()
        await trainer.stub.OptimStep(ops.OptimStepRequest(run_id=run_id))
        first = await answer_of(trainer, run_id, 1)
        # One that is answered, and one that was received and is not.
        trainer.worker.gate.clear()
        operation = asyncio.ensure_future(trainer.stub.ZeroGrad(ops.ZeroGradRequest(run_id=run_id)))
        await trainer.worker.has_waiting(1)
        waiting = asyncio.create_task(answer_of(trainer, run_id, 2, timeout_ms=30_000))
        await asyncio.sleep(0.05)
        await trainer.server.drain()
        assert (await refusal(waiting)).reason == "DRAINING"
        await refusal(operation)
    async with front_end(data_dir=tmp_path, worker=FakeWorker()) as trainer:
        assert await answer_of(trainer, run_id, 1) == first
        second = await answer_of(trainer, run_id, 2, timeout_ms=30_000)
        assert second.response.WhichOneof("result") == "zero_grad"


async def test_what_cannot_be_answered_is_said(tmp_path: Path):
    async with front_end(data_dir=tmp_path) as trainer:
        run_id = await trainer.create_run()
        assert (await refusal(answer_of(trainer, run_id, 0))).reason == "INVALID_FIELD"
        assert "none" in (await refusal(answer_of(trainer, run_id, 1))).message
        long = await refusal(answer_of(trainer, run_id, 1, timeout_ms=60_001))
        assert long.field_violations[0][0] == "timeout_ms"
        await trainer.stub.ZeroGrad(ops.ZeroGradRequest(run_id=run_id))
        gap = await refusal(answer_of(trainer, run_id, 2))
        assert (gap.reason, gap.metadata["expected"]) == ("SEQ_ID_GAP", "2")
        # As when the journal was pruned.
        stream = await trainer.attach(run_id)
        await stream.send(acked_seq_id=1)
        await stream.send(2, zero_grad={})
        await stream.receive()
        with contextlib.closing(sqlite3.connect(tmp_path / "runs" / run_id / "journal.sqlite")) as db, db:
            db.execute("DELETE FROM operations WHERE seq_id = 1")
        released = await refusal(answer_of(trainer, run_id, 1))
        assert released.reason == "ANSWER_RELEASED"
        assert "--keep-operations" in released.message


async def test_a_save_is_answered_once_it_is_in_the_store_and_asking_often_stores_it_once(tmp_path: Path):
    async with front_end(data_dir=tmp_path / "data", storage_url=(tmp_path / "store").as_uri()) as trainer:
        run_id = await trainer.create_run()
        stored: list[str] = []
        go_on = asyncio.Event()

        async def store(path: str) -> None:
            stored.append(path)
            await go_on.wait()

        trainer.server.transfers.store = store
        stream = await trainer.attach(run_id)
        await stream.send(1, save_state={"name": "s"})
        await until(lambda: bool(stored))
        for _ in range(3):
            assert (await answer_of(trainer, run_id, 1, timeout_ms=100)).pending
        # The stream's own, and one for all who ask.
        assert len(stored) <= 2
        go_on.set()
        assert (await answer_of(trainer, run_id, 1, timeout_ms=30_000)).response == await stream.receive()


def test_the_sdk_gives_what_the_calls_future_would():
    with front_end_on_a_thread() as trainer, ServiceClient(f"http://{trainer.address}", timeout_s=20) as service:
        client, rest = service.create_training_client(), service.create_rest_client()
        step = client.optim_step(AdamParams()).result()
        client.zero_grad().result()
        saved = client.save_state("s").result()
        client.load_state(saved.path).result()
        found = [rest.get_answer(client.run_id, seq_id).result() for seq_id in (1, 2, 3, 4)]
        assert found == [step, None, saved, 3]
        with pytest.raises(OutOfRangeError):
            rest.get_answer(client.run_id, 5).result()
        trainer.worker.latency_s = 0.5
        client.zero_grad()
        failures = iter(lambda: rest.get_answer(client.run_id, 5, timeout=0).exception(), None)
        # Until it has arrived, and then until it is answered.
        assert any(isinstance(failure, OperationTimeoutError) for failure in failures)
        assert rest.get_answer(client.run_id, 5).result() is None
