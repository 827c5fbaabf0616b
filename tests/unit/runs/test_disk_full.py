"""A journal whose disk is full: new operations are refused, nothing is damaged, and it goes on when there is room."""

import asyncio
import contextlib
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gradwire.errors import GradwireError, from_status
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.trainer_service_pb2 import CreateRunRequest, TrainRequest, TrainResponse

from tests.fakes import FakeWorker
from tests.full_disk import NoMount, SmallDisk, nothing_can_be_written, small_disk
from tests.runs import forward_backward, operations, settled, step, trainer
from tests.waiting import DEADLINE_S, until
from trainer_service.config import Retention
from trainer_service.runs import journal as journal_file
from trainer_service.runs import placement
from trainer_service.runs.journal import Record
from trainer_service.runs.journal_writer import Journal, JournalWriter
from trainer_service.runs.operation import Operation


async def test_operations_are_refused_while_the_disk_is_full_and_taken_when_there_is_room(tmp_path: Path):
    worker = FakeWorker()
    async with trainer(tmp_path, worker) as runs:
        run = await runs.create(CreateRunRequest())
        await run.execute(step(1))
        with nothing_can_be_written():
            refused = [from_status((await run.execute(one)).error) for one in (forward_backward(2), step(3))]
            assert [exc.reason for exc in refused] == ["STORAGE_FAILED"] * 2
            assert "Operation 2 was refused and had no effect" in refused[0].message
            assert "Make room on the disk" in refused[0].message
            # What was told before can still be asked.
            assert (await run.execute(step(1))).optim_step.step == 1
        await settled(run)
        # The pass that was refused is missing from the gradients, so the worker marks them.
        assert operations(worker)[2:] == [(2, "fail_operation"), (3, "fail_operation")]
        assert (await run.execute(step(4))).optim_step.step == 2
        await settled(run)
    second = FakeWorker()
    async with trainer(tmp_path, second) as runs:
        run = runs.get(run.run_id)
        assert run.next_seq_id == 5
        assert from_status((await run.execute(forward_backward(2))).error).message == refused[0].message
        assert (await run.execute(step(5))).optim_step.step == 3
        assert operations(second) == [
            (0, "create_run"),
            (1, "optim_step"),
            (2, "fail_operation"),
            (3, "fail_operation"),
            (4, "optim_step"),
            (5, "optim_step"),
        ]


async def test_what_was_executing_when_the_disk_got_full_is_answered(tmp_path: Path):
    worker = FakeWorker()
    async with trainer(tmp_path, worker) as runs:
        run = await runs.create(CreateRunRequest())
        worker.gate.clear()
        answers: list[bytes] = []
        run.submit(step(1), answers.append)
        await worker.has_waiting(1)
        await until(lambda: run.under_way[0].journalled_s > 0)
        with nothing_can_be_written():
            worker.gate.set()
            await run.quiet()
            assert len(answers) == 1
        assert (await run.execute(step(2))).optim_step.step == 2
    async with trainer(tmp_path, FakeWorker()) as runs:
        assert runs.get(run.run_id).next_seq_id == 3
        assert runs.unanswered == 0


