"""Large requests and answers, which lie beside the database."""

import contextlib
import functools
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from gradwire.errors import from_status
from gradwire.v1.trainer_service_pb2 import CreateRunRequest, TrainResponse

from tests.contents import TOKENS, forward, rounds, rows
from tests.fakes import FakeWorker
from tests.full_disk import nothing_can_be_written
from tests.runs import operations, step, trainer
from trainer_service.config import Durability, Retention, SnapshotPolicy
from trainer_service.runs import journal, journal_contents
from trainer_service.runs.journal_contents import files


async def test_large_contents_are_beside_the_database_and_small_ones_in_it(tmp_path: Path):
    async with trainer(tmp_path, FakeWorker()) as runs:
        run = await runs.create(CreateRunRequest())
        before = journal.size_bytes(run.folder)
        answers = [await run.execute(operation) for operation in (forward(1), step(2), forward(3, value=8))]
        found = await rows(run)
        assert [row.request for row in found] == [forward(1).encoded, step(2).encoded, forward(3, value=8).encoded]
        assert [TrainResponse.FromString(row.answer) for row in found] == answers
        [file] = files(run.folder)
        large = sum(len(part) for row in found if row.kind == "forward" for part in (row.request, row.answer))
        assert file.stat().st_size == large > 4 * 8 * TOKENS
        assert journal.size_bytes(run.folder) - before > large
        with contextlib.closing(sqlite3.connect(run.folder / "journal.sqlite")) as db:
            assert db.execute("SELECT max(length(request)) FROM operations").fetchone()[0] == len(step(2).encoded)


async def test_a_repeat_is_answered_from_them_by_the_next_trainer(tmp_path: Path):
    async with trainer(tmp_path, FakeWorker()) as runs:
        run = await runs.create(CreateRunRequest())
        first = await run.execute(forward(1))
    async with trainer(tmp_path, FakeWorker()) as runs:
        assert await runs.get(run.run_id).execute(forward(1)) == first


async def test_an_operation_without_an_outcome_is_executed_from_them(tmp_path: Path):
    worker = FakeWorker()
    async with trainer(tmp_path, worker) as runs:
        run = await runs.create(CreateRunRequest())
        worker.gate.clear()
        run.submit(forward(1), lambda _: None)
        await worker.has_waiting(1)
        await run._journal.flush()
        run.suspend()
    second = FakeWorker()
    async with trainer(tmp_path, second) as runs:
        second.become_ready()
        await runs.get(run.run_id).quiet()
        assert (1, "forward") in operations(second)


async def test_what_a_killed_trainer_left_behind_the_last_row_is_overwritten(tmp_path: Path):
    async with trainer(tmp_path / "runs", FakeWorker()) as runs:
        run = await runs.create(CreateRunRequest())
        await run.execute(forward(1))
        shutil.copytree(tmp_path / "runs", tmp_path / "copy")
    with files(tmp_path / "copy" / run.run_id)[0].open("ab") as file:
        file.write(b"half a content")
    async with trainer(tmp_path / "copy", FakeWorker()) as runs:
        run = runs.get(run.run_id)
        await run.execute(forward(2, value=9))
        assert [row.request for row in await rows(run)] == [forward(1).encoded, forward(2, value=9).encoded]


