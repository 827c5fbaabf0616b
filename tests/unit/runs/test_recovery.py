"""Runs whose worker, or trainer, dies, over a fake worker whose only state is its number of steps."""

import asyncio
import contextlib
import itertools
import shutil
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from gradwire.errors import error, from_status
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.trainer_service_pb2 import CreateRunRequest, TrainRequest

from tests.fakes import FakeWorker
from tests.runs import EVERY_2_STEPS, forward_backward, operations, settled, step, trainer
from tests.waiting import DEADLINE_S, until
from trainer_service.config import Durability, Limits, Retention, SnapshotPolicy
from trainer_service.runs import journal as journal_file
from trainer_service.runs import placement
from trainer_service.runs.journal import Row
from trainer_service.runs.journal_writer import Journal
from trainer_service.runs.operation import Operation
from trainer_service.runs.run import Run
from trainer_service.runs.snapshots import list_snapshots


async def test_what_was_journalled_is_answered_by_the_next_trainer(tmp_path: Path):
    first = FakeWorker()
    async with trainer(tmp_path, first) as runs:
        run = await runs.create(CreateRunRequest(request_id="a", display_name="mine"))
        await run.execute(step(1))
        first.gate.clear()
        for seq_id in (2, 3):
            run.submit(step(seq_id), lambda _: None)
        await asyncio.wait_for(first.has_waiting(2), DEADLINE_S)
        created_at = run.describe().created_at
    second = FakeWorker()
    async with trainer(tmp_path, second) as runs:
        assert len(runs) == 1
        again = await runs.create(CreateRunRequest(request_id="a"))
        assert again.run_id == run.run_id
        described = again.describe()
        assert (described.display_name, described.step, described.next_seq_id) == ("mine", 1, 4)
        assert described.created_at == created_at
        # Its client is not back yet, and the work goes on.
        second.become_ready()
        answers = [await again.execute(step(seq_id)) for seq_id in (1, 2, 3, 4)]
        assert [answer.optim_step.step for answer in answers] == [1, 2, 3, 4]
        assert operations(second) == [(0, "create_run"), *((n, "optim_step") for n in (1, 2, 3, 4))]


async def test_operations_that_arrive_together_share_a_commit(tmp_path: Path):
    async with trainer(tmp_path, FakeWorker()) as runs:
        run = await runs.create(CreateRunRequest())
        before = runs.journal_writer.commits
        await asyncio.gather(*(run.execute(step(seq_id)) for seq_id in range(1, 65)))
        # 64 operations and 64 outcomes.
        assert runs.journal_writer.commits - before < 64


async def test_a_repeat_with_other_content_is_refused_by_the_next_trainer_too(tmp_path: Path):
    async with trainer(tmp_path, FakeWorker()) as runs:
        run = await runs.create(CreateRunRequest())
        await run.execute(step(1))
    async with trainer(tmp_path, FakeWorker()) as runs:
        refused = await runs.get(run.run_id).execute(forward_backward(1))
        assert from_status(refused.error).reason == "SEQ_ID_CONFLICT"


async def test_recovery_starts_from_the_newest_snapshot(tmp_path: Path):
    worker = FakeWorker()
    async with trainer(tmp_path, worker, durability=EVERY_2_STEPS) as runs:
        run = await runs.create(CreateRunRequest())
        for seq_id in range(1, 8):
            await run.execute(step(seq_id))
            await settled(run)
        assert [snapshot.seq_id for snapshot in list_snapshots(run.folder)] == [6, 4]
        worker.die()
        worker.executed.clear()
        worker.become_ready()
        assert (await run.execute(step(8))).optim_step.step == 8
        assert operations(worker)[:3] == [(0, "create_run"), (7, "optim_step"), (8, "optim_step")]


async def test_a_damaged_snapshot_is_skipped_for_the_one_before_and_then_for_the_base_model(tmp_path: Path):
    worker = FakeWorker()
    async with trainer(tmp_path, worker, durability=EVERY_2_STEPS) as runs:
        run = await runs.create(CreateRunRequest())
        for seq_id in range(1, 6):
            await run.execute(step(seq_id))
            await settled(run)
        newest, _ = list_snapshots(run.folder)
        (newest.folder / "manifest.json").write_text("garbage")
        worker.die()
        worker.executed.clear()
        worker.become_ready()
        assert (await run.execute(step(6))).optim_step.step == 6
        assert operations(worker)[:4] == [(0, "create_run"), (0, "create_run"), (3, "optim_step"), (4, "optim_step")]
        await settled(run)
        for snapshot in list_snapshots(run.folder):
            (snapshot.folder / "manifest.json").write_text("garbage")
        worker.die()
        worker.become_ready()
        assert (await run.execute(step(7))).optim_step.step == 7


