"""Has one run's snapshots taken, and lets go of what they make superfluous."""

import asyncio
import logging
import time

from gradwire.errors import GradwireError
from gradwire.v1.worker_service_pb2 import WorkerCommand, WorkerSnapshotRun

from trainer_service.config import SnapshotPolicy
from trainer_service.fleet.worker import Reply, Worker
from trainer_service.runs.journal_writer import Journal
from trainer_service.runs.recovery import command
from trainer_service.runs.snapshots import SnapshotClock, prune_snapshots, snapshot_folder

logger = logging.getLogger(__name__)


class Snapshotter:
    """Sends the worker's snapshot command in its place in the run's order, one at a time.

    Args:
        run_id: The run.
        journal: Its journal.
        worker: Holds it.
        policy: When snapshots are due.
    """

    def __init__(self, run_id: str, journal: Journal, worker: Worker, policy: SnapshotPolicy) -> None:
        self._run_id = run_id
        self._journal = journal
        self._worker = worker
        self._clock = SnapshotClock(policy)
        self._task: asyncio.Task[bool] | None = None

    @property
    def busy(self) -> bool:
        """Whether one is being taken."""
        return self._task is not None

    def sent(self, kind: str, seq_id: int) -> None:
        """An operation was sent to the worker: has a snapshot taken right behind it, if one is due."""
        if self._clock.operation(kind) and not self.busy:
            self.take(seq_id)

    def take(self, seq_id: int) -> "asyncio.Task[bool]":
        """Has one taken, behind the operation sent last. The task tells whether it was."""
        assert self._task is None
        self._clock.taken()
        # Sent now, not when the task first runs: the next operation may come before that.
        folder = snapshot_folder(self._journal.folder, seq_id)
        sent = WorkerCommand(run_id=self._run_id, snapshot_run=WorkerSnapshotRun(folder=str(folder)))
        answer = command(self._worker, sent)
        self._task = asyncio.get_running_loop().create_task(self._take(answer, seq_id))
        return self._task

    def cancel(self) -> None:
        """The run is deleted."""
        if self._task is not None:
            self._task.cancel()

    async def _take(self, answer: "asyncio.Future[Reply]", seq_id: int) -> bool:
        start_s = time.monotonic()
        try:
            await answer
            # Deleting gigabytes takes a moment.
            oldest = await asyncio.to_thread(
                prune_snapshots,
                self._journal.folder,
                verified_seq_id=seq_id,
                keep_everything=self._journal.retention.keep_everything,
            )
            self._journal.prune(snapshot_seq_id=oldest)
        except (GradwireError, OSError) as exc:
            if not isinstance(exc, GradwireError) or exc.reason not in ("WORKER_DIED", "WORKER_NOT_READY", "DRAINING"):
                fields = {"run_id": self._run_id, "seq_id": seq_id, "why": exc}
                logger.warning("No snapshot; the one before stays.", extra={"fields": fields})
                self._clock.failed()
            return False
        finally:
            self._task = None
        took_s = round(time.monotonic() - start_s, 3)
        logger.info("Snapshot.", extra={"fields": {"run_id": self._run_id, "seq_id": seq_id, "took_s": took_s}})
        return True
