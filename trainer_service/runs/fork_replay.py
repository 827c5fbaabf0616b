"""Forks and replays from the journal: a run's state after any step, and proof that replaying gives the same answers."""

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
"""The largest step that can be looked up in the journal's database."""
_NOT_COMPARED = {"forward_passes:sum"}
"""Metrics that depend on memory, not on the run: a graph that was dropped is computed again."""
_ALWAYS_SKIPPED = ("save_state", "save_weights_for_sampler")
"""Not executed again: they would overwrite what was saved the first time."""


@dataclass(frozen=True)
class Difference:
    """The first answer that differs from the recorded one.

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
        after_seq_id: It began after this operation; 0 for the base model.
        compared: Operations whose answers were compared.
        not_compared: Operations that failed, or that only save.
        difference: None if all answers were the same.
    """

    after_seq_id: int
    compared: int
    not_compared: int
    difference: Difference | None


def seq_id_of_step(folder: Path, step: int, *, forked_at_step: int | None) -> int:
    """The operation after which a run was at a step: the last one, if several made or loaded that step.

    Args:
        folder: The run's.
        step: Optimizer steps applied.
        forked_at_step: The step that a forked run began at; None for a run made from the base model.

    Raises:
        InvalidArgumentError: INVALID_FIELD: the journal does not have that step; the message says which it has.
    """
    found = 0 if step == (forked_at_step or 0) else None
    with contextlib.closing(journal.connect(folder)) as db:
        if step <= _MAX_STEP:
            # If a step was made or loaded again, that one is meant.
            found = journal.seq_id_of_step(db, step) or found
        many, first, last = journal.steps(db)
    if found is None:
        # Steps may be missing between: loading a state can skip some.
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
    """Makes a run with another run's state after one of its operations, and writes its first snapshot.

    Args:
        worker: Makes it; it need not hold the source run, which stays as it is.
        source_run_id: The run that is forked.
        source: What its state is recovered from.
        request: Created it.
        seq_id: The operation.
        run_id: The new run.
        folder: The new run's.

    Raises:
        GradwireError: As recovery.restore. The caller then deletes the new run from the worker.
    """
    await restore(worker, source_run_id, request, source, up_to=seq_id, as_run=run_id, run_folder=folder)
    first = WorkerSnapshotRun(folder=str(snapshot_folder(folder, 0)))
    await call(worker, WorkerCommand(run_id=run_id, snapshot_run=first))


async def replay(
    worker: Worker, *, run_id: str, source: Source, request: CreateRunRequest, up_to: int, as_run: str
) -> Replayed:
    """Executes a run's operations again on a copy, from the oldest state there is, and compares every answer.

    Args:
        worker: Executes them; the run itself is not touched.
        run_id: The run.
        source: What its state is recovered from.
        request: Created it.
        up_to: Last operation; its outcome is in the journal.
        as_run: The copy's run_id.

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
        # What failed is not executed; all else is, even what changed nothing.
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
    """The digest of an operation's answer, without its times."""
    kind = response.WhichOneof("result") or "error"
    answer = getattr(response, kind)
    for name in _NOT_COMPARED & set(getattr(answer, "metrics", ())):
        del answer.metrics[name]
    return hashlib.sha256(kind.encode() + b"\0" + answer.SerializeToString(deterministic=True)).hexdigest()