async def test_a_snapshot_newer_than_the_last_outcome_is_not_started_from(tmp_path: Path):
    """Its trainer died between the snapshot and the journal: the operation is done again, not twice."""
    async with trainer(tmp_path, FakeWorker(), durability=EVERY_2_STEPS) as runs:
        run = await runs.create(CreateRunRequest())
        for seq_id in (1, 2):
            await run.execute(step(seq_id))
        await settled(run)
    with contextlib.closing(sqlite3.connect(run.folder / "journal.sqlite", isolation_level=None)) as db:
        db.execute("DELETE FROM outcomes WHERE seq_id = 2")
    async with trainer(tmp_path, FakeWorker(), durability=EVERY_2_STEPS) as runs:
        assert (await runs.get(run.run_id).execute(step(2))).optim_step.step == 2


async def test_failures_are_repeated_as_they_were_not_executed_again(tmp_path: Path):
    worker = FakeWorker()
    async with trainer(tmp_path, worker) as runs:
        run = await runs.create(CreateRunRequest())
        worker.failures[run.run_id, 1] = error("DEVICE_OUT_OF_MEMORY", "No room.")
        first = await run.execute(forward_backward(1))
        await run.execute(step(2))
        worker.failures.clear()  # It would succeed now.
        worker.die()
        worker.executed.clear()
        worker.become_ready()
        await run.execute(step(3))
        assert operations(worker) == [(0, "create_run"), (1, "fail_operation"), (2, "optim_step"), (3, "optim_step")]
        again = await run.execute(forward_backward(1))
        assert again == first


async def test_what_changes_nothing_is_not_replayed(tmp_path: Path):
    worker = FakeWorker()
    async with trainer(tmp_path, worker) as runs:
        run = await runs.create(CreateRunRequest())
        forward = TrainRequest(seq_id=1, forward=ops.ForwardRequest())
        held = TrainRequest(seq_id=2, forward=ops.ForwardRequest(keep_graph=True))
        for request in (forward, held):
            await run.execute(Operation.made(request))
        worker.die()
        worker.executed.clear()
        worker.become_ready()
        await run.execute(step(3))
        assert operations(worker) == [(0, "create_run"), (2, "forward"), (3, "optim_step")]


async def test_the_third_death_under_one_operation_fails_it_and_the_run_goes_on(tmp_path: Path):
    worker = FakeWorker()
    async with trainer(tmp_path, worker) as runs:
        run, other = [await runs.create(CreateRunRequest()) for _ in range(2)]
        await run.execute(step(1))
        worker.poison.add((run.run_id, 2))
        answers = [asyncio.create_task(run.execute(operation)) for operation in (forward_backward(2), step(3))]
        innocent = asyncio.create_task(other.execute(step(1)))
        deaths = 0
        async with asyncio.timeout(DEADLINE_S):
            while not answers[0].done():
                await asyncio.sleep(0.005)
                if worker.ready is None:
                    deaths += 1
                    worker.become_ready()
        failed = from_status((await answers[0]).error)
        assert (failed.reason, failed.metadata) == ("OPERATION_POISONED", {"seq_id": "2", "deaths": "3"})
        assert deaths == 3
        assert (await answers[1]).optim_step.step == 2
        assert (2, "fail_operation") in operations(worker)
        # It waited behind, each time, and none of the deaths was its doing.
        assert (await innocent).optim_step.step == 1


async def test_a_death_whose_reason_is_known_fails_its_operation_at_once(tmp_path: Path):
    worker = FakeWorker(because=error("DEVICE_OUT_OF_MEMORY", "There is no memory left for it."))
    async with trainer(tmp_path, worker) as runs:
        run = await runs.create(CreateRunRequest())
        await run.execute(step(1))
        worker.poison.add((run.run_id, 2))
        answers = [asyncio.create_task(run.execute(operation)) for operation in (forward_backward(2), step(3))]
        async with asyncio.timeout(5):
            failed = from_status((await answers[0]).error)
            assert worker.ready is None
            worker.become_ready()
            assert (await answers[1]).optim_step.step == 2
        assert (failed.reason, failed.message) == ("DEVICE_OUT_OF_MEMORY", "There is no memory left for it.")
        assert (2, "fail_operation") in operations(worker)


