"""Brings a run back onto a worker: the newest snapshot that is whole, then the journal behind it.

What is executed again has its outcome already, and its answer is thrown away; what failed is not executed, but what its
failure did is done again, since a failure such as memory that ran out need not come twice.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gradwire.errors import GradwireError, error, from_status
from gradwire.v1.trainer_service_pb2 import CreateRunRequest, TrainRequest
from gradwire.v1.worker_service_pb2 import WorkerCommand, WorkerCreateRun, WorkerFailOperation

from trainer_service.fleet.calls import call, send
from trainer_service.fleet.worker import Died, Reply, Worker
from trainer_service.runs import journal
from trainer_service.runs.journal import Row
from trainer_service.runs.snapshots import Snapshot, list_snapshots

logger = logging.getLogger(__name__)

NO_ROOM = ("LIMIT_EXCEEDED", "DEVICE_OUT_OF_MEMORY")
"""Reasons that say that the worker has no room; it may have some in a moment."""

_AHEAD = 32
"""Operations replayed and not yet answered: enough to keep the device busy, few enough to bound memory."""

_UNCHANGED_BY = {"forward", "save_weights_for_sampler", "save_state"}
"""Kinds that leave a run as it was; a forward that keeps its graph is the exception."""


@dataclass(frozen=True)
class Source:
    """Where a run's state comes from.

    Attributes:
        folder: Holds the journal.
        snapshots: Newest first.
        from_base: Whether the journal reaches back to the base model.
    """

    folder: Path
    snapshots: Sequence[Snapshot]
    from_base: bool


def find_source(folder: Path, *, forked: bool) -> Source:
    """What a run's folder has to start from.

    Args:
        folder: The run's.
        forked: Whether it began as another run's state rather than as the base model.
    """
    with contextlib.closing(journal.connect(folder)) as db:
        oldest, _, _ = journal.seq_ids(db)
    return Source(folder, list_snapshots(folder), from_base=oldest == 1 and not forked)


@dataclass(frozen=True)
class Restored:
    """How a run came back."""

    snapshot_seq_id: int
    """Last operation in the snapshot; 0 for the base model."""
    replayed: int
    """Operations behind it."""
    load_s: float
    """Time to load the snapshot or the base model."""
    replay_s: float
    loaded: bool
    """Whether a load_state was among them, whose checkpoint may be gone the next time."""


def fail_command(run_id: str, request: TrainRequest, *, seq_id: int, kind: str, reason: str) -> WorkerCommand | None:
    """The command that does what an operation's failure did; None if it did nothing."""
    # A cancel that could not be written down must not let a step go through without the loss it was of.
    taints = kind == "cancel" and request.cancel.taint
    if kind not in ("forward_backward", "backward", "optim_step") and not taints:
        return None
    failed = WorkerFailOperation(seq_id=seq_id, kind=kind, reason=reason)
    if kind == "backward":
        failed.forward_seq_id = request.backward.forward_seq_id
    return WorkerCommand(run_id=run_id, fail_operation=failed)


def replay_of(run_id: str, row: Row) -> tuple[WorkerCommand, bytes] | None:
    """The command, and encoded request, that does again what an operation with an outcome did; None if nothing."""
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
    worker: Worker, run_id: str, request: CreateRunRequest, source: Source, *, up_to: int, as_run: str = ""
) -> Restored:
    """Makes the worker hold a run as it was after operation `up_to`.

    Args:
        worker: Which does not hold it.
        run_id: The run.
        request: What made it.
        source: Where its state comes from.
        up_to: A seq_id; 0 for a run without operations.
        as_run: Under which name; "" under its own.

    Raises:
        Died: There is no worker any more.
        GradwireError: RUN_LOST: there is nothing to start from. One of NO_ROOM: the worker may hold half of the run.
            Whatever else the worker answers with.
    """
    as_run = as_run or run_id
    start_s = time.monotonic()
    snapshot_seq_id = await load(worker, as_run, request, source, up_to=up_to)
    loaded_s = time.monotonic()
    replayed, loaded = 0, False
    ahead: deque[asyncio.Future[Reply | Died]] = deque()
    async for row in rows(source.folder, snapshot_seq_id, up_to=up_to):
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
    return Restored(snapshot_seq_id, replayed, loaded_s - start_s, time.monotonic() - loaded_s, loaded)


async def rows(folder: Path, after: int, *, up_to: int) -> AsyncIterator[Row]:
    """The journal's operations behind `after` up to and with `up_to`, read on another thread."""
    chunks = journal.read_all(folder, after, up_to=up_to)
    while chunk := await asyncio.to_thread(next, chunks, None):
        for row in chunk:
            yield row


async def load(worker: Worker, run_id: str, request: CreateRunRequest, source: Source, *, up_to: int) -> int:
    """Makes the run from the newest snapshot that can be loaded, or from the base model. Returns where it stands."""
    failures: list[str] = []
    for snapshot in source.snapshots:
        # A snapshot may be newer than the last outcome that reached the journal; that operation is executed again.
        if snapshot.seq_id > up_to:
            continue
        made = WorkerCreateRun(request=request, snapshot_folder=str(snapshot.folder))
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
    await call(worker, WorkerCommand(run_id=run_id, create_run=WorkerCreateRun(request=request)))
    return 0


def _check(outcome: Reply | Died, run_id: str) -> None:
    """Raises where no answer came, and where what succeeded once fails now: the state would be another one."""
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
