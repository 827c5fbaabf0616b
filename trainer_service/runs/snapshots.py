"""Snapshots of a run: where they are, when one is due, how it is ordered, which are kept. The worker writes them."""

import asyncio
import contextlib
import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from gradwire.errors import GradwireError
from gradwire.v1.worker_service_pb2 import WorkerCommand, WorkerSnapshotRun

from trainer_service.config import SnapshotPolicy
from trainer_service.fleet.calls import call
from trainer_service.fleet.worker import Died, Reply, Worker
from trainer_service.runs.disk import wait_for_disk
from trainer_service.runs.journal_writer import Journal

logger = logging.getLogger(__name__)

KEPT = 2
"""The newest, and the one before it in case the newest turns out to be damaged."""
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Snapshot:
    """A snapshot that was written whole."""

    seq_id: int
    """Last operation it contains; 0 for the state that a forked run starts from."""
    folder: Path


class SnapshotClock:
    """Says when a run's next snapshot is due."""

    def __init__(self, policy: SnapshotPolicy) -> None:
        self._policy = policy
        self._steps = 0
        self._last_s = time.monotonic()
        self._overdue = False

    def due_after(self, kind: str) -> bool:
        """Whether a snapshot is due right after an operation that is sent to the worker now."""
        waited_s = time.monotonic() - self._last_s
        interval_s = self._policy.interval_s
        if kind != "optim_step":
            # Best after a step, when there are no gradients and no graphs to keep; unless steps are far apart.
            return interval_s > 0 and waited_s >= 3 * interval_s
        by_steps = 0 < self._policy.every_steps <= self._steps + 1
        return self._overdue or by_steps or (interval_s > 0 and waited_s >= interval_s)

    def operation(self, kind: str) -> bool:
        """An operation was sent to the worker. Returns whether a snapshot is due right after it."""
        due = self.due_after(kind)
        self._steps += kind == "optim_step"
        return due

    def taken(self) -> None:
        """A snapshot is being taken."""
        self._steps, self._last_s, self._overdue = 0, time.monotonic(), False

    def failed(self) -> None:
        """Taking it failed; it is tried again after the next step."""
        self._overdue = True


def snapshot_folder(run_folder: Path, seq_id: int) -> Path:
    """Where the snapshot after an operation goes."""
    return run_folder / "snapshots" / f"{seq_id:012d}"


def list_snapshots(run_folder: Path) -> list[Snapshot]:
    """The snapshots that were written whole, newest first. Digests are checked on loading."""
    found: list[Snapshot] = []
    with contextlib.suppress(FileNotFoundError):
        for folder in (run_folder / "snapshots").iterdir():
            if folder.name.isdigit() and (folder / _MANIFEST).exists():
                found.append(Snapshot(int(folder.name), folder))
    return sorted(found, key=lambda snapshot: snapshot.seq_id, reverse=True)


def remove_snapshots_after(run_folder: Path, seq_id: int) -> None:
    """Deletes snapshots of operations that a power cut took from the journal: others will have their seq_ids."""
    for snapshot in list_snapshots(run_folder):
        if snapshot.seq_id > seq_id:
            logger.warning("Removing a snapshot of lost operations.", extra={"fields": {"folder": snapshot.folder}})
            shutil.rmtree(snapshot.folder)


def prune_snapshots(run_folder: Path, *, verified_seq_id: int, keep_everything: bool) -> int:
    """Deletes snapshots that newer ones replace, and those that were never finished.

    Args:
        run_folder: The run's.
        verified_seq_id: That of a snapshot that was just written and read back.
        keep_everything: Keep whole ones, however old.

    Returns:
        seq_id of the oldest one kept.
    """
    whole = [snapshot for snapshot in list_snapshots(run_folder) if snapshot.seq_id <= verified_seq_id]
    kept = whole if keep_everything else whole[:KEPT]
    names = {snapshot.folder.name for snapshot in kept}
    for folder in (run_folder / "snapshots").iterdir():
        # A snapshot with a higher seq_id is being written now.
        number = folder.name.lstrip(".").partition(".")[0]
        if folder.name not in names and not (number.isdigit() and int(number) > verified_seq_id):
            shutil.rmtree(folder, ignore_errors=True)
    # A single snapshot has nothing to fall back on but the journal from its beginning.
    return kept[-1].seq_id if len(kept) >= KEPT else 0


