"""Operations that are large, and what a run's journal has of them."""

import contextlib

import numpy as np
from gradwire._wire.codec import batch_from_arrays, batch_message
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.trainer_service_pb2 import TrainRequest

from tests.runs import settled, step
from trainer_service.runs import journal
from trainer_service.runs.operation import Operation
from trainer_service.runs.run import Run

TOKENS = 20_000
"""Of 8 bytes a target, which FakeWorker answers a forward with."""


def forward(seq_id: int, value: int = 7) -> Operation:
    tokens = np.full(TOKENS, value)
    batch = batch_message(batch_from_arrays([(tokens, {"target_tokens": tokens})]))
    return Operation.made(TrainRequest(seq_id=seq_id, forward=ops.ForwardRequest(batch=batch)))


async def rounds(run: Run, count: int) -> None:
    """So many passes, each with a step behind it, all on disk."""
    for number in range(count):
        await run.execute(forward(2 * number + 1))
        await run.execute(step(2 * number + 2))
        await settled(run)
    await run._journal.flush()


async def rows(run: Run) -> list[journal.Row]:
    await settled(run)
    with contextlib.closing(journal.connect(run.folder)) as db:
        return journal.read(run.folder, db, 0)
