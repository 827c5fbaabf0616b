"""Forks over a fake worker whose only state is its number of steps."""

import asyncio
import contextlib
from pathlib import Path

import pytest
from gradwire.errors import InvalidArgumentError, NotFoundError
from gradwire.v1.trainer_service_pb2 import CreateRunRequest, ForkRunRequest

from tests.fakes import FakeWorker
from tests.runs import a_worker, load, operations, settled, step, trainer
from trainer_service.config import Durability, Retention, SnapshotPolicy
from trainer_service.paths import STATE, CheckpointPath
from trainer_service.runs import fork_replay, journal, recovery


async def test_a_run_that_loaded_a_state_is_forked_as_it_is_now(tmp_path: Path):
    worker = a_worker(tmp_path)
    path = worker.save(CheckpointPath("run-other", STATE, "a"), step=1000)
    async with trainer(tmp_path / "runs", worker) as runs:
        run = await runs.create(CreateRunRequest())
        assert (await run.execute(load(1, path))).load_state.step == 1000
        for wanted in (None, 1000):
            fork = await runs.fork(ForkRunRequest(run_id=run.run_id, step=wanted))
            assert (fork.step, worker.steps[fork.run_id]) == (1000, 1000)
        await run.execute(step(2))
        for wanted in (1001, 1000):
            fork = await runs.fork(ForkRunRequest(run_id=run.run_id, step=wanted))
            assert worker.steps[fork.run_id] == wanted


async def test_of_a_step_made_and_then_loaded_the_loaded_one_is_forked(tmp_path: Path):
    worker = a_worker(tmp_path)
    path = worker.save(CheckpointPath("run-other", STATE, "a"), step=2)
    async with trainer(tmp_path / "runs", worker) as runs:
        run = await runs.create(CreateRunRequest())
        for operation in (step(1), step(2), load(3, path)):
            await run.execute(operation)
        for wanted in (None, 2):
            fork = await runs.fork(ForkRunRequest(run_id=run.run_id, step=wanted))
            assert fork.record.parent_seq_id == 3
        worker.executed.clear()
        await runs.fork(ForkRunRequest(run_id=run.run_id, step=1))
        assert operations(worker)[1:2] == [(1, "optim_step")]


async def test_a_step_leapt_over_by_loading_is_refused_naming_where_the_run_was(tmp_path: Path):
    worker = a_worker(tmp_path)
    path = worker.save(CheckpointPath("run-other", STATE, "a"), step=1000)
    async with trainer(tmp_path / "runs", worker) as runs:
        run = await runs.create(CreateRunRequest())
        with pytest.raises(InvalidArgumentError, match="it has optimizer steps none"):
            await runs.fork(ForkRunRequest(run_id=run.run_id, step=7))
        for operation in (step(1), step(2), load(3, path)):
            await run.execute(operation)
        with pytest.raises(InvalidArgumentError, match="it has optimizer steps some of 1 to 1000"):
            await runs.fork(ForkRunRequest(run_id=run.run_id, step=7))


async def test_nothing_is_let_go_that_a_fork_or_replay_has_still_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(journal, "_CHUNK_ROWS", 2)
    monkeypatch.setattr(recovery, "_AHEAD", 1)
    monkeypatch.setattr(fork_replay, "_AHEAD", 1)
    worker = FakeWorker()
    durability = Durability(retention=Retention(keep_operations=60), snapshots=SnapshotPolicy(every_steps=2))
    async with trainer(tmp_path, worker, durability=durability) as runs:
        run = await runs.create(CreateRunRequest())

        async def train(last: int) -> None:
            while run.next_seq_id <= last:
                await run.execute(step(run.next_seq_id))
                await settled(run)

        async def oldest_kept() -> int:
            await run._journal.flush()
            with contextlib.closing(journal.connect(run.folder)) as db:
                return journal.seq_ids(db)[0]

        await train(60)
        worker.latency_s = 0.001
        forking = asyncio.create_task(runs.fork(ForkRunRequest(run_id=run.run_id, step=55)))
        replaying = asyncio.create_task(runs.replay(run.run_id))
        await train(66)
        assert await oldest_kept() == 1
        fork = await forking
        assert (fork.step, worker.steps[fork.run_id]) == (55, 55)
        replayed = await replaying
        assert (replayed.compared, replayed.difference) == (60, None)
        # Held off, not given up.
        await train(68)
        assert await oldest_kept() == 9


async def test_a_fork_of_a_run_deleted_meanwhile_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(journal, "_CHUNK_ROWS", 1)
    monkeypatch.setattr(recovery, "_AHEAD", 1)
    worker = FakeWorker()
    async with trainer(tmp_path, worker) as runs:
        run = await runs.create(CreateRunRequest())
        for seq_id in range(1, 9):
            await run.execute(step(seq_id))
        worker.latency_s = 0.01
        forking = asyncio.create_task(runs.fork(ForkRunRequest(run_id=run.run_id)))
        await asyncio.sleep(0.02)
        await runs.delete(run.run_id)
        with pytest.raises(NotFoundError, match=f"{run.run_id} was deleted"):
            await forking


@pytest.mark.parametrize("wanted", [99, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
async def test_a_step_that_no_journal_can_have_is_refused_like_one_that_this_has_not(tmp_path: Path, wanted: int):
    async with trainer(tmp_path, FakeWorker()) as runs:
        run = await runs.create(CreateRunRequest())
        await run.execute(step(1))
        with pytest.raises(InvalidArgumentError, match=f"step is {wanted}, which the run's journal does not have"):
            await runs.fork(ForkRunRequest(run_id=run.run_id, step=wanted))
