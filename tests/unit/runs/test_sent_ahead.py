"""Operations that the worker gets while they are written down: nobody sees what they did before they are on disk."""

import asyncio
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gradwire.errors import from_status
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.trainer_service_pb2 import CreateRunRequest, TrainRequest, TrainResponse

from tests.fakes import FakeWorker
from tests.full_disk import nothing_can_be_written
from tests.runs import EVERY_2_STEPS, forward_backward, operations, settled, step, trainer
from tests.waiting import until
from trainer_service.runs.journal_writer import Journal
from trainer_service.runs.operation import Operation
from trainer_service.runs.run import Run


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Journals are written while it is set."""
    moves = threading.Event()
    moves.set()
    commit = Journal.commit

    def once_it_moves(self: Journal, entries: list[Any]) -> Any:
        moves.wait()
        return commit(self, entries)

    monkeypatch.setattr(Journal, "commit", once_it_moves)
    yield moves
    moves.set()


def submitted(run: Run, *operations: Operation) -> list[TrainResponse]:
    """Where the answers will be."""
    answers: list[TrainResponse] = []
    for operation in operations:
        run.submit(operation, lambda answer: answers.append(TrainResponse.FromString(answer)))
    return answers


async def executed(worker: FakeWorker, *seq_ids: int) -> None:
    await until(lambda: [seq_id for seq_id, kind in operations(worker) if kind != "create_run"] == list(seq_ids))


async def test_an_operation_executes_while_it_is_written_and_is_answered_when_it_is(
    tmp_path: Path, disk: threading.Event
):
    worker = FakeWorker()
    async with trainer(tmp_path, worker) as runs:
        run = await runs.create(CreateRunRequest())
        disk.clear()
        answers = submitted(run, forward_backward(1), step(2))
        await executed(worker, 1, 2)
        await asyncio.sleep(0.05)
        assert answers == []
        disk.set()
        await run.quiet()
        assert [answer.seq_id for answer in answers] == [1, 2]


async def test_what_a_killed_trainer_had_not_written_down_did_not_happen(tmp_path: Path, disk: threading.Event):
    worker = FakeWorker()
    async with trainer(tmp_path / "runs", worker) as runs:
        run = await runs.create(CreateRunRequest())
        await run.execute(step(1))
        disk.clear()
        answers = submitted(run, step(2))
        await executed(worker, 1, 2)
        # As after kill -9: the files as they are now, in another place.
        shutil.copytree(tmp_path / "runs", tmp_path / "copy")
        assert answers == []
        disk.set()
    second = FakeWorker()
    async with trainer(tmp_path / "copy", second) as runs:
        run = runs.get(run.run_id)
        assert (run.next_seq_id, run.step) == (2, 1)
        # The client has no answer, so it sends it again.
        assert (await run.execute(step(2))).optim_step.step == 2


async def test_what_turns_out_not_to_be_written_is_undone(tmp_path: Path):
    worker = FakeWorker()
    async with trainer(tmp_path, worker) as runs:
        run = await runs.create(CreateRunRequest())
        await run.execute(step(1))
        with nothing_can_be_written(foreseen=False):
            answers = submitted(run, forward_backward(2), step(3), step(4))
            await run.quiet()
            assert {from_status(answer.error).reason for answer in answers} == {"STORAGE_FAILED"}
            assert run.step == 1
            # All three had been executed.
            assert operations(worker)[2:6] == [
                (2, "forward_backward"),
                (3, "optim_step"),
                (4, "optim_step"),
                (0, "delete_run"),
            ]
            # No more is sent before it is written.
            del worker.executed[:]
            assert from_status((await run.execute(step(5))).error).reason == "STORAGE_FAILED"
        await settled(run)
        assert operations(worker)[-6:] == [
            (0, "create_run"),
            (1, "optim_step"),
            *((seq_id, "fail_operation") for seq_id in (2, 3, 4, 5)),
        ]
        assert (await run.execute(step(6))).optim_step.step == 2
    async with trainer(tmp_path, FakeWorker()) as runs:
        run = runs.get(run.run_id)
        assert (run.next_seq_id, run.step) == (7, 2)
        assert (await run.execute(step(7))).optim_step.step == 3


async def test_what_was_on_disk_is_answered_although_what_followed_is_not(tmp_path: Path):
    worker = FakeWorker()
    async with trainer(tmp_path, worker) as runs:
        run = await runs.create(CreateRunRequest())
        worker.gate.clear()
        first = submitted(run, step(1))
        await until(lambda: run.under_way[0].journalled_s > 0)
        with nothing_can_be_written(foreseen=False):
            second = submitted(run, step(2))
            await until(lambda: bool(second))
        worker.gate.set()
        await run.quiet()
        assert first[0].optim_step.step == 1
        assert from_status(second[0].error).reason == "STORAGE_FAILED"
        assert (await run.execute(step(3))).optim_step.step == 2


async def test_a_worker_that_dies_before_it_is_written_gets_it_again(tmp_path: Path, disk: threading.Event):
    worker = FakeWorker()
    async with trainer(tmp_path, worker) as runs:
        run = await runs.create(CreateRunRequest())
        disk.clear()
        worker.gate.clear()
        answers = submitted(run, step(1), step(2))
        await worker.has_waiting(2)
        worker.die()
        worker.gate.set()
        worker.become_ready()
        disk.set()
        await run.quiet()
        assert [answer.optim_step.step for answer in answers] == [1, 2]


async def test_no_snapshot_has_what_is_not_on_disk(tmp_path: Path, disk: threading.Event):
    worker = FakeWorker()
    async with trainer(tmp_path, worker, durability=EVERY_2_STEPS) as runs:
        run = await runs.create(CreateRunRequest())
        disk.clear()
        answers = submitted(run, step(1), step(2), forward_backward(3))
        await executed(worker, 1)
        await asyncio.sleep(0.05)
        # One is due after step 2, which waits, and so does what follows it.
        assert operations(worker)[1:] == [(1, "optim_step")]
        disk.set()
        await run.quiet()
        assert operations(worker)[1:] == [
            (1, "optim_step"),
            (2, "optim_step"),
            (0, "snapshot_run"),
            (3, "forward_backward"),
        ]
        assert len(answers) == 3


async def test_what_others_could_see_is_written_down_first(tmp_path: Path, disk: threading.Event):
    worker = FakeWorker()
    async with trainer(tmp_path, worker) as runs:
        run = await runs.create(CreateRunRequest())
        disk.clear()
        save = ops.SaveWeightsForSamplerRequest(ephemeral=True)
        submitted(run, Operation.made(TrainRequest(seq_id=1, save_weights_for_sampler=save)), step(2))
        await asyncio.sleep(0.05)
        assert operations(worker)[1:] == []
        disk.set()
        await run.quiet()
        assert operations(worker)[1:] == [(1, "save_weights_for_sampler"), (2, "optim_step")]


async def test_a_fork_has_nothing_that_is_not_on_disk(tmp_path: Path):
    worker = FakeWorker()
    async with trainer(tmp_path, worker) as runs:
        run = await runs.create(CreateRunRequest())
        await run.execute(step(1))
        with nothing_can_be_written(foreseen=False):
            submitted(run, step(2))
            await until(lambda: (2, "optim_step") in operations(worker))
            async with run.settled() as up_to:
                assert up_to == 1
        # A disk that refuses writes but has room is waited for, however long.
        await settled(run)
        assert (await run.execute(step(3))).optim_step.step == 2


async def test_a_run_is_deleted_under_operations_that_are_being_written(tmp_path: Path, disk: threading.Event):
    worker = FakeWorker()
    async with trainer(tmp_path, worker) as runs:
        run = await runs.create(CreateRunRequest())
        deleting = asyncio.create_task(run.delete())
        disk.clear()
        await asyncio.sleep(0)
        worker.gate.clear()
        answers = submitted(run, step(1), step(2))
        worker.gate.set()
        await asyncio.sleep(0.05)
        disk.set()
        await deleting
        await run.quiet()
        assert [answer.seq_id for answer in answers] == [1, 2]