class Snapshotter:
    """Sends the worker's snapshot commands, one at a time, each in its place in the run's order.

    Args:
        run_id: The run.
        journal: Its journal.
        worker: Holds the run.
        policy: When snapshots are due.
    """

    def __init__(self, run_id: str, journal: Journal, worker: Worker, policy: SnapshotPolicy) -> None:
        self._run_id = run_id
        self._journal = journal
        self._worker = worker
        self._clock = SnapshotClock(policy)
        self._task: asyncio.Task[bool] | None = None
        self._sent_seq_id = 0  # Last operation sent.
        self._loaded_seq_id = 0  # One that a snapshot must follow soon.
        self._taken_seq_id = 0  # Of the snapshot under way, or the last one.

    @property
    def busy(self) -> bool:
        """Whether a snapshot is being taken."""
        return self._task is not None

    def may_follow(self, kind: str) -> bool:
        """Whether a snapshot may be taken right after an operation that is sent now; it must then be on disk."""
        owed = self.busy and self._loaded_seq_id > self._taken_seq_id
        return owed or self._clock.due_after(kind)

    def sent_ahead(self, kind: str, seq_id: int) -> None:
        """An operation was sent to the worker that is not on disk yet."""
        self._sent_seq_id = seq_id
        if self._clock.operation(kind):
            # It has become due this very moment.
            self._clock.failed()

    def sent(self, kind: str, seq_id: int) -> None:
        """An operation was sent to the worker: takes a snapshot right after it, if one is due."""
        self._sent_seq_id = seq_id
        if kind == "load_state":
            # What was loaded may be overwritten or deleted before it is needed again.
            self.take_soon(seq_id)
        elif self._clock.operation(kind) and not self.busy:
            self.take(seq_id)

    def take_soon(self, seq_id: int) -> None:
        """Takes one after the last operation sent, now or as soon as the one under way is done."""
        self._sent_seq_id = self._loaded_seq_id = seq_id
        if not self.busy:
            self.take(seq_id)

    def take(self, seq_id: int) -> "asyncio.Task[bool]":
        """Takes one after the last operation sent. The task returns whether it succeeded."""
        assert self._task is None
        self._clock.taken()
        self._taken_seq_id = seq_id
        # Sent now, not when the task first runs: the next operation may come before that.
        folder = snapshot_folder(self._journal.folder, seq_id)
        sent = WorkerCommand(run_id=self._run_id, snapshot_run=WorkerSnapshotRun(folder=str(folder)))
        answer = call(self._worker, sent)
        self._task = asyncio.get_running_loop().create_task(self._take(answer, seq_id))
        return self._task

    def worker_died(self) -> None:
        """Forgets what the dead worker had loaded; restoring takes care of it."""
        self._loaded_seq_id = 0

    def cancel(self) -> None:
        """The run is deleted."""
        if self._task is not None:
            self._task.cancel()

    async def _take(self, answer: "asyncio.Future[Reply]", seq_id: int) -> bool:
        start_s, failure = time.monotonic(), None
        try:
            await answer
            if not self._journal.being_read:
                # A snapshot behind the journal's end is of no use, and after a power cut the end may be an earlier one.
                await self._journal.flush()
                await asyncio.to_thread(wait_for_disk, self._journal.folder)
                # Deleting gigabytes takes a moment.
                oldest = await asyncio.to_thread(
                    prune_snapshots,
                    self._journal.folder,
                    verified_seq_id=seq_id,
                    keep_everything=self._journal.retention.keep_everything,
                )
                self._journal.prune(snapshot_seq_id=oldest)
        except (GradwireError, OSError) as exc:
            failure = exc
        finally:
            self._task = None
        fields = {"run_id": self._run_id, "seq_id": seq_id}
        if failure is None:
            logger.info("Snapshot.", extra={"fields": fields | {"took_s": round(time.monotonic() - start_s, 3)}})
        else:
            self._clock.failed()
            if not isinstance(failure, Died):
                logger.warning("Snapshot failed; the one before stays.", extra={"fields": fields | {"why": failure}})
        if self._loaded_seq_id > seq_id:
            # A load_state came meanwhile.
            self.take(self._sent_seq_id)
        return failure is None
