"""Frozen weights that went with their worker, over a fake worker that knows of each only the steps before it."""

import asyncio
from pathlib import Path

import pytest
from gradwire.errors import NotFoundError
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.trainer_service_pb2 import CreateRunRequest, TrainRequest

from tests.fakes import FakeWorker
from tests.runs import EVERY_2_STEPS, operations, settled, step, trainer
from tests.waiting import until
from trainer_service.config import Durability, Retention, SnapshotPolicy
from trainer_service.paths import SamplerPath
from trainer_service.runs.operation import Operation
from trainer_service.runs.registry import Runs
from trainer_service.runs.run import Run


def freeze(seq_id: int) -> Operation:
    save = ops.SaveWeightsForSamplerRequest(ephemeral=True, lease_ms=60_000)
    return Operation.made(TrainRequest(seq_id=seq_id, save_weights_for_sampler=save))


async def make_run(runs: Runs, *, freezes: set[int], up_to: int) -> Run:
    """A run of steps, but for the operations that freeze."""
    run = await runs.create(CreateRunRequest())
    for seq_id in range(1, up_to + 1):
        await run.execute(freeze(seq_id) if seq_id in freezes else step(seq_id))
        await settled(run)
    return run


def steps_frozen(worker: FakeWorker, run: Run) -> dict[int, int]:
    """Steps before each of the run's frozen weights, by the operation that made them."""
    assert all(path.run_id == run.run_id for path in worker.frozen)
    return {int(path.name): steps for path, steps in worker.frozen.items()}


async def next_worker(worker: FakeWorker, run: Run) -> None:
    """It dies, and the next one has the run again."""
    worker.die()
    worker.executed.clear()
    worker.become_ready()
    await run.execute(step(run.next_seq_id))


async def test_those_behind_the_snapshot_come_back_with_their_run(tmp_path: Path):
    worker = FakeWorker()
    async with trainer(tmp_path, worker, durability=EVERY_2_STEPS) as runs:
        run = await make_run(runs, freezes={4, 6}, up_to=6)
        await next_worker(worker, run)
        # The snapshot is of 5, so that 4 is left until somebody asks.
        assert steps_frozen(worker, run) == {6: 4}
        assert operations(worker) == [(0, "create_run"), (0, "freeze_weights"), (7, "optim_step")]


async def test_an_older_one_is_made_of_a_copy_once_it_is_asked_for_and_once(tmp_path: Path):
    worker = FakeWorker()
    async with trainer(tmp_path, worker, durability=EVERY_2_STEPS) as runs:
        run = await make_run(runs, freezes={2}, up_to=8)
        await next_worker(worker, run)
        assert steps_frozen(worker, run) == {}
        for _ in range(2):
            await runs.bring_back_frozen(run, 2)
        assert steps_frozen(worker, run) == {2: 1}
        copies = {run_id for run_id, _, _ in worker.executed} - {run.run_id}
        assert [kind for run_id, _, kind in worker.executed if run_id in copies] == [
            "create_run",
            "optim_step",
            "freeze_weights",
            "delete_run",
        ]
        assert worker.steps == {run.run_id: 8}


async def test_what_is_asked_for_while_there_is_no_worker_comes_back_with_the_run(tmp_path: Path):
    """From an older snapshot, which costs no memory for a copy."""
    worker = FakeWorker()
    async with trainer(tmp_path, worker, durability=EVERY_2_STEPS) as runs:
        run = await make_run(runs, freezes={4}, up_to=6)
        worker.die()
        await runs.bring_back_frozen(run, 4)
        worker.executed.clear()
        worker.become_ready()
        await run.execute(step(7))
        await runs.bring_back_frozen(run, 4)
        assert steps_frozen(worker, run) == {4: 3}
        assert {run_id for run_id, _, _ in worker.executed} == {run.run_id}


async def test_those_of_a_run_that_is_deleted_while_they_are_made_are_let_go(tmp_path: Path):
    worker = FakeWorker()
    async with trainer(tmp_path, worker, durability=EVERY_2_STEPS) as runs:
        run = await make_run(runs, freezes={2}, up_to=8)
        await next_worker(worker, run)
        worker.gate.clear()
        making = asyncio.create_task(runs.bring_back_frozen(run, 2))
        await worker.has_waiting(1)
        deleting = asyncio.create_task(runs.delete(run.run_id))
        await worker.has_waiting(2)
        worker.gate.set()
        await asyncio.gather(making, deleting, return_exceptions=True)
        await until(lambda: not worker.waiting)
        assert (worker.steps, worker.frozen) == ({}, {})


async def test_closed_ones_do_not_come_back_with_their_run(tmp_path: Path):
    worker = FakeWorker()
    async with trainer(tmp_path, worker) as runs:
        run = await make_run(runs, freezes={2, 3}, up_to=4)
        run.placement.frozen.closed(2)
        await next_worker(worker, run)
        assert steps_frozen(worker, run) == {3: 1}


async def test_the_next_trainer_brings_them_back_too(tmp_path: Path):
    async with trainer(tmp_path, FakeWorker()) as runs:
        run = await make_run(runs, freezes={2}, up_to=3)
    worker = FakeWorker()
    async with trainer(tmp_path, worker) as runs:
        run = runs.get(run.run_id)
        await runs.bring_back_frozen(run, 2)
        assert steps_frozen(worker, run) == {2: 1}


async def test_what_was_never_frozen_is_left_to_the_worker_to_refuse(tmp_path: Path):
    worker = FakeWorker()
    async with trainer(tmp_path, worker) as runs:
        run = await make_run(runs, freezes=set(), up_to=2)
        for seq_id in (1, 7):
            await runs.bring_back_frozen(run, seq_id)
        assert worker.frozen == {}
        assert {run_id for run_id, _, _ in worker.executed} == {run.run_id}


async def test_one_that_nothing_reaches_any_more_is_told_as_gone(tmp_path: Path):
    short = Durability(snapshots=SnapshotPolicy(every_steps=2), idle_lease_s=0, retention=Retention(keep_operations=8))
    worker = FakeWorker()
    async with trainer(tmp_path, worker, durability=short) as runs:
        run = await make_run(runs, freezes={2}, up_to=9)
        await next_worker(worker, run)
        with pytest.raises(NotFoundError, match="went with the worker that had them") as refused:
            await runs.bring_back_frozen(run, 2)
        assert refused.value.reason == "SAMPLER_NOT_FOUND"
        assert SamplerPath.frozen_weights(run.run_id, 2) not in worker.frozen
        assert worker.steps == {run.run_id: 9}
