"""What keeping the log is good for: a run as it was after any step, and proof that the log leads where it led."""

import asyncio
import contextlib
import hashlib
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from gradwire.errors import invalid_field
from gradwire.v1.trainer_service_pb2 import CreateRunRequest, TrainResponse
from gradwire.v1.worker_service_pb2 import WorkerCommand, WorkerDeleteRun, WorkerSnapshotRun

from trainer_service.fleet.calls import call, send
from trainer_service.fleet.worker import Died, Reply, Worker
from trainer_service.runs import journal
from trainer_service.runs.journal import Row
from trainer_service.runs.recovery import Source, load, replay_of, restore, rows
from trainer_service.runs.snapshots import snapshot_folder

_AHEAD = 32
_MAX_STEP = (1 << 63) - 1
"""What the journal's database can be asked for."""
_NOT_COMPARED = {"forward_passes:sum"}
"""Metrics that tell of memory, not of the run: a graph that had to be let go is computed again."""
_ALWAYS_SKIPPED = ("save_state", "save_weights_for_sampler")
"""Not executed again: they would write where the first time wrote."""


@dataclass(frozen=True)
class Difference:
    """The first answer that did not come out as it did.

    Attributes:
        seq_id: The operation.
        kind: Its kind.
        step: Optimizer steps applied before it.
        recorded: Digest of its answer in the journal, hex.
        replayed: Digest of its answer now.
    """

    seq_id: int
    kind: str
    step: int
    recorded: str
    replayed: str


@dataclass(frozen=True)
class Replayed:
    """What a replay found.

    Attributes:
        after_seq_id: It began behind this operation; 0 at the base model.
        compared: Operations whose answers were compared.
        not_compared: Operations that failed, or that only save.
        difference: None where everything came out as it did.
    """

    after_seq_id: int
    compared: int
    not_compared: int
    difference: Difference | None


def seq_id_of_step(folder: Path, step: int, *, forked_at_step: int | None) -> int:
    """The operation behind which a run's state was that of a step: the last, where several made or loaded that step.

    Args:
        folder: The run's.
        step: Optimizer steps applied.
        forked_at_step: Where the run began, for one that began as another's state; None for the base model.

    Raises:
        InvalidArgumentError: INVALID_FIELD: the journal does not have that step; the message says which it has.
    """
    found = 0 if step == (forked_at_step or 0) else None
    with contextlib.closing(journal.connect(folder)) as db:
        if step <= _MAX_STEP:
            # A step made or loaded again is meant rather than the one it replaced.
            found = journal.seq_id_of_step(db, step) or found
        many, first, last = journal.steps(db)
    if found is None:
        # Loading leaps.
        kept = f"{first} to {last}" if many == last - first + 1 else f"some of {first} to {last}"
        kept = kept if many else "none"
        text = f"is {step}, which the run's journal does not have; it has optimizer steps {kept}."
        raise invalid_field("step", text, got=step)
    return found


async def fork(
    worker: Worker,
    *,
    source_run_id: str,
    source: Source,
    request: CreateRunRequest,
    seq_id: int,
    run_id: str,
    folder: Path,
) -> None:
    """Makes a run with the state of another behind one of its operations, and writes that state down.

    Args:
        worker: Makes it; the source need not be there, and is left alone if it is.
        source_run_id: The run forked.
        source: Where its state comes from.
        request: What made it.
        seq_id: The operation.
        run_id: The new run.
        folder: The new run's.

    Raises:
        GradwireError: As recovery.restore. Whoever calls deletes from the worker what was made.
    """
    await restore(worker, source_run_id, request, source, up_to=seq_id, as_run=run_id)
    first = WorkerSnapshotRun(folder=str(snapshot_folder(folder, 0)))
    await call(worker, WorkerCommand(run_id=run_id, snapshot_run=first))


async def replay(
    worker: Worker, *, run_id: str, source: Source, request: CreateRunRequest, up_to: int, as_run: str
) -> Replayed:
    """Executes a run's operations again, aside, from as far back as there is a state, and compares every answer.

    Args:
        worker: Executes them; the run itself is left alone.
        run_id: The run.
        source: Where its state comes from.
        request: What made it.
        up_to: Last operation, whose outcome is in the journal.
        as_run: Name to hold the copy under.

    Raises:
        GradwireError: As recovery.restore.
    """
    oldest = Source(source.folder, [] if source.from_base else source.snapshots[-1:], source.from_base)
    try:
        after = await load(worker, as_run, request, oldest, up_to=up_to)
        return await _compare(worker, source.folder, after, up_to=up_to, as_run=as_run)
    finally:
        worker.submit(WorkerCommand(run_id=as_run, delete_run=WorkerDeleteRun()), lambda _: None)


async def _compare(worker: Worker, folder: Path, after: int, *, up_to: int, as_run: str) -> Replayed:
    compared = not_compared = step = 0
    ahead: deque[tuple[Row, asyncio.Future[Reply | Died]]] = deque()

    async def oldest() -> Difference | None:
        nonlocal compared, step
        row, future = ahead.popleft()
        outcome = await future
        if isinstance(outcome, Died):
            raise outcome
        if row.reason:
            return None
        compared += 1
        recorded, replayed = _digest(TrainResponse.FromString(row.answer)), _digest(outcome.event.response)
        if recorded != replayed:
            return Difference(row.seq_id, row.kind, step, recorded, replayed)
        if row.kind in ("optim_step", "load_state"):
            step = getattr(outcome.event.response, row.kind).step
        return None

    async for row in rows(folder, after, up_to=up_to):
        skipped = row.reason is None or (not row.reason and row.kind in _ALWAYS_SKIPPED)
        not_compared += skipped or bool(row.reason)
        if skipped:
            continue
        # What failed is not executed; whatever else it is, it is, if it changed nothing too.
        again = replay_of(as_run, row) if row.reason else (WorkerCommand(run_id=as_run), row.request)
        if again is not None:
            command, encoded = again
            ahead.append((row, send(worker, command, request=encoded)))
        while len(ahead) > _AHEAD:
            if (difference := await oldest()) is not None:
                return Replayed(after, compared, not_compared, difference)
    while ahead:
        if (difference := await oldest()) is not None:
            return Replayed(after, compared, not_compared, difference)
    return Replayed(after, compared, not_compared, None)


def _digest(response: TrainResponse) -> str:
    """Of what an operation answered, without its times."""
    kind = response.WhichOneof("result") or "error"
    answer = getattr(response, kind)
    for name in _NOT_COMPARED & set(getattr(answer, "metrics", ())):
        del answer.metrics[name]
    return hashlib.sha256(kind.encode() + b"\0" + answer.SerializeToString(deterministic=True)).hexdigest()
