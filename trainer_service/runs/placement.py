"""A run on the worker: which operations are under way, how it is restored after a death, and when it makes room.

The worker may die at any point. The run is then restored from a snapshot and the journal (recovery.py), unfinished
operations are sent again in order, and callers wait a little longer for their answers.
"""

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections.abc import Callable
from typing import Protocol

from gradwire.errors import GradwireError, error
from gradwire.v1.trainer_service_pb2 import CreateRunRequest, TrainResponse
from gradwire.v1.worker_service_pb2 import WorkerCommand, WorkerDeleteRun, WorkerDropGraphs

from trainer_service.atomic_folders import settle
from trainer_service.config import SnapshotPolicy
from trainer_service.executing import remove_note
from trainer_service.fleet.calls import call
from trainer_service.fleet.worker import Died, Reply, Worker
from trainer_service.runs.disk import has_no_room
from trainer_service.runs.frozen_weights import FrozenWeights
from trainer_service.runs.journal import Record
from trainer_service.runs.journal_writer import Journal
from trainer_service.runs.recovery import NO_ROOM, Restored, fail_command, find_source, restore
from trainer_service.runs.sequence import Entry, poisoned
from trainer_service.runs.snapshots import Snapshotter, list_snapshots

logger = logging.getLogger(__name__)

MAX_DEATHS = 3
"""Deaths of the worker while it executed one operation after which that is given up; during a run's replay, the run."""
_MAX_DISK_FAILURES = 3
"""Failures to read a run's files after which the run is lost. With a full disk it waits instead."""
_DISK_RETRY_S = 1.0
"""Time between two attempts."""
_IN_MEMORY = frozenset(("forward", "forward_backward", "backward", "optim_step", "zero_grad", "cancel"))
"""Kinds of operations that change nothing but what the worker has in memory."""
_MEMORY_RETRY_S = 10.0
"""Time after which a worker that had no memory for a run is asked again, unless room is made earlier."""


class Owner(Protocol):
    """Receives the outcomes of operations."""

    def done(self, entry: Entry, response: TrainResponse, encoded: memoryview) -> None:
        """The worker executed it.

        Args:
            entry: The operation.
            response: Its answer.
            encoded: The same, as the worker encoded it.
        """
        ...

    def failed(self, entry: Entry, failure: GradwireError) -> None:
        """It will not be executed. The placement takes care of the failure's effect on the run."""
        ...

    def restored(self, found: Restored, waiting: list[Entry]) -> None:
        """The run is back on the worker; `waiting` are operations that go on with it."""
        ...


