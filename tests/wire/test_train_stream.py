"""The Train stream of a real server over a fake worker."""

import asyncio
import statistics
import time

import grpc
import grpc.aio
import pytest
from gradwire.errors import error, from_status
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.tensor_pb2 import DATA_TYPE_INT64, Tensor
from gradwire.v1.trainer_service_pb2 import AttachRequest, GetRunRequest, TrainRequest

from tests.fakes import FakeWorker
from tests.front_end import Stream, front_end
from tests.waiting import until
from trainer_service.config import Limits


async def test_operations_are_executed_and_answered_in_order():
    async with front_end() as trainer:
        run_id = await trainer.create_run()
        stream = await trainer.attach(run_id)
        assert stream.attached.next_seq_id == 1
        # An optim_step never overtakes the forward_backward before it.
        await stream.send(1, forward_backward={"loss_fn": "cross_entropy"})
        await stream.send(2, forward_backward={"loss_fn": "cross_entropy"})
        await stream.send(3, optim_step={})
        answers = [await stream.receive() for _ in range(3)]
        assert [answer.seq_id for answer in answers] == [1, 2, 3]
        assert [answer.WhichOneof("result") for answer in answers] == [
            "forward_backward",
            "forward_backward",
            "optim_step",
        ]
        assert trainer.operations() == [(1, "forward_backward"), (2, "forward_backward"), (3, "optim_step")]
        run = (await trainer.stub.GetRun(GetRunRequest(run_id=run_id))).run
        assert (run.next_seq_id, run.step, run.attached) == (4, 1, True)


async def test_every_answer_carries_its_times():
    async with front_end(worker=FakeWorker(latency_s=0.01)) as trainer:
        stream = await trainer.attach(await trainer.create_run())
        await stream.send(1, zero_grad={})
        answer = await stream.receive()
        assert answer.execute_ms == pytest.approx(10)
        assert answer.transfer_ms > 0


async def test_a_gap_is_an_answer_and_the_stream_goes_on():
    async with front_end() as trainer:
        stream = await trainer.attach(await trainer.create_run())
        await stream.send(2, optim_step={})
        refused = await stream.receive()
        assert refused.seq_id == 2
        assert from_status(refused.error).metadata == {"expected": "1", "got": "2"}
        await stream.send(1, optim_step={})
        assert (await stream.receive()).optim_step.step == 1


async def test_a_repeat_gets_the_first_answer_and_executes_nothing():
    async with front_end() as trainer:
        stream = await trainer.attach(await trainer.create_run())
        for _ in range(3):
            await stream.send(1, optim_step={})
        answers = [await stream.receive() for _ in range(3)]
        assert {answer.optim_step.step for answer in answers} == {1}
        assert trainer.operations() == [(1, "optim_step")]


async def test_a_repeat_with_other_content_is_refused():
    async with front_end() as trainer:
        stream = await trainer.attach(await trainer.create_run())
        await stream.send(1, optim_step={})
        await stream.send(1, optim_step={"learning_rate": 1.0})
        answers = [await stream.receive() for _ in range(2)]
        refused = next(answer for answer in answers if answer.WhichOneof("result") == "error")
        assert from_status(refused.error).reason == "SEQ_ID_CONFLICT"
        assert trainer.operations() == [(1, "optim_step")]


async def test_an_acknowledged_answer_is_still_in_the_journal():
    async with front_end() as trainer:
        stream = await trainer.attach(await trainer.create_run())
        await stream.send(1, optim_step={})
        first = await stream.receive()
        await stream.send(acked_seq_id=1)  # A message that only acknowledges.
        await stream.send(1, optim_step={})
        assert await stream.receive() == first
        await stream.send(1, zero_grad={})
        assert from_status((await stream.receive()).error).reason == "SEQ_ID_CONFLICT"
        assert trainer.operations() == [(1, "optim_step")]


