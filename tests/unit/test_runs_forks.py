"""Forks over a fake worker whose only state is its number of steps."""

from pathlib import Path

import pytest
from gradwire.errors import InvalidArgumentError
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.trainer_service_pb2 import CreateRunRequest, ForkRunRequest, TrainRequest

from tests.fakes import FakeWorker
from tests.unit.test_runs_recovery import operations, step, trainer
from trainer_service.checkpoint_path import STATE, CheckpointPath
from trainer_service.runs.operation import Operation


def a_worker(folder: Path) -> FakeWorker:
    """One whose checkpoints are where a trainer over folder / "runs" looks for them."""
    return FakeWorker(checkpoint_dir=folder / "checkpoints")


def load(seq_id: int, path: str) -> Operation:
    return Operation.made(TrainRequest(seq_id=seq_id, load_state=ops.LoadStateRequest(path=path)))


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
