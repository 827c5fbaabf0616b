"""Restores a run onto a worker: the newest whole snapshot, then the journal after it.

Operations that succeeded are executed again and their answers discarded. Operations that failed are not executed: only
their failure's effect is repeated, since a failure such as running out of memory need not happen twice.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from gradwire.errors import GradwireError, error, from_status
from gradwire.v1.trainer_service_pb2 import CreateRunRequest, TrainRequest
from gradwire.v1.worker_service_pb2 import WorkerCommand, WorkerCreateRun, WorkerFailOperation, WorkerFreezeWeights

from trainer_service.fleet.calls import call, send
from trainer_service.fleet.worker import Died, Reply, Worker
from trainer_service.runs import journal
from trainer_service.runs.journal import Row
from trainer_service.runs.snapshots import Snapshot, list_snapshots

logger = logging.getLogger(__name__)

NO_ROOM = ("LIMIT_EXCEEDED", "DEVICE_OUT_OF_MEMORY")
"""Reasons that mean that the worker has no room now, and may have some soon."""

_AHEAD = 32
"""Replayed operations in flight: enough to keep the device busy, few enough to bound memory."""

_UNCHANGED_BY = {"forward", "save_weights_for_sampler", "save_state"}
"""Kinds that do not change a run; a forward that keeps its graph is the exception."""


@dataclass(frozen=True)
class Source:
    """What a run's state is recovered from.

    Attributes:
        folder: Holds the journal.
        snapshots: Newest first.
        from_base: Whether the journal reaches back to the base model.
    """

    folder: Path
    snapshots: Sequence[Snapshot]
    from_base: bool

    def reaching(self, seq_id: int) -> "Source":
        """The same, but tried first are the snapshots whose replay passes through an operation, if there are any."""
        before = [snapshot for snapshot in self.snapshots if snapshot.seq_id <= seq_id]
        return Source(self.folder, [*before, *(one for one in self.snapshots if one.seq_id > seq_id)], self.from_base)


def find_source(folder: Path, *, forked: bool) -> Source:
    """What a run's folder has to recover it from.

    Args:
        folder: The run's.
        forked: Whether it started from another run's state rather than from the base model.
    """
    with contextlib.closing(journal.connect(folder)) as db:
        oldest, _, _ = journal.seq_ids(db)
    return Source(folder, list_snapshots(folder), from_base=oldest == 1 and not forked)


@dataclass(frozen=True)
class Restored:
    """How a run was restored."""

    snapshot_seq_id: int
    """Last operation in the snapshot; 0 for the base model."""
    replayed: int
    """Operations replayed after it."""
    load_s: float
    """Time to load the snapshot or the base model."""
    replay_s: float
    loaded: bool
    """Whether one of them was a load_state, whose checkpoint may be gone the next time."""
    frozen: frozenset[int] = frozenset()
    """seq_ids of the frozen weights that the worker has again."""


def fail_command(run_id: str, request: TrainRequest, *, seq_id: int, kind: str, reason: str) -> WorkerCommand | None:
    """The command that repeats the effect of an operation's failure; None if it had none."""
    # A cancel that could not be recorded must not let a step through without the loss it stood for.
    taints = kind == "cancel" and request.cancel.taint
    if kind not in ("forward_backward", "backward", "optim_step") and not taints:
        return None
    failed = WorkerFailOperation(seq_id=seq_id, kind=kind, reason=reason)
    if kind == "backward":
        failed.forward_seq_id = request.backward.forward_seq_id
    return WorkerCommand(run_id=run_id, fail_operation=failed)


def replay_of(run_id: str, row: Row) -> tuple[WorkerCommand, bytes] | None:
    """The command and encoded request that repeat the effect of a finished operation; None if it had none."""
    if row.reason:
        failed = fail_command(
            run_id, TrainRequest.FromString(row.request), seq_id=row.seq_id, kind=row.kind, reason=row.reason
        )
        return None if failed is None else (failed, b"")
    if row.kind in _UNCHANGED_BY and not (
        row.kind == "forward" and TrainRequest.FromString(row.request).forward.keep_graph
    ):
        return None
    return WorkerCommand(run_id=run_id), row.request


