"""A trainer's runs over a fake worker, and what most of their tests do with them."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.trainer_service_pb2 import TrainRequest

from tests.fakes import FakeWorker
from tests.waiting import until
from trainer_service.checkpoints.catalog import Catalog
from trainer_service.checkpoints.transfers import Transfers
from trainer_service.config import Durability, Limits, SnapshotPolicy
from trainer_service.runs.observer import Observer
from trainer_service.runs.operation import Operation
from trainer_service.runs.registry import Runs
from trainer_service.runs.run import Run
from trainer_service.served_model import ServedModel

EVERY_2_STEPS = Durability(snapshots=SnapshotPolicy(every_steps=2), idle_lease_s=0)


@contextlib.asynccontextmanager
async def trainer(folder: Path, worker: FakeWorker, **settings: Any) -> AsyncIterator[Runs]:
    """A trainer's runs, until it stops."""
    settings = {"base_model": "fake", "limits": Limits(), "detach_grace_s": 60.0, **settings}
    settings["base_model"] = ServedModel(settings["base_model"])
    runs = Runs(
        worker,
        observer=Observer(),
        runs_dir=folder,
        adapter_dir=folder.parent / "adapters",
        transfers=Transfers(Catalog(folder.parent / "checkpoints")),
        **settings,
    )
    runs.start()
    try:
        yield runs
    finally:
        await runs.stop()
        await worker.stop()


def step(seq_id: int) -> Operation:
    return Operation.made(TrainRequest(seq_id=seq_id, optim_step=ops.OptimStepRequest()))


def forward_backward(seq_id: int) -> Operation:
    return Operation.made(TrainRequest(seq_id=seq_id, forward_backward=ops.ForwardBackwardRequest()))


async def settled(run: Run) -> None:
    """Returns once nothing of the run is under way."""
    await until(lambda: run.idle)


def operations(worker: FakeWorker) -> list[tuple[int, str]]:
    return [(seq_id, kind) for _, seq_id, kind in worker.executed]


def a_worker(folder: Path) -> FakeWorker:
    """One whose checkpoints are where a trainer over folder / "runs" looks for them."""
    return FakeWorker(checkpoint_dir=folder / "checkpoints")


def load(seq_id: int, path: str) -> Operation:
    return Operation.made(TrainRequest(seq_id=seq_id, load_state=ops.LoadStateRequest(path=path)))
