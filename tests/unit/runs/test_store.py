"""Folders of runs whose trainer is killed while it makes or removes them; files are copied as SIGKILL leaves them."""

import asyncio
import shutil
from pathlib import Path

import pytest
from gradwire.errors import GradwireError, error
from gradwire.v1.trainer_service_pb2 import CreateRunRequest, ForkRunRequest

from tests.fakes import FakeWorker
from tests.runs import step, trainer
from tests.waiting import DEADLINE_S
from trainer_service.runs import store
from trainer_service.runs.run_folder import RunFolder


def names(runs_dir: Path) -> list[str]:
    return sorted(path.name for path in runs_dir.iterdir())


async def test_a_fork_whose_trainer_was_killed_meanwhile_is_made_anew_by_its_repeat(tmp_path: Path):
    worker = FakeWorker()
    request = ForkRunRequest(request_id="a")
    async with trainer(tmp_path / "runs", worker) as runs:
        run = await runs.create(CreateRunRequest())
        await run.execute(step(1))
        request.run_id = run.run_id
        worker.gate.clear()
        forking = asyncio.create_task(runs.fork(request))
        await asyncio.wait_for(worker.has_waiting(1), DEADLINE_S)
        shutil.copytree(tmp_path / "runs", tmp_path / "killed")
        worker.gate.set()
        assert (tmp_path / "runs" / (await forking).run_id).is_dir()
    async with trainer(tmp_path / "killed", FakeWorker()) as runs:
        assert names(tmp_path / "killed") == [run.run_id]
        fork = await runs.fork(request)
        assert (await fork.execute(step(1))).optim_step.step == 2
        # It has a state of its own to come back from.
        assert [folder.name for folder in (fork.folder / "snapshots").iterdir()] == ["000000000000"]


async def test_a_fork_that_fails_leaves_nothing_behind(tmp_path: Path):
    worker = FakeWorker()
    async with trainer(tmp_path, worker) as runs:
        run = await runs.create(CreateRunRequest())
        await run.execute(step(1))
        worker.gate.clear()
        forking = asyncio.create_task(runs.fork(ForkRunRequest(run_id=run.run_id)))
        await asyncio.wait_for(worker.has_waiting(1), DEADLINE_S)
        worker.die()
        worker.gate.set()
        with pytest.raises(ConnectionError):
            await forking
        assert names(tmp_path) == [run.run_id]


async def test_a_run_that_the_worker_refuses_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    async with trainer(tmp_path, worker := FakeWorker()) as runs:

        def refuse(*_: object) -> None:
            raise error("LIMIT_EXCEEDED", "No room.")

        monkeypatch.setattr(worker, "_other", refuse)
        with pytest.raises(GradwireError, match="No room"):
            await runs.create(CreateRunRequest())
        assert names(tmp_path) == []


async def test_a_run_half_deleted_does_not_come_back_and_is_removed_by_the_next_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    async with trainer(tmp_path, FakeWorker()) as runs:
        run = await runs.create(CreateRunRequest())
        with monkeypatch.context() as killed:
            killed.setattr(store.shutil, "rmtree", lambda *_, **__: None)
            await runs.delete(run.run_id)
        assert names(tmp_path) == [f".trash-{run.run_id}"]
    async with trainer(tmp_path, FakeWorker()) as runs:
        assert len(runs) == 0
        assert names(tmp_path) == []


async def test_what_another_trainer_is_making_or_removing_stays(tmp_path: Path):
    held: list[RunFolder] = []
    for name in (".new-run-1", ".trash-run-2"):
        (tmp_path / name).mkdir()
        held.append(RunFolder(tmp_path / name))
    async with trainer(tmp_path, FakeWorker()) as runs:
        assert len(runs) == 0
        assert names(tmp_path) == [".new-run-1", ".trash-run-2"]
    for folder in held:
        folder.close()
    async with trainer(tmp_path, FakeWorker()):
        assert names(tmp_path) == []