async def restore(
    worker: Worker,
    run_id: str,
    request: CreateRunRequest,
    source: Source,
    *,
    up_to: int,
    as_run: str = "",
    run_folder: Path | None = None,
    refreeze: Collection[int] = (),
) -> Restored:
    """Makes the worker hold a run as it was after operation `up_to`.

    Args:
        worker: Does not hold it yet.
        run_id: The run.
        request: Created it.
        source: What its state is recovered from.
        up_to: A seq_id; 0 for a run without operations.
        as_run: The run_id the worker holds it under; "" for its own.
        run_folder: Where the worker notes which of its operations it executes; None for a copy that executes none.
        refreeze: seq_ids of frozen weights that the worker gets again, of those behind where the replay starts.

    Raises:
        Died: The worker died.
        GradwireError: RUN_LOST: there is nothing to recover it from. One of NO_ROOM: the worker may hold half of the
            run. Any other error that the worker answers with.
    """
    as_run = as_run or run_id
    start_s = time.monotonic()
    snapshot_seq_id = await load(worker, as_run, request, source, up_to=up_to, run_folder=run_folder)
    loaded_s = time.monotonic()
    replayed, loaded = 0, False
    ahead: deque[asyncio.Future[Reply | Died]] = deque()
    freezing: dict[int, asyncio.Future[Reply | Died]] = {}
    if snapshot_seq_id in refreeze:
        freezing[snapshot_seq_id] = send(worker, freeze_command(run_id, snapshot_seq_id, of=as_run))
    async for row in rows(source.folder, snapshot_seq_id, up_to=up_to):
        if row.seq_id in refreeze:
            freezing[row.seq_id] = send(worker, freeze_command(run_id, row.seq_id, of=as_run))
            continue
        again = replay_of(as_run, row)
        if again is None:
            continue
        command, encoded = again
        replayed += 1
        loaded = loaded or row.kind == "load_state"
        ahead.append(send(worker, command, request=encoded))
        while len(ahead) > _AHEAD:
            _check(await ahead.popleft(), as_run)
    while ahead:
        _check(await ahead.popleft(), as_run)
    frozen = frozenset([seq_id for seq_id, outcome in freezing.items() if _froze(await outcome, run_id, seq_id)])
    return Restored(snapshot_seq_id, replayed, loaded_s - start_s, time.monotonic() - loaded_s, loaded, frozen)


def freeze_command(run_id: str, seq_id: int, *, of: str) -> WorkerCommand:
    """The command that makes frozen weights again, of the run or its copy `of`."""
    return WorkerCommand(run_id=of, freeze_weights=WorkerFreezeWeights(run_id=run_id, seq_id=seq_id))


async def rows(folder: Path, after: int, *, up_to: int) -> AsyncIterator[Row]:
    """The journal's operations after `after`, up to and including `up_to`, read on another thread."""
    chunks = journal.read_all(folder, after, up_to=up_to)
    while chunk := await asyncio.to_thread(next, chunks, None):
        for row in chunk:
            yield row


async def load(
    worker: Worker,
    run_id: str,
    request: CreateRunRequest,
    source: Source,
    *,
    up_to: int,
    run_folder: Path | None = None,
) -> int:
    """Makes the run from the newest snapshot that loads, or from the base model. Returns the seq_id it is at."""
    failures: list[str] = []
    noted_in = str(run_folder) if run_folder else ""
    for snapshot in source.snapshots:
        # A snapshot may be newer than the last outcome in the journal; that operation is executed again.
        if snapshot.seq_id > up_to:
            continue
        made = WorkerCreateRun(request=request, snapshot_folder=str(snapshot.folder), run_folder=noted_in)
        try:
            await call(worker, WorkerCommand(run_id=run_id, create_run=made))
        except Died:
            raise
        except GradwireError as exc:
            if exc.reason in NO_ROOM:
                raise
            logger.error("Skipping a snapshot.", extra={"fields": {"folder": snapshot.folder, "why": exc.message}})
            failures.append(f"{snapshot.folder.name}: {exc.message}")
            continue
        return snapshot.seq_id
    if not source.from_base:
        why = "; ".join(failures) or "there is none"
        raise error(
            "RUN_LOST",
            f"{run_id} cannot be restored: no snapshot can be loaded ({why}), and its journal no longer reaches back "
            "to the base model. Load a checkpoint into a new run.",
            run_id=run_id,
        )
    made = WorkerCreateRun(request=request, run_folder=noted_in)
    await call(worker, WorkerCommand(run_id=run_id, create_run=made))
    return 0


def _froze(outcome: Reply | Died, run_id: str, seq_id: int) -> bool:
    """Whether frozen weights are back. That they are not is no loss to their run."""
    if isinstance(outcome, Died):
        raise outcome
    failed = outcome.event.done.error
    if failed.message:
        fields = {"run_id": run_id, "seq_id": seq_id, "why": failed.message}
        logger.warning("Frozen weights could not be made again.", extra={"fields": fields})
    return not failed.message


def _check(outcome: Reply | Died, run_id: str) -> None:
    """Raises if no answer came, or if an operation that succeeded once fails now: the state would differ."""
    if isinstance(outcome, Died):
        raise outcome
    event = outcome.event
    failed = event.response.error if event.HasField("response") else event.done.error
    if failed.message:
        if (exc := from_status(failed)).reason in NO_ROOM:
            raise exc
        raise error(
            "RUN_LOST",
            f"{run_id} cannot be restored: an operation that succeeded once failed when its journal was replayed: "
            f"{failed.message}",
            run_id=run_id,
        )