async def test_deaths_are_counted_across_trainers(tmp_path: Path):
    async with trainer(tmp_path, FakeWorker()) as runs:
        run_id = (await runs.create(CreateRunRequest())).run_id
    for death in range(1, 5):
        worker = FakeWorker(ready=None)
        worker.poison.add((run_id, 1))
        async with trainer(tmp_path, worker) as runs:
            answer = asyncio.create_task(runs.get(run_id).execute(forward_backward(1)))
            worker.become_ready()
            async with asyncio.timeout(DEADLINE_S):
                while worker.ready is not None and not answer.done():  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
            assert answer.done() == (death == 4)
            if death == 4:
                assert from_status((await answer).error).reason == "OPERATION_POISONED"
            answer.cancel()


async def killed_while_executing(folders: Sequence[Path], *seq_ids: int) -> Run:
    """A run with a step done, and others under way when the second folder gets a copy of the first, its trainer's."""
    worker = FakeWorker()
    async with trainer(folders[0], worker) as runs:
        run = await runs.create(CreateRunRequest())
        await run.execute(step(1))
        worker.gate.clear()
        for seq_id in seq_ids:
            run.submit(step(seq_id), lambda _: None)
        await asyncio.wait_for(worker.has_waiting(len(seq_ids)), DEADLINE_S)
        await run._journal.flush()
        shutil.copytree(folders[0], folders[1])
    return run


async def test_a_death_of_worker_and_trainer_at_once_counts_against_what_the_worker_noted(tmp_path: Path):
    """Each next trainer has a copy of the runs as they are when its predecessor is killed."""
    folders = [tmp_path / str(number) for number in range(4)]
    run = await killed_while_executing(folders[:2], 2, 3, 4)
    note = Path(run.run_id, "executing")
    for folder, later in itertools.pairwise([*folders[1:], None]):
        assert folder is not None
        (folder / note).write_bytes((3).to_bytes(8, "little"))
        worker = FakeWorker(ready=None)
        async with trainer(folder, worker) as runs:
            run = runs.get(run.run_id)
            await run._journal.flush()
            # Counted once, whatever becomes of this trainer.
            assert not (folder / note).exists()
            if later is not None:
                shutil.copytree(folder, later)
                continue
            worker.become_ready()
            answers = [await run.execute(step(seq_id)) for seq_id in (2, 3, 4)]
        failed = from_status(answers[1].error)
        assert (failed.reason, failed.metadata) == ("OPERATION_POISONED", {"seq_id": "3", "deaths": "3"})
        assert [answers[0].optim_step.step, answers[2].optim_step.step] == [2, 3]


@pytest.mark.parametrize("noted", [None, 0, 1])
async def test_deaths_of_trainers_alone_count_against_no_operation(noted: int | None, tmp_path: Path):
    """Nothing was noted, or taken back, or an operation is noted that was done: one that was replayed."""
    folders = [tmp_path / str(number) for number in range(5)]
    run = await killed_while_executing(folders[:2], 2)
    for folder, later in itertools.pairwise(folders[1:]):
        if noted is not None:
            (folder / run.run_id / "executing").write_bytes(noted.to_bytes(8, "little"))
        worker = FakeWorker(ready=None)
        worker.gate.clear()
        async with trainer(folder, worker) as runs:
            run = runs.get(run.run_id)
            worker.become_ready()
            # It is restored, and the operation is there to be executed.
            await asyncio.wait_for(worker.has_waiting(1), DEADLINE_S)
            await run._journal.flush()
            shutil.copytree(folder, later)
    async with trainer(folders[-1], FakeWorker()) as runs:
        assert (await runs.get(run.run_id).execute(step(2))).optim_step.step == 2


async def test_a_worker_that_is_killed_as_its_trainer_stops_counts_against_no_operation(tmp_path: Path):
    worker = FakeWorker()
    async with trainer(tmp_path, worker) as runs:
        run = await runs.create(CreateRunRequest())
        worker.gate.clear()
        run.submit(step(1), lambda _: None)
        await asyncio.wait_for(worker.has_waiting(1), DEADLINE_S)
        note = run.folder / "executing"
        note.write_bytes((1).to_bytes(8, "little"))
    assert not note.exists()


async def test_an_idle_run_is_unloaded_and_comes_back_for_the_next_operation(tmp_path: Path):
    worker = FakeWorker()
    async with trainer(tmp_path, worker, limits=Limits(max_runs=1), durability=Durability(idle_lease_s=0.05)) as runs:
        run = await runs.create(CreateRunRequest())
        await run.execute(step(1))
        await until(lambda: not run.placement.live)
        assert [snapshot.seq_id for snapshot in list_snapshots(run.folder)] == [1]
        other = await runs.create(CreateRunRequest())
        assert other.placement.live
        attached = other.attach("client")
        # Full of what is in use: refused in a sentence rather than left to wait.
        full = from_status((await run.execute(step(2))).error)
        assert (full.reason, full.metadata["limit"]) == ("LIMIT_EXCEEDED", "1")
        other.detach(attached)
        await runs.delete(other.run_id)
        assert (await run.execute(step(3))).optim_step.step == 2