async def test_reattach_gets_the_lost_answers_and_nothing_is_executed_twice():
    async with front_end() as trainer:
        run_id = await trainer.create_run()
        stream = await trainer.attach(run_id)
        await stream.send(1, forward_backward={})
        first = await stream.receive()
        # The connection goes with one operation executing and one behind it.
        trainer.worker.gate.clear()
        await stream.send(2, forward_backward={}, acked_seq_id=1)
        await stream.send(3, optim_step={}, acked_seq_id=1)
        await trainer.worker.has_waiting(2)
        await stream.close()
        trainer.worker.gate.set()

        stream = await trainer.attach(run_id)
        assert stream.attached.next_seq_id == 4
        await stream.send(2, forward_backward={}, acked_seq_id=1)
        await stream.send(3, optim_step={}, acked_seq_id=1)
        await stream.send(4, zero_grad={}, acked_seq_id=1)
        answers = [await stream.receive() for _ in range(3)]
        assert [answer.seq_id for answer in answers] == [2, 3, 4]
        assert [first.WhichOneof("result"), *(answer.WhichOneof("result") for answer in answers)] == [
            "forward_backward",
            "forward_backward",
            "optim_step",
            "zero_grad",
        ]
        assert trainer.operations() == [
            (1, "forward_backward"),
            (2, "forward_backward"),
            (3, "optim_step"),
            (4, "zero_grad"),
        ]


async def test_a_newer_attach_ends_the_older_stream_and_goes_on_after_it():
    async with front_end() as trainer:
        run_id = await trainer.create_run()
        older = await trainer.attach(run_id, "a")
        await older.send(1, optim_step={})
        await older.receive()
        newer = await trainer.attach(run_id, "b")
        assert newer.attached.next_seq_id == 2
        assert newer.attached.step == 1
        assert (await older.ended()).reason == "ATTACH_SUPERSEDED"
        await newer.send(2, optim_step={})
        assert (await newer.receive()).optim_step.step == 2


async def test_deleting_a_run_ends_its_stream():
    async with front_end() as trainer:
        run_id = await trainer.create_run()
        stream = await trainer.attach(run_id)
        await trainer.stub.DeleteRun(GetRunRequest(run_id=run_id))
        assert (await stream.ended()).reason == "RUN_NOT_FOUND"
        stream = Stream(trainer.stub.Train())
        await stream.send(attach=AttachRequest(run_id=run_id))
        assert (await stream.ended()).reason == "RUN_NOT_FOUND"


async def test_a_failed_operation_is_an_answer_and_the_stream_goes_on():
    async with front_end() as trainer:
        run_id = await trainer.create_run()
        trainer.worker.failures[run_id, 1] = error("NO_GRADIENTS", "optim_step with nothing accumulated.")
        stream = await trainer.attach(run_id)
        await stream.send(1, optim_step={})
        await stream.send(2, zero_grad={})
        assert from_status((await stream.receive()).error).reason == "NO_GRADIENTS"
        assert (await stream.receive()).WhichOneof("result") == "zero_grad"


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([TrainRequest(seq_id=1, zero_grad=ops.ZeroGradRequest())], "must be attach; got zero_grad"),
        ([TrainRequest()], "must be attach; got nothing"),
        ([None, TrainRequest(attach=AttachRequest(run_id="x"))], "attach came again"),
        ([None, TrainRequest(seq_id=1)], "seq_id 1 has no operation"),
        ([None, TrainRequest(zero_grad=ops.ZeroGradRequest())], "zero_grad message has no seq_id"),
    ],
)
async def test_a_stream_that_breaks_the_rules_ends_with_a_sentence(messages: list[TrainRequest | None], text: str):
    async with front_end() as trainer:
        run_id = await trainer.create_run()
        stream = Stream(trainer.stub.Train())
        for message in messages:
            await stream.call.write(message or TrainRequest(attach=AttachRequest(run_id=run_id)))
        ended = await stream.ended()
        assert ended.reason == "PROTOCOL_VIOLATION"
        assert text in str(ended)
        # The run is as before.
        stream = await trainer.attach(run_id)
        await stream.send(1, zero_grad={})
        assert (await stream.receive()).WhichOneof("result") == "zero_grad"


async def test_a_client_that_has_sent_everything_still_gets_its_answers():
    async with front_end(worker=FakeWorker(latency_s=0.01)) as trainer:
        stream = await trainer.attach(await trainer.create_run())
        for seq_id in (1, 2, 3):
            await stream.send(seq_id, optim_step={})
        await stream.call.done_writing()
        assert [(await stream.receive()).optim_step.step for _ in range(3)] == [1, 2, 3]
        assert await stream.call.code() is grpc.StatusCode.OK


async def test_no_more_operations_are_read_than_may_be_in_flight():
    async with front_end(limits=Limits(max_in_flight_operations=4)) as trainer:
        stream = await trainer.attach(await trainer.create_run())
        trainer.worker.gate.clear()
        for seq_id in range(1, 21):
            await stream.send(seq_id, zero_grad={})
        await asyncio.sleep(0.1)
        assert trainer.worker.waiting == 4
        trainer.worker.gate.set()
        assert [(await stream.receive()).seq_id for _ in range(20)] == list(range(1, 21))


