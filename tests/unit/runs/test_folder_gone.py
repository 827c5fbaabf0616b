"""A run's folder that goes while the trainer runs: nothing more is executed that would be on no disk."""

import asyncio
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from gradwire.errors import GradwireError, from_status
from gradwire.v1.trainer_service_pb2 import CreateRunRequest

from tests.fakes import FakeWorker
from tests.runs import operations, settled, step, trainer
from tests.waiting import DEADLINE_S, until
from trainer_service.runs import journal as journal_file


async def test_operations_are_refused_once_the_journal_is_gone_and_other_runs_go_on(tmp_path: Path):
    worker, runs_dir = FakeWorker(), tmp_path / "data" / "runs"
    async with trainer(runs_dir, worker) as runs:
        run = await runs.create(CreateRunRequest())
        assert (await run.execute(step(1))).optim_step.step == 1
        shutil.rmtree(tmp_path / "data")
        executed = len(worker.executed)
        for seq_id in (2, 3):
            refused = from_status((await run.execute(step(seq_id))).error)
            assert refused.reason == "STORAGE_FAILED"
            assert "journal is no longer in its place" in refused.message
            assert str(tmp_path) not in refused.message
        assert all(kind == "fail_operation" for _, kind in operations(worker)[executed:])
        assert not run.folder.exists()
        # A new run has a new folder.
        another = await runs.create(CreateRunRequest())
        assert (await another.execute(step(1))).optim_step.step == 1
        assert another.folder.exists()


async def test_a_folder_that_is_put_back_is_written_on(tmp_path: Path):
    worker, runs_dir, aside = FakeWorker(), tmp_path / "runs", tmp_path / "aside"
    async with trainer(runs_dir, worker) as runs:
        run = await runs.create(CreateRunRequest())
        await run.execute(step(1))
        runs_dir.rename(aside)
        assert from_status((await run.execute(step(2))).error).reason == "STORAGE_FAILED"
        await settled(run)
        aside.rename(runs_dir)
        assert (await run.execute(step(3))).optim_step.step == 2
    async with trainer(runs_dir, FakeWorker()) as runs:
        again = runs.get(run.run_id)
        assert again.next_seq_id == 4
        assert from_status((await again.execute(step(2))).error).reason == "STORAGE_FAILED"
        assert (await again.execute(step(4))).optim_step.step == 3


async def test_a_copy_in_the_journals_place_is_not_taken_for_it(tmp_path: Path):
    worker, runs_dir = FakeWorker(), tmp_path / "runs"
    async with trainer(runs_dir, worker) as runs:
        run = await runs.create(CreateRunRequest())
        await run.execute(step(1))
        shutil.copytree(run.folder, tmp_path / "copy")
        shutil.rmtree(run.folder)
        shutil.copytree(tmp_path / "copy", run.folder)
        assert from_status((await run.execute(step(2))).error).reason == "STORAGE_FAILED"


async def test_an_answer_that_is_looked_up_while_its_run_is_deleted_is_of_a_deleted_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    connect, looking, deleted = journal_file.connect, threading.Event(), threading.Event()

    def connect_late(folder: Path, **how: Any) -> Any:
        looking.set()
        assert deleted.wait(DEADLINE_S)
        return connect(folder, **how)

    async with trainer(tmp_path, FakeWorker()) as runs:
        run = await runs.create(CreateRunRequest())
        await run.execute(step(1))
        await settled(run)
        monkeypatch.setattr(journal_file, "connect", connect_late)
        asked = asyncio.create_task(run.row(1))
        await until(looking.is_set)
        await runs.delete(run.run_id)
        deleted.set()
        with pytest.raises(GradwireError, match=r"was deleted\.") as caught:
            await asked
        assert caught.value.reason == "RUN_NOT_FOUND"
