"""Snapshots behind a load_state: what was loaded may be gone when it is needed again."""

import asyncio
import shutil
from pathlib import Path

import pytest
from gradwire.errors import GradwireError, error
from gradwire.v1.trainer_service_pb2 import CreateRunRequest

from tests.fakes import FakeWorker
from tests.runs import EVERY_2_STEPS, a_worker, load, operations, settled, step, trainer
from tests.waiting import DEADLINE_S, until
from trainer_service.paths import STATE, CheckpointPath
from trainer_service.runs import snapshots as snapshots_module
from trainer_service.runs.run import Run
from trainer_service.runs.snapshots import list_snapshots, prune_snapshots

SAVED = CheckpointPath("run-other", STATE, "a")
NO_ROOM = error("STORAGE_FAILED", "No room.")


def snapshots(run: Run) -> list[int]:
    """Last operation of each."""
    return [snapshot.seq_id for snapshot in list_snapshots(run.folder)]


async def snapshot_of(run: Run, seq_id: int) -> None:
    """Returns once there is one that contains an operation."""
    await until(lambda: max(snapshots(run), default=0) >= seq_id and run.placement.idle)


async def comes_back_without_what_it_loaded(run: Run, worker: FakeWorker, folder: Path) -> None:
    shutil.rmtree(SAVED.folder(folder / "checkpoints"))
    worker.die()
    worker.become_ready()
    answer = await asyncio.wait_for(run.execute(step(run.next_seq_id)), DEADLINE_S)
    assert answer.optim_step.step > 1000


@pytest.mark.parametrize(("failures", "left"), [([], [3, 2]), ([NO_ROOM], [3])], ids=["is taken", "fails"])
async def test_one_due_while_another_is_under_way_follows_it_at_once(
    tmp_path: Path, failures: list[GradwireError], left: list[int]
):
    worker = a_worker(tmp_path)
    path = worker.save(SAVED, step=1000)
    async with trainer(tmp_path / "runs", worker, durability=EVERY_2_STEPS) as runs:
        run = await runs.create(CreateRunRequest())
        await run.execute(step(1))
        worker.gate.clear()
        worker.command_failures["snapshot_run"] = list(failures)
        for operation in (step(2), load(3, path)):
            run.submit(operation, lambda answer: None)
        await asyncio.wait_for(worker.has_waiting(3), DEADLINE_S)
        worker.gate.set()
        await snapshot_of(run, 3)
        assert snapshots(run) == left
        await comes_back_without_what_it_loaded(run, worker, tmp_path)


async def test_one_that_a_death_prevented_is_taken_when_the_run_is_back(tmp_path: Path):
    worker = a_worker(tmp_path)
    path = worker.save(SAVED, step=1000)
    async with trainer(tmp_path / "runs", worker) as runs:
        run = await runs.create(CreateRunRequest())
        worker.command_failures["snapshot_run"] = [NO_ROOM]
        await run.execute(load(1, path))
        await settled(run)
        worker.die()
        run.attach("client")
        worker.become_ready()
        await snapshot_of(run, 1)
        await comes_back_without_what_it_loaded(run, worker, tmp_path)


async def test_one_that_the_worker_died_under_is_taken_behind_the_next_step(tmp_path: Path):
    worker = FakeWorker()
    async with trainer(tmp_path, worker, durability=EVERY_2_STEPS) as runs:
        run = await runs.create(CreateRunRequest())
        await run.execute(step(1))
        worker.command_failures["snapshot_run"] = [error("WORKER_DIED", "Killed.")]
        await run.execute(step(2))
        await settled(run)
        await run.execute(step(3))
        await snapshot_of(run, 3)


async def test_none_is_taken_of_a_run_that_is_being_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The worker dies while an older one is cleared away behind which one is due."""
    clearing = asyncio.Event()
    loop = asyncio.get_running_loop()

    def prune(folder: Path, *, verified_seq_id: int, keep_everything: bool) -> int:
        if verified_seq_id == 2:
            asyncio.run_coroutine_threadsafe(clearing.wait(), loop).result(DEADLINE_S)
        return prune_snapshots(folder, verified_seq_id=verified_seq_id, keep_everything=keep_everything)

    monkeypatch.setattr(snapshots_module, "prune_snapshots", prune)
    worker = a_worker(tmp_path)
    path = worker.save(SAVED, step=1000)
    async with trainer(tmp_path / "runs", worker, durability=EVERY_2_STEPS) as runs:
        run = await runs.create(CreateRunRequest())
        for operation in (step(1), step(2), load(3, path), step(4)):
            await run.execute(operation)
        worker.die()
        worker.executed.clear()
        worker.gate.clear()
        run.attach("client")
        worker.become_ready()
        await asyncio.wait_for(worker.has_waiting(1), DEADLINE_S)
        clearing.set()
        await asyncio.sleep(0.05)
        worker.gate.set()
        await snapshot_of(run, 4)
        assert snapshots(run) == [4, 2]
        # What it began from, what was done again, and only then the one that contains it.
        assert [kind for _, kind in operations(worker)] == ["create_run", "load_state", "optim_step", "snapshot_run"]