async def test_a_client_with_too_many_bytes_unanswered_is_slowed_down_and_loses_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("trainer_service.runs.run.MAX_UNANSWERED_BYTES", 1_000_000)
    request = ops.ForwardBackwardRequest()
    request.batch.tokens.CopyFrom(Tensor(data=bytes(400_000)))
    async with front_end() as trainer:
        stream = await trainer.attach(await trainer.create_run())
        trainer.worker.gate.clear()

        async def send() -> None:
            for seq_id in range(1, 9):
                await stream.send(seq_id, forward_backward=request)

        sending = asyncio.create_task(send())
        await trainer.worker.has_waiting(2)
        await asyncio.sleep(0.1)
        assert trainer.worker.waiting == 2
        trainer.worker.gate.set()
        assert [(await stream.receive()).seq_id for _ in range(8)] == list(range(1, 9))
        await sending


async def test_a_client_that_does_not_read_its_answers_is_slowed_down_and_loses_none():
    tensor = Tensor(data=bytes(1 << 20), dtype=DATA_TYPE_INT64)
    forward = ops.ForwardRequest()
    forward.batch.loss_fn_inputs["target_tokens"].CopyFrom(tensor)
    async with front_end(limits=Limits(max_in_flight_operations=4)) as trainer:
        stream = await trainer.attach(await trainer.create_run())

        async def send() -> None:
            for seq_id in range(1, 41):
                await stream.send(seq_id, forward=forward)

        sending = asyncio.create_task(send())
        executed = -1
        while executed != len(trainer.operations()):
            executed = len(trainer.operations())
            await asyncio.sleep(0.2)
        # What is on the way in either direction, and no more.
        assert executed < 30
        answers = [await stream.receive() for _ in range(40)]
        assert [answer.seq_id for answer in answers] == list(range(1, 41))
        await sending


async def test_a_dead_worker_s_run_comes_back_with_its_operations_and_their_answers():
    async with front_end() as trainer:
        run_id = await trainer.create_run()
        stream = await trainer.attach(run_id)
        await stream.send(1, optim_step={})
        await stream.receive()
        trainer.worker.gate.clear()
        await stream.send(2, forward_backward={})
        await stream.send(3, optim_step={})
        await trainer.worker.has_waiting(2)
        trainer.worker.die()
        await stream.send(4, zero_grad={})
        trainer.worker.executed.clear()
        trainer.worker.become_ready()
        trainer.worker.gate.set()
        answers = [await stream.receive() for _ in range(3)]
        assert [answer.WhichOneof("result") for answer in answers] == ["forward_backward", "optim_step", "zero_grad"]
        assert answers[1].optim_step.step == 2
        assert [(seq_id, kind) for _, seq_id, kind in trainer.worker.executed] == [
            (0, "create_run"),
            (1, "optim_step"),
            (2, "forward_backward"),
            (3, "optim_step"),
            (4, "zero_grad"),
        ]


async def test_graphs_are_dropped_when_the_client_never_comes_back():
    async with front_end(detach_grace_s=0.05) as trainer:
        run_id = await trainer.create_run()
        stream = await trainer.attach(run_id)
        await stream.close()
        await until(lambda: trainer.worker.executed[-1] == (run_id, 0, "drop_graphs"))


async def test_two_runs_go_on_beside_each_other():
    async with front_end() as trainer:
        streams = [await trainer.attach(await trainer.create_run()) for _ in range(2)]
        for seq_id in (1, 2):
            for stream in streams:
                await stream.send(seq_id, optim_step={})
        for stream in streams:
            assert [(await stream.receive()).optim_step.step for _ in range(2)] == [1, 2]


async def test_a_round_trip_waits_for_no_timer():
    """Whoever polls, a database or a queue, costs every operation a part of the interval."""
    async with front_end() as trainer:
        stream = await trainer.attach(await trainer.create_run())
        times: list[float] = []
        for seq_id in range(1, 41):
            start = time.perf_counter()
            await stream.send(seq_id, zero_grad={})
            await stream.receive()
            times.append(time.perf_counter() - start)
        # 2 ms on a quiet machine; polling every 50 ms would take half of that.
        assert statistics.median(times) < 0.02
