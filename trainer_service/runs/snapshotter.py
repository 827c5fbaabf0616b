"""Has one run's snapshots taken, and lets go of what they make superfluous."""

import asyncio
import logging
import time

from gradwire.errors import GradwireError
from gradwire.v1.worker_service_pb2 import WorkerCommand, WorkerSnapshotRun

from trainer_service.config import SnapshotPolicy
from trainer_service.fleet.worker import Reply, Worker
from trainer_service.runs.journal_writer import Journal
from trainer_service.runs.recovery import DIED, command
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
        self._sent_seq_id = 0  # Last operation sent.
        self._loaded_seq_id = 0  # One that a snapshot must follow soon.

    @property
    def busy(self) -> bool:
        """Whether one is being taken."""
        return self._task is not None

    def sent(self, kind: str, seq_id: int) -> None:
        """An operation was sent to the worker: has a snapshot taken right behind it, if one is due."""
        self._sent_seq_id = seq_id
        if kind == "load_state":
            # What was loaded may be overwritten or deleted before it is needed again.
            self.take_soon(seq_id)
        elif self._clock.operation(kind) and not self.busy:
            self.take(seq_id)

    def take_soon(self, seq_id: int) -> None:
        """Has one taken behind the operation sent last, now or as soon as the one under way is done."""
        self._sent_seq_id = self._loaded_seq_id = seq_id
        if not self.busy:
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

    def worker_died(self) -> None:
        """The worker no longer holds the run; whoever restores it sees to what it had loaded."""
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
            if not isinstance(failure, GradwireError) or failure.reason not in DIED:
                logger.warning("No snapshot; the one before stays.", extra={"fields": fields | {"why": failure}})
        if self._loaded_seq_id > seq_id:
            # It came meanwhile.
            self.take(self._sent_seq_id)
        return failure is None