async def test_a_run_that_cannot_be_written_down_is_not_made(tmp_path: Path):
    async with trainer(tmp_path / "runs", FakeWorker()) as runs:
        with nothing_can_be_written(), pytest.raises(GradwireError, match="Make room") as caught:
            await runs.create(CreateRunRequest())
        assert caught.value.reason == "STORAGE_FAILED"
        assert list((tmp_path / "runs").iterdir()) == []
        await runs.create(CreateRunRequest())


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A file system of 24 MiB."""
    try:
        with small_disk(tmp_path / "disk", 24 << 20) as disk:
            yield disk
    except NoMount as exc:
        pytest.skip(f"no small disk to fill: {exc}")


async def test_refusals_are_on_a_full_disk_before_they_are_told(disk: SmallDisk, tmp_path: Path):
    """So that a trainer killed while its disk is full leaves no gap."""
    async with trainer(disk.path, FakeWorker()) as runs:
        run = await runs.create(CreateRunRequest())
        await run.execute(step(1))
        disk.fill()
        refused = [from_status((await run.execute(forward_backward(seq_id))).error).reason for seq_id in range(2, 30)]
        last = run.next_seq_id - 1
        # As after kill -9: the files as they are now, in another place.
        shutil.copytree(disk.path, tmp_path / "copy", ignore=lambda *_: ["ballast"])
        refused_at = [seq_id for seq_id, reason in enumerate(refused, start=2) if reason]
        assert {refused[seq_id - 2] for seq_id in refused_at} == {"STORAGE_FAILED"}
        disk.free()
        assert (await run.execute(step(last + 1))).optim_step.step == 2
        # Room for the next time.
        assert (run.folder / "reserve").stat().st_size == 4 << 20
    async with trainer(tmp_path / "copy", FakeWorker()) as runs:
        run = runs.get(run.run_id)
        assert run.next_seq_id == last + 1
        again = from_status((await run.execute(forward_backward(refused_at[0]))).error)
        assert again.reason == "STORAGE_FAILED"


async def test_the_room_kept_for_answers_is_not_taken_by_operations(disk: SmallDisk):
    async with trainer(disk.path, FakeWorker()) as runs:
        run = await runs.create(CreateRunRequest())
        disk.fill()
        large = ops.ForwardBackwardRequest(loss_fn="x" * 500_000)
        refused: set[str] = set()
        for seq_id in range(1, 30):
            operation = Operation.made(TrainRequest(seq_id=seq_id, forward_backward=large))
            refused.add(from_status((await run.execute(operation)).error).reason)
        assert refused == {"STORAGE_FAILED"}
        with contextlib.closing(sqlite3.connect(run.folder / "journal.sqlite")) as db:
            assert db.execute("SELECT count(*) FROM outcomes").fetchone()[0] == 29


async def test_a_reserve_that_a_killed_trainer_spent_is_made_again(tmp_path: Path):
    async with trainer(tmp_path, FakeWorker()) as runs:
        run = await runs.create(CreateRunRequest())
    (run.folder / "reserve").unlink()
    async with trainer(tmp_path, FakeWorker()) as runs:
        await runs.get(run.run_id).execute(step(1))
        assert (run.folder / "reserve").stat().st_size == 4 << 20


async def test_a_trainer_started_on_a_full_disk_takes_its_runs_up(disk: SmallDisk):
    async with trainer(disk.path, FakeWorker()) as runs:
        run = await runs.create(CreateRunRequest())
        await run.execute(step(1))
    disk.fill()
    async with trainer(disk.path, FakeWorker()) as runs:
        run = runs.get(run.run_id)
        assert from_status((await run.execute(step(2))).error).reason == "STORAGE_FAILED"
        disk.free()
        assert (await run.execute(step(3))).optim_step.step == 2


async def test_a_trainer_that_cannot_open_a_run_on_a_full_disk_does_not_start_without_it(disk: SmallDisk):
    async with trainer(disk.path, FakeWorker()) as runs:
        run = await runs.create(CreateRunRequest())
    (run.folder / "reserve").unlink()
    disk.fill()
    with pytest.raises(OSError, match=r"its disk is full.*make room and start again"):
        async with trainer(disk.path, FakeWorker()):
            pass
    disk.free()
    async with trainer(disk.path, FakeWorker()) as runs:
        assert len(runs) == 1


async def test_a_run_that_cannot_be_restored_on_a_full_disk_waits_for_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    worker = FakeWorker()
    async with trainer(tmp_path, worker) as runs:
        run = await runs.create(CreateRunRequest())
        await run.execute(step(1))
        full = True

        def find_source(*args: object, **settings: bool) -> object:
            if full:
                raise sqlite3.OperationalError("database or disk is full")
            return real(*args, **settings)  # pyright: ignore[reportArgumentType]

        real = placement.find_source
        monkeypatch.setattr(placement, "find_source", find_source)
        monkeypatch.setattr(placement, "has_no_room", lambda folder: full)
        monkeypatch.setattr(placement, "_DISK_RETRY_S", 0.01)
        worker.die()
        worker.become_ready()
        answer = asyncio.create_task(run.execute(step(2)))
        await asyncio.sleep(0.2)
        assert not run.lost
        full = False
        assert (await asyncio.wait_for(answer, DEADLINE_S)).optim_step.step == 2


def test_an_outcome_that_had_no_room_is_on_disk_before_any_later_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A gap among outcomes would have the next trainer take what succeeded for what failed."""
    record = Record(run_id="run-1", owner="", base_model="fake", created_s=0.0, create_request=b"")
    journal_file.create(tmp_path, record)
    journal = Journal(tmp_path, JournalWriter(), sync="normal", retention=Retention())
    inserted = journal_file.insert_outcome
    failures = iter([True, True, True])

    def insert_outcome(db: sqlite3.Connection, seq_id: int, *args: object, **settings: int) -> None:
        if next(failures, False):
            raise sqlite3.OperationalError("database or disk is full")
        inserted(db, seq_id, *args, **settings)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(journal_file, "insert_outcome", insert_outcome)
    jobs: list[Any] = []
    monkeypatch.setattr(journal._writer, "submit", jobs.append)
    for seq_id in (1, 2):
        response = TrainResponse(seq_id=seq_id)
        journal.record(seq_id, response, response.SerializeToString(), step=0, written=lambda: None)
    # Both together fail, then the first alone, then once more in the room of the reserve.
    assert [failure is None for failure in journal.commit(jobs)] == [False, True]
    with contextlib.closing(sqlite3.connect(tmp_path / "journal.sqlite")) as db:
        assert [row[0] for row in db.execute("SELECT seq_id FROM outcomes ORDER BY seq_id")] == [1, 2]


async def test_a_cancel_that_could_not_be_written_marks_the_gradients_its_loss_is_missing_from(tmp_path: Path):
    worker = FakeWorker()
    cancel = {taint: ops.CancelRequest(forward_seq_ids=[1], taint=taint) for taint in (True, False)}
    async with trainer(tmp_path, worker) as runs:
        run = await runs.create(CreateRunRequest())
        await run.execute(step(1))
        with nothing_can_be_written():
            for seq_id, taint in ((2, True), (3, False)):
                await run.execute(Operation.made(TrainRequest(seq_id=seq_id, cancel=cancel[taint])))
        await run.execute(step(4))
        assert operations(worker)[2:] == [(2, "fail_operation"), (4, "optim_step")]
        worker.die()
        worker.executed.clear()
        worker.become_ready()
        await run.execute(step(5))
        assert operations(worker)[2:4] == [(2, "fail_operation"), (4, "optim_step")]