async def test_the_log_behind_two_snapshots_is_let_go_as_retention_says(tmp_path: Path):
    durability = Durability(snapshots=SnapshotPolicy(every_steps=2), retention=Retention(keep_operations=1))
    worker = FakeWorker()
    async with trainer(tmp_path, worker, durability=durability) as runs:
        run = await runs.create(CreateRunRequest())
        for seq_id in range(1, 8):
            await run.execute(step(seq_id))
            await settled(run)
        await run._journal.flush()
        with contextlib.closing(sqlite3.connect(run.folder / "journal.sqlite")) as db:
            assert [row[0] for row in db.execute("SELECT seq_id FROM operations")] == [5, 6, 7]
        run.acknowledge(7)
        released = from_status((await run.execute(step(1))).error)
        assert released.reason == "ANSWER_RELEASED"
        # Both snapshots damaged: nothing to start from, and that is said.
        for snapshot in list_snapshots(run.folder):
            (snapshot.folder / "manifest.json").write_text("garbage")
        worker.die()
        worker.become_ready()
        lost = from_status((await run.execute(step(8))).error)
        assert lost.reason == "RUN_LOST"
        assert "no snapshot can be loaded" in lost.message


async def test_a_run_held_by_another_trainer_or_of_another_model_is_left_alone(tmp_path: Path):
    async with trainer(tmp_path, FakeWorker()) as runs:
        await runs.create(CreateRunRequest())
        async with trainer(tmp_path, FakeWorker()) as beside:
            assert len(beside) == 0
    async with trainer(tmp_path, FakeWorker(), base_model="other") as other:
        assert len(other) == 0
    async with trainer(tmp_path, FakeWorker()) as runs:
        assert len(runs) == 1


async def test_a_damaged_journal_is_told_and_left_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    async with trainer(tmp_path, FakeWorker()) as runs:
        run = await runs.create(CreateRunRequest())
        await runs.create(CreateRunRequest())
    for file in run.folder.glob("journal.sqlite*"):
        file.write_bytes(b"garbage" * 1000)
    async with trainer(tmp_path, FakeWorker()) as runs:
        assert len(runs) == 1
    assert "A run's journal is damaged" in caplog.text
    assert (run.folder / "journal.sqlite").read_bytes() == b"garbage" * 1000


async def test_a_snapshot_under_way_prunes_no_journal_of_a_run_that_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pruned: list[int] = []
    monkeypatch.setattr(Journal, "prune", lambda journal, *, snapshot_seq_id: pruned.append(snapshot_seq_id))
    worker = FakeWorker()
    async with trainer(tmp_path, worker, durability=EVERY_2_STEPS) as runs:
        run = await runs.create(CreateRunRequest())
        await run.execute(step(1))
        worker.gate.clear()
        run.submit(step(2), lambda answer: None)
        # The step and the snapshot behind it, and then the deletion.
        await asyncio.wait_for(worker.has_waiting(2), DEADLINE_S)
        deleting = asyncio.create_task(runs.delete(run.run_id))
        await asyncio.wait_for(worker.has_waiting(3), DEADLINE_S)
        worker.gate.set()
        await asyncio.wait_for(deleting, DEADLINE_S)
        await asyncio.sleep(0.1)
        assert not run.folder.exists()
    assert pruned == []


@pytest.mark.parametrize(("read_errors", "lost"), [(2, False), (3, True)])
async def test_a_replay_that_cannot_be_read_begins_again_and_is_given_up_the_third_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_errors: int, lost: bool
):
    errors = [OSError(5, "Input/output error")] * read_errors

    def read(*args: Any, **settings: Any) -> list[Row]:
        if errors:
            raise errors.pop()
        return real(*args, **settings)

    real = journal_file.read
    worker = FakeWorker()
    async with trainer(tmp_path, worker) as runs:
        run = await runs.create(CreateRunRequest())
        await run.execute(step(1))
        monkeypatch.setattr(journal_file, "read", read)
        monkeypatch.setattr(placement, "_DISK_RETRY_S", 0.01)
        worker.die()
        worker.become_ready()
        answer = await asyncio.wait_for(run.execute(step(2)), DEADLINE_S)
        await run._journal.flush()
        assert (answer.optim_step.step, run.lost) == ((0, True) if lost else (2, False))
        # What it held of it is gone with it.
        await until(lambda: (run.run_id in worker.steps) == (not lost))