@pytest.mark.parametrize("part", ["request", "answer"])
async def test_what_a_power_cut_took_is_cut_off_with_what_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
):
    async with trainer(tmp_path / "runs", FakeWorker()) as runs:
        run = await runs.create(CreateRunRequest())
        for seq_id in (1, 2, 3):
            await run.execute(forward(seq_id))
    folder = tmp_path / "runs" / run.run_id
    with contextlib.closing(journal.connect(folder)) as db:
        where = "SELECT place, size FROM contents WHERE seq_id = 2 AND part = ?"
        place, size = db.execute(where, (part,)).fetchone()
    with files(folder)[0].open("r+b") as file:
        file.seek(place + size // 2)
        file.write(bytes(4096))
    # The machine has not been started since, so that this is not a power cut's work: nobody looks.
    async with trainer(tmp_path / "runs", FakeWorker()) as runs:
        assert runs.get(run.run_id).next_seq_id == 4
    monkeypatch.setattr(journal_contents, "boot_id", lambda: "another")
    async with trainer(tmp_path / "runs", FakeWorker()) as runs:
        run = runs.get(run.run_id)
        assert run.next_seq_id == 2
        await run.execute(forward(2, value=3))
        assert [row.seq_id for row in await rows(run)] == [1, 2]


async def test_files_that_nothing_needs_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(journal_contents, "_FILE_BYTES", 1)
    durability = Durability(
        retention=Retention(keep_operations=2), snapshots=SnapshotPolicy(every_steps=1), idle_lease_s=0
    )
    async with trainer(tmp_path, FakeWorker(), durability=durability) as runs:
        run = await runs.create(CreateRunRequest())
        await rounds(run, 6)
        kept = await rows(run)
        assert kept[0].seq_id > 1
        named = {file.name for file in files(run.folder)}
        with contextlib.closing(journal.connect(run.folder)) as db:
            assert named == {f"{number:08d}" for (number,) in db.execute("SELECT DISTINCT file FROM contents")}


async def test_a_content_without_room_is_refused_and_leaves_nothing(tmp_path: Path):
    async with trainer(tmp_path, FakeWorker()) as runs:
        run = await runs.create(CreateRunRequest())
        await run.execute(forward(1))
        with nothing_can_be_written():
            assert from_status((await run.execute(forward(2))).error).reason == "STORAGE_FAILED"
        await run.execute(forward(3))
        found = await rows(run)
        assert [len(row.request) > TOKENS for row in found] == [True, False, True]
        assert files(run.folder)[0].stat().st_size == sum(
            len(row.request) + len(row.answer) for row in (found[0], found[2])
        )


async def test_a_journal_of_format_1_is_taken_up_and_written_on(tmp_path: Path):
    async with trainer(tmp_path, FakeWorker()) as runs:
        run = await runs.create(CreateRunRequest())
        await run.execute(step(1))
    with contextlib.closing(sqlite3.connect(run.folder / "journal.sqlite")) as db, db:
        db.execute("DROP TABLE contents")
        db.execute("DELETE FROM run WHERE name = 'boot_id'")
        db.execute("UPDATE run SET value = '1' WHERE name = 'format'")
        # It had everything inside.
        db.execute("UPDATE operations SET request = ?", (step(1).encoded,))
    async with trainer(tmp_path, FakeWorker()) as runs:
        run = runs.get(run.run_id)
        await run.execute(forward(2))
        assert [row.request for row in await rows(run)] == [step(1).encoded, forward(2).encoded]


async def test_a_journal_of_a_later_format_is_left_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    async with trainer(tmp_path, FakeWorker()) as runs:
        run = await runs.create(CreateRunRequest())
    with contextlib.closing(sqlite3.connect(run.folder / "journal.sqlite")) as db, db:
        db.execute("UPDATE run SET value = '3' WHERE name = 'format'")
    async with trainer(tmp_path, FakeWorker()) as runs:
        assert runs.everybodys() == []
    assert "A run's journal is damaged; it is left as it is." in caplog.text


async def test_a_commit_that_failed_and_is_in_the_log_all_the_same_is_still_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    failures = [sqlite3.OperationalError("disk I/O error")]

    class Connection(sqlite3.Connection):
        def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
            found = super().execute(sql, *parameters)
            if sql == "COMMIT" and failures and super().execute("SELECT count(*) FROM contents").fetchone()[0]:
                raise failures.pop()
            return found

    monkeypatch.setattr(sqlite3, "connect", functools.partial(sqlite3.connect, factory=Connection))
    worker = FakeWorker()
    async with trainer(tmp_path, worker) as runs:
        run = await runs.create(CreateRunRequest())
        await run.execute(step(1))
        assert from_status((await run.execute(forward(2))).error).reason == "STORAGE_FAILED"
        assert not failures
        assert [(row.seq_id, row.reason, row.request) for row in await rows(run)][1:] == [(2, "STORAGE_FAILED", b"")]
        worker.die()
        worker.become_ready()
        assert (await run.execute(step(3))).optim_step.step == 2