class Placement:
    """One run's place on the worker.

    Args:
        record: The run.
        journal: Its journal.
        worker: Executes its operations.
        owner: Gets the answers.
        snapshots: When they are due.
        frozen: Its frozen weights.
        full: Says why the worker has no room for another run; None if it has.
        live: Whether the worker holds the run already.
        last_seq_id: Last operation in the journal.
    """

    def __init__(
        self,
        record: Record,
        journal: Journal,
        worker: Worker,
        owner: Owner,
        *,
        snapshots: SnapshotPolicy,
        frozen: FrozenWeights,
        full: Callable[[], GradwireError | None],
        live: bool,
        last_seq_id: int,
    ) -> None:
        self._record = record
        self._run_id = record.run_id
        self._request = CreateRunRequest.FromString(record.create_request)
        self._journal = journal
        self._worker = worker
        self._owner = owner
        self._full = full
        self.frozen = frozen
        """Those that the worker has, and those that go back to it with the run."""
        self.live = live
        """Whether the worker holds the run, so that operations can be sent."""
        self.has_place = True
        """Whether operations wait when the worker has no room. Those of a run that was unloaded because nobody used it
        are refused instead, until it is back."""
        self.lost: GradwireError | None = None
        """Why the run cannot be recovered."""
        self.not_before_s = 0.0
        """When to ask a worker again that had no memory for the run, by time.monotonic."""
        self._undone: dict[int, Entry] = {}  # In order.
        self._ahead: set[int] = set()  # Sent before they were on disk, and not known to be there yet.
        self._forgetting = False  # From `forget` until the run is back.
        self._last_seq_id = last_seq_id
        self._snapshotter = Snapshotter(record.run_id, journal, worker, snapshots)
        self._restoring: asyncio.Task[None] | None = None
        self.epoch = 0
        """Counts deaths of the worker."""
        self._replay_deaths = self._disk_failures = 0
        self._closed = False

    @property
    def on_worker(self) -> bool:
        """Whether the run occupies the worker, or is about to."""
        return self.live or self._restoring is not None

    @property
    def idle(self) -> bool:
        """Whether nothing of the run is under way."""
        return not (self._undone or self._ahead or self._restoring is not None or self._snapshotter.busy)

    @property
    def waiting(self) -> bool:
        """Whether operations wait for the run to be live."""
        return bool(self._undone) and not self.live

    @property
    def waits_for_room(self) -> bool:
        """Whether operations wait and the run is not being restored for them."""
        unfailed = any(entry.failure is None for entry in self._undone.values())
        return unfailed and not self.live and self._restoring is None and self._worker.ready is not None

    @property
    def last_done_seq_id(self) -> int:
        """Last operation before the unfinished ones."""
        return next(iter(self._undone), self._last_seq_id + 1) - 1

    def take_up(self, entry: Entry, *, died: bool) -> None:
        """Takes over an operation that an earlier trainer wrote to the journal; in order, before anything is sent.

        Args:
            entry: The operation.
            died: Whether the worker executed it when it died, and the trainer did not live to count that.
        """
        self._undone[entry.seq_id] = entry
        if died:
            self._count_death(entry)

    def send(self, entry: Entry) -> None:
        """Sends an operation that is on disk, or has the run restored for it. Called in order."""
        self._undone[entry.seq_id] = entry
        self._last_seq_id = entry.seq_id
        if self.live:
            self._send(entry)
        else:
            self.wake()

    def may_send_ahead(self, entry: Entry) -> bool:
        """Whether an operation may be sent before it is on disk: all before it were sent, and if it never gets there,
        the worker can be made to forget it, and nobody else will have seen what it did."""
        if not self.live or entry.kind not in _IN_MEMORY or self._last_seq_id != entry.seq_id - 1:
            return False
        return not self._snapshotter.may_follow(entry.kind)

    def send_ahead(self, entry: Entry) -> None:
        """Sends an operation that is not on disk yet. `written` or `forget` follows."""
        entry.sent_ahead = True
        self._ahead.add(entry.seq_id)
        self.send(entry)

    def written(self, entry: Entry) -> None:
        """An operation that was sent ahead is on disk."""
        entry.sent_ahead = False
        self._ahead.discard(entry.seq_id)

    def forget(self, entry: Entry) -> None:
        """An operation that was sent ahead is not on disk and never will be: has the run restored as it was before."""
        self.written(entry)
        self._undone = dict(sorted({**self._undone, entry.seq_id: entry}.items()))
        if self.live:
            self.live, self._forgetting = False, True
            # What it still answers is of a state that is gone.
            self.epoch += 1
            self._snapshotter.worker_died()
            self._take_off()
        self.wake()

    def wake(self) -> None:
        """Restores the run onto the worker, if there is one and it does not hold the run."""
        if self.lost is not None:
            self._give_up(self.lost)
        elif not (self.live or self._closed or self._restoring is not None or self._worker.ready is None):
            if (full := self._full()) is not None:
                self._no_room(full)
                return
            task = asyncio.get_running_loop().create_task(self._restore(), name=f"restore-{self._run_id}")
            self._restoring = task
            task.add_done_callback(self._restored)

    def worker_died(self) -> None:
        """Notes that what the worker held is gone."""
        self.live = False
        self.epoch += 1
        self.frozen.worker_died()
        self._snapshotter.worker_died()

    async def settled(self) -> None:
        """Returns once the run is not being restored, whether or not it was."""
        while self._restoring is not None:
            await asyncio.wait({self._restoring})

    def drop_graphs(self) -> None:
        """Drops the graphs that the worker keeps for the run."""
        if self.live:
            self._worker.submit(WorkerCommand(run_id=self._run_id, drop_graphs=WorkerDropGraphs()), lambda _: None)

    async def unload(self, *, keep_place: bool = False) -> bool:
        """Takes the run off the worker; its state stays on disk.

        Args:
            keep_place: See has_place.

        Returns:
            Whether it was unloaded; a run in use stays.
        """
        if not (self.live and self.idle):
            return False
        seq_id, epoch = self._last_seq_id, self.epoch
        newest = next(iter(list_snapshots(self._journal.folder)), None)
        at_its_beginning = seq_id == 0 and not self._record.parent_run_id
        if not at_its_beginning and (newest is None or newest.seq_id != seq_id):
            # Waited for, not awaited: the task is cancelled if the run is deleted meanwhile.
            await asyncio.wait({self._snapshotter.take(seq_id)})
            newest = next(iter(list_snapshots(self._journal.folder)), None)
            if newest is None or newest.seq_id != seq_id:
                return False
        if not self.idle or self._last_seq_id != seq_id or self.epoch != epoch:
            return False
        self.live, self.has_place = False, keep_place
        self._take_off()
        await self._journal.close()
        return True

    async def let_go(self) -> None:
        """Releases the run when trainer and worker stop; it stays on disk as it is."""
        self._closed = True
        if self._restoring is not None:
            self._restoring.cancel()
            await asyncio.gather(self._restoring, return_exceptions=True)
        self._snapshotter.cancel()
        # A worker that had to be killed has left one; the next trainer would blame the operation for that.
        await asyncio.to_thread(remove_note, self._journal.folder)
        await self._journal.close()

    async def close(self, gone: GradwireError) -> None:
        """Ends a deleted run: what waits fails with `gone`, except what the worker has already begun."""
        self._closed = True
        self._snapshotter.cancel()
        known = self.live or self._restoring is not None
        if not self.live:
            self._give_up(gone)
        self.live = False
        if self._restoring is not None:
            self._restoring.cancel()
        if known:
            # If the worker dies instead, the run's memory is free as well.
            with contextlib.suppress(Died):
                await call(self._worker, WorkerCommand(run_id=self._run_id, delete_run=WorkerDeleteRun()))
        self._give_up(gone)

    # ── inside ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _send(self, entry: Entry) -> None:
        if entry.failure is not None:
            self._send_failure(entry, entry.failure)
            return
        entry.attempts += 1
        epoch = self.epoch
        self._worker.submit(
            WorkerCommand(run_id=self._run_id),
            lambda outcome: self._delivered(entry, outcome, epoch),
            request=entry.operation.encoded,
        )
        if entry.sent_ahead:
            self._snapshotter.sent_ahead(entry.kind, entry.seq_id)
        else:
            self._snapshotter.sent(entry.kind, entry.seq_id)

    def _delivered(self, entry: Entry, outcome: Reply | Died, epoch: int) -> None:
        if isinstance(outcome, Died):
            # It stays undone. Only a death during its own execution counts against it.
            if outcome.executing:
                entry.deaths_s.append(time.perf_counter())
                self._count_death(entry)
            else:
                entry.attempts -= 1
            if outcome.because is not None:
                self._fail(entry, outcome.because)
        elif epoch != self.epoch:
            entry.attempts -= 1  # See forget.
        elif self._undone.pop(entry.seq_id, None) is not None:
            response = outcome.event.response
            if entry.operation.request.save_weights_for_sampler.ephemeral and not response.HasField("error"):
                self.frozen.made([entry.seq_id])
            entry.memory_bytes = outcome.event.counters.get("gradwire_worker_memory_bytes", 0.0)
            self._owner.done(entry, response, outcome.encoded_response)

    def _count_death(self, entry: Entry) -> None:
        entry.deaths += 1
        self._journal.set_deaths(entry.seq_id, entry.deaths)

    def _send_failure(self, entry: Entry, failure: GradwireError) -> None:
        request, seq_id = entry.operation.request, entry.seq_id
        sent = fail_command(self._run_id, request, seq_id=seq_id, kind=entry.kind, reason=failure.reason)
        if sent is None:
            self._undone.pop(seq_id, None)
            return

        def delivered(outcome: Reply | Died) -> None:
            if not isinstance(outcome, Died):
                self._undone.pop(seq_id, None)

        self._worker.submit(sent, delivered)

    def _fail(self, entry: Entry, failure: GradwireError) -> None:
        """Answers an operation without executing it; the failure's effect on the run is still to be sent."""
        if entry.failure is None:
            entry.failure = failure
            self._owner.failed(entry, failure)

    def _give_up(self, failure: GradwireError) -> None:
        for entry in list(self._undone.values()):
            self._fail(entry, failure)
        if self._closed or self.lost is not None:
            self._undone.clear()

    def _no_room(self, why: GradwireError) -> None:
        if not self.has_place:
            self._give_up(why)
        elif self.waits_for_room:
            logger.warning(
                "A run waits for room on the worker.", extra={"fields": {"run_id": self._run_id, "why": why}}
            )

    def _take_off(self) -> None:
        """Has the worker unload the run, or the half of it that it holds."""
        self._worker.submit(WorkerCommand(run_id=self._run_id, delete_run=WorkerDeleteRun(unload=True)), lambda _: None)

    async def _restore(self) -> None:
        while True:
            try:
                await self._try_restore()
                return
            except GradwireError:
                raise
            except (sqlite3.Error, OSError) as exc:
                # Only failures with room on the disk count: room may be made. Nor those of a disk that took no writes
                # when it said that it had room.
                self._disk_failures += not (self._forgetting or has_no_room(self._journal.folder))
                if self._disk_failures >= _MAX_DISK_FAILURES:
                    raise
                fields = {"run_id": self._run_id, "why": exc}
                logger.error("A run cannot be restored until its disk can be read.", extra={"fields": fields})
            self._take_off()
            await asyncio.sleep(_DISK_RETRY_S)

    async def _try_restore(self) -> None:
        epoch = self.epoch
        # So that the journal has every outcome that came, and their callbacks were called.
        await self._journal.flush()
        up_to = self.last_done_seq_id
        # No worker holds the run, so a half-written snapshot was left by one that died.
        await asyncio.to_thread(settle, self._journal.folder / "snapshots")
        source = await asyncio.to_thread(find_source, self._journal.folder, forked=bool(self._record.parent_run_id))
        if (asked := self.frozen.oldest_asked) is not None:
            source = source.reaching(asked)
        refreeze = self.frozen.wanted
        restored = await restore(
            self._worker,
            self._run_id,
            self._request,
            source,
            up_to=up_to,
            run_folder=self._journal.folder,
            refreeze=refreeze,
        )
        if self.epoch != epoch:
            return
        for entry in self._undone.values():
            if entry.deaths >= MAX_DEATHS:
                self._fail(entry, poisoned(entry, self._run_id))
        self._replay_deaths = self._disk_failures = 0
        self.frozen.made(restored.frozen)
        self.live, self.has_place, self._forgetting = True, True, False
        if restored.loaded:
            self._snapshotter.take_soon(up_to)
        waiting = list(self._undone.values())
        self._owner.restored(restored, waiting)
        for entry in waiting:
            self._send(entry)
        fields = {"run_id": self._run_id, "snapshot": restored.snapshot_seq_id, "replayed": restored.replayed}
        fields |= {"load_s": round(restored.load_s, 3), "replay_s": round(restored.replay_s, 3)}
        logger.info("Run restored.", extra={"fields": fields})

    def _restored(self, task: "asyncio.Task[None]") -> None:
        self._restoring = None
        exc = None if task.cancelled() else task.exception()
        if not self.live and not self._closed:
            self._take_off()
        if exc is None:
            if self.waiting and any(entry.failure is None for entry in self._undone.values()):
                self.wake()
            return
        if isinstance(exc, Died) and exc.because is not None:
            exc = exc.because
        if isinstance(exc, GradwireError) and exc.reason in NO_ROOM:
            self.not_before_s = time.monotonic() + _MEMORY_RETRY_S
            self._no_room(exc)
            return
        if isinstance(exc, Died):
            self._replay_deaths += exc.executing
            if self._replay_deaths < MAX_DEATHS:
                self.wake()
                return
            exc = error("RUN_LOST", f"the worker died {MAX_DEATHS} times while it replayed {self._run_id}'s journal.")
        if not isinstance(exc, GradwireError):
            logger.error("Restoring a run failed.", extra={"fields": {"run_id": self._run_id}}, exc_info=exc)
        text = f"{self._run_id} is lost: {exc} Restart the trainer to try again, or create a new run."
        self.lost = error("RUN_LOST", text, run_id=self._run_id)
        logger.error("Run lost.", extra={"fields": {"run_id": self._run_id, "why": str(exc)}})
        self._give_up(self.lost)
