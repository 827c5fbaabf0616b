"""One run: its order, its journal, and the client that holds it.

An operation gets its place in the order, is written to the journal and sent to the worker (placement.py), and is
answered once it and its outcome are on disk. One that changes nothing but the worker's memory is sent while it is being
written. If it never gets to the disk, the run is restored without it, as it is when trainer or worker die before that.
"""

import asyncio
import sqlite3
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gradwire.errors import GradwireError, error
from gradwire.v1.run_pb2 import RUN_STATE_ACTIVE, RUN_STATE_LOST
from gradwire.v1.run_pb2 import Run as RunMessage
from gradwire.v1.trainer_service_pb2 import CreateRunRequest, TrainRequest, TrainResponse

from trainer_service.config import SnapshotPolicy
from trainer_service.fleet.worker import Worker
from trainer_service.runs import journal as journal_file
from trainer_service.runs.attachment import Attachment
from trainer_service.runs.frozen_weights import FrozenWeights
from trainer_service.runs.journal import Record, Row
from trainer_service.runs.journal_writer import Journal
from trainer_service.runs.lora_layout import tell_layout
from trainer_service.runs.observer import Observer
from trainer_service.runs.operation import Operation
from trainer_service.runs.placement import Placement
from trainer_service.runs.recovery import Restored
from trainer_service.runs.sequence import Answered, Entry, Sequence, conflict, error_response
from trainer_service.served_model import ServedModel

MAX_UNANSWERED_BYTES = 512 * 1024 * 1024
"""Memory that a run's unanswered operations may take; beyond it no more are read from the client."""


@dataclass(frozen=True)
class RunSettings:
    """What all runs of a trainer share."""

    worker: Worker
    observer: Observer
    base_model: ServedModel
    detach_grace_s: float
    """How long graphs are kept after the client has left."""
    max_in_flight: int
    """Operations a client may have in flight; see Sequence."""
    full: Callable[[], GradwireError | None]
    """Says why the worker has no room for another run; None if it has."""
    background: Callable[[Coroutine[Any, Any, object]], object]
    """Runs a coroutine that nobody waits for."""
    refuse: Callable[[Operation], GradwireError | None] = lambda operation: None
    """Says why the current caller's operation may not run now; None if it may."""
    snapshots: SnapshotPolicy = field(default_factory=SnapshotPolicy)
    max_frozen_weights: int = 4
    """As many sets of them as the worker keeps for a run."""


class Run:
    """Takes operations in order, has them executed, returns their answers.

    Args:
        record: What describes it on disk.
        journal: Where its operations are written.
        settings: What all runs share.
        next_seq_id: seq_id of its next new operation.
        live: Whether the worker holds it.
    """

    def __init__(
        self, record: Record, journal: Journal, settings: RunSettings, *, next_seq_id: int = 1, live: bool = False
    ) -> None:
        self.record = record
        self.run_id = record.run_id
        self.owner = record.owner
        self.create_request = CreateRunRequest.FromString(record.create_request)
        self.step = record.step
        self.attachment: Attachment | None = None
        self.used_s = time.monotonic()
        """When it last received or answered anything, by time.monotonic."""
        self._journal = journal
        self._settings = settings
        self._answered = asyncio.Event()  # Set at every answer; whoever waits for room clears it.
        self._drop_timer: asyncio.TimerHandle | None = None
        self._sequence = Sequence(min_retained_answers=settings.max_in_flight, next_seq_id=next_seq_id)
        self._deleted: GradwireError | None = None
        self._executing: set[asyncio.Future[bytes]] = set()
        self._suspended = False
        self.placement = Placement(
            record,
            journal,
            settings.worker,
            self,
            snapshots=settings.snapshots,
            frozen=FrozenWeights(max_wanted=settings.max_frozen_weights),
            full=settings.full,
            live=live,
            last_seq_id=next_seq_id - 1,
        )
        """Its place on the worker."""

    @property
    def folder(self) -> Path:
        """Where its journal and snapshots are."""
        return self._journal.folder

    @property
    def next_seq_id(self) -> int:
        """seq_id of the next new operation."""
        return self._sequence.next_seq_id

    @property
    def unanswered(self) -> int:
        """Operations received and not yet answered."""
        return self._sequence.unanswered

    @property
    def under_way(self) -> list[Entry]:
        """Operations received and not yet answered, in order."""
        return self._sequence.waiting

    @property
    def lost(self) -> bool:
        """Whether its state cannot be recovered."""
        return self.placement.lost is not None

    @property
    def idle(self) -> bool:
        """Whether nobody holds it and nothing of it is under way."""
        return self.attachment is None and not self.unanswered and self.placement.idle

    # ── operations ────────────────────────────────────────────────────────────────────────────────────────────────

    def submit(self, operation: Operation, answered: Answered) -> None:
        """Accepts an operation.

        Raises:
            GradwireError: The operation has no place in the order; see Sequence.receive.
        """
        self.used_s = time.monotonic()
        # A client that sends an operation, or repeats it, has no answer to it yet, whatever the message says.
        self._sequence.acknowledge(min(operation.request.acked_seq_id, operation.seq_id - 1))
        try:
            entry = self._sequence.receive(operation, answered)
        except GradwireError as exc:
            if exc.reason != "ANSWER_RELEASED":
                raise
            self._settings.background(self._answer_from_journal(operation, answered, exc))
            return
        if entry is not None:
            entry.received_s = time.perf_counter()
            entry.failure = self.placement.lost or operation.refusal or self._settings.refuse(operation)
            ahead = entry.failure is None and self.placement.may_send_ahead(entry) and self._journal.has_room(operation)
            self._journal.append(operation, entry.digest, lambda failure: self._journalled(entry, failure))
            if ahead:
                self.placement.send_ahead(entry)

    def take_up(self, rows: list[Row], *, executing: int) -> None:
        """Takes over operations that an earlier trainer received and that were not executed, in order.

        Args:
            rows: The first has no outcome.
            executing: seq_id of the one that the worker executed when it died with that trainer; 0 for none.
        """
        for row in rows:
            request = TrainRequest.FromString(row.request)
            entry = Entry(row.seq_id, row.digest, Operation(request, row.request), row.kind, deaths=row.deaths)
            entry.received_s, entry.taken_up = time.perf_counter(), True
            if row.reason is None:
                self._sequence.take_up(entry)
            else:
                # It was refused at once, so it has its answer; the failure's effect on the run is still to come.
                entry.failure = error(row.reason, "as answered before")
            self.placement.take_up(entry, died=row.seq_id == executing)

    def acknowledge(self, acked_seq_id: int) -> None:
        """Releases the answers that the client has."""
        self._sequence.acknowledge(acked_seq_id)

    async def execute(self, operation: Operation) -> TrainResponse:
        """Executes one operation and returns its answer. It continues if the caller stops waiting.

        Raises:
            GradwireError: As submit.
        """
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.submit(operation, lambda answer: None if future.done() else future.set_result(answer))
        self._executing.add(future)
        try:
            return TrainResponse.FromString(await future)
        finally:
            self._executing.discard(future)

    async def answer_of(self, seq_id: int, *, timeout_s: float) -> bytes | None:
        """The answer to a received operation, an encoded TrainResponse; None if none came in time.

        Raises:
            OutOfRangeError: SEQ_ID_GAP: it was not received.
            AbortedError: ANSWER_RELEASED: the journal no longer has it.
            UnavailableError: DRAINING: ask the next trainer.
            FailedPreconditionError: STORAGE_FAILED: the journal cannot be read.
        """
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        forget = self._sequence.wait_for(seq_id, lambda answer: None if future.done() else future.set_result(answer))
        if forget is None:
            row = await self.row(seq_id)
            if row is None or not row.answer:
                raise error(
                    "ANSWER_RELEASED",
                    f"Operation {seq_id} was executed, and its answer is no longer in the journal of {self.run_id}, "
                    "which keeps as much as --keep-bytes, --keep-operations and --keep-s say.",
                    expected=self.next_seq_id,
                    got=seq_id,
                )
            return row.answer
        if self._suspended and not future.done():
            forget()
            raise _left_to_the_next_trainer()
        self._executing.add(future)
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError:
            return None
        finally:
            forget()
            self._executing.discard(future)

    async def room(self, limit: int) -> None:
        """Returns once fewer than `limit` operations, of at most MAX_UNANSWERED_BYTES, wait for their answer; or once
        the run is suspended."""
        waiting = self._sequence
        while not self._suspended and (waiting.unanswered >= limit or waiting.unanswered_bytes > MAX_UNANSWERED_BYTES):
            self._answered.clear()
            await self._answered.wait()

    async def quiet(self) -> None:
        """Returns once no operation waits for its answer."""
        await self.room(1)

    def suspend(self) -> None:
        """Answers nothing more: unanswered operations stay in the journal for the next trainer."""
        self._suspended = True
        self._answered.set()
        for future in self._executing:
            if not future.done():
                future.set_exception(_left_to_the_next_trainer())

    def _journalled(self, entry: Entry, failure: GradwireError | None) -> None:
        """The operation is on disk, or could not be written."""
        entry.journalled_s = time.perf_counter()
        if self._deleted is not None:
            # What the worker has, placement.close answers.
            if not entry.sent_ahead:
                self._answer(entry, error_response(entry.seq_id, self._deleted))
            return
        if failure is not None:
            if entry.step_before is not None:
                self.step = min(self.step, entry.step_before)
            entry.failure, entry.unwritten = failure, True
            response = error_response(entry.seq_id, failure)
            operation, digest = entry.operation, entry.digest
            # Answered once its seq_id is recorded on disk, if there is any room at all.
            self._journal.owe(
                lambda db: journal_file.insert_refused(db, operation, digest, response),
                lambda: self._answer(entry, response),
            )
        elif entry.failure is not None and not entry.sent_ahead:
            self.failed(entry, entry.failure)
        if not entry.sent_ahead:
            self.placement.send(entry)
        elif failure is not None:
            self.placement.forget(entry)
        else:
            self.placement.written(entry)

    def done(self, entry: Entry, response: TrainResponse, encoded: memoryview) -> None:
        """The worker executed an operation."""
        entry.done_s = time.perf_counter()
        total_ms = (entry.done_s - entry.received_s) * 1000
        # The rest of the time went to the way there and back, and to the journal.
        response.transfer_ms = max(0.0, total_ms - response.queue_ms - response.execute_ms)
        # Of a repeated scalar field the last one counts, so the trainer appends its own values.
        ours = TrainResponse(seq_id=entry.seq_id, transfer_ms=response.transfer_ms).SerializeToString()
        answer = b"".join((encoded, ours))
        result = response.WhichOneof("result")
        if entry.sent_ahead:
            entry.step_before = self.step
        if result in ("optim_step", "load_state"):
            self.step = getattr(response, result).step
        self._record(entry, response, answer)

    def failed(self, entry: Entry, failure: GradwireError) -> None:
        """Answers an operation that will not be executed."""
        response = error_response(entry.seq_id, failure)
        self._record(entry, response, response.SerializeToString())

    def restored(self, found: Restored, waiting: list[Entry]) -> None:
        """It is back on the worker."""
        self._settings.observer.restored(self.run_id, found, waiting)

    def _record(self, entry: Entry, response: TrainResponse, encoded: bytes) -> None:
        """Answers an operation once its outcome is on disk."""
        if self._deleted is not None:
            self._answer(entry, response, encoded)
            return

        def written() -> None:
            # If the operation itself could not be written, it was refused instead.
            if not entry.unwritten:
                self._answer(entry, response, encoded)

        reported = dict(entry.operation.request.backward.metrics) if entry.kind == "backward" else {}
        if entry.memory_bytes:
            reported["memory_bytes:max"] = entry.memory_bytes
        self._journal.record(entry.seq_id, response, encoded, step=self.step, written=written, reported=reported)

    def _answer(self, entry: Entry, response: TrainResponse, encoded: bytes = b"") -> None:
        self.used_s = time.monotonic()
        self._settings.observer.answered(self.run_id, entry, response)
        self._sequence.answer(entry, encoded or response.SerializeToString())
        self._answered.set()

    async def _answer_from_journal(self, operation: Operation, answered: Answered, released: GradwireError) -> None:
        """Answers a repeat from the journal, if its answer is no longer in memory but still on disk."""
        exc = released
        try:
            row = await self.row(operation.seq_id)
        except GradwireError as failed:
            row, exc = None, failed
        if row is not None and row.answer:
            if row.digest == operation.digest():
                answered(row.answer)
                return
            exc = conflict(operation.seq_id, self.next_seq_id)
        answered(error_response(operation.seq_id, exc).SerializeToString())

    async def row(self, seq_id: int) -> Row | None:
        """An operation as the journal has it; None if it is no longer there.

        Raises:
            FailedPreconditionError: STORAGE_FAILED: it cannot be read.
            NotFoundError: RUN_NOT_FOUND: the run was deleted meanwhile.
        """

        def look() -> list[Row]:
            with closing(journal_file.connect(self.folder)) as db:
                return journal_file.read(self.folder, db, seq_id - 1, up_to=seq_id)

        if self._deleted is not None:
            return None
        try:
            with self._journal.kept():
                rows = await asyncio.to_thread(look)
        except (sqlite3.Error, OSError) as exc:
            if self._deleted is not None:
                raise self._deleted from exc
            text = f"Operation {seq_id} was executed, but its answer cannot be read: {exc}."
            raise error("STORAGE_FAILED", text) from exc
        return rows[0] if rows else None

    # ── the client ────────────────────────────────────────────────────────────────────────────────────────────────

    def attach(self, client_id: str) -> Attachment:
        """Attaches a client; the one attached before is told so. An unloaded run is restored."""
        if self.attachment is not None:
            text = f"Another client attached to {self.run_id}; this stream is over."
            self.attachment.take(error("ATTACH_SUPERSEDED", text, run_id=self.run_id))
        self._stop_drop_timer()
        self.used_s = time.monotonic()
        self.attachment = Attachment(client_id)
        self.placement.wake()
        return self.attachment

    def detach(self, attachment: Attachment) -> None:
        """The client's stream ended. Unless one attaches in time, the graphs that only it could use are dropped."""
        if self.attachment is not attachment:
            return
        self.attachment = None
        self.used_s = time.monotonic()
        loop = asyncio.get_running_loop()
        self._drop_timer = loop.call_later(self._settings.detach_grace_s, self.placement.drop_graphs)

    @asynccontextmanager
    async def settled(self) -> AsyncGenerator[int]:
        """Yields the seq_id up to which everything is answered and on disk, and keeps it there during the block.

        Raises:
            GradwireError: RUN_NOT_FOUND: the run was deleted while the block read it.
        """
        with self._journal.kept():
            up_to = self.placement.last_done_seq_id
            await self._journal.flush()
            try:
                # Without what could not be written.
                yield min(up_to, self.placement.last_done_seq_id)
            except (sqlite3.Error, OSError) as exc:
                if self._deleted is None:
                    raise
                raise self._deleted from exc

    async def delete(self) -> None:
        """Ends the run: its client's stream, its operations and its memory."""
        self._stop_drop_timer()
        gone = error("RUN_NOT_FOUND", f"{self.run_id} was deleted.", run_id=self.run_id)
        if self.attachment is not None:
            self.attachment.take(gone)
        await self._journal.flush()
        self._deleted = gone
        await self.placement.close(gone)
        await self._journal.close()

    def describe(self, *, layout: bool = False) -> RunMessage:
        """The run as a protocol message.

        Args:
            layout: Say what its adapter adapts, too.
        """
        message = RunMessage(
            run_id=self.run_id,
            base_model=self._settings.base_model.told(self.record.base_model),
            lora_rank=self.create_request.lora_rank,
            state=RUN_STATE_LOST if self.lost else RUN_STATE_ACTIVE,
            next_seq_id=self.next_seq_id,
            step=self.step,
            display_name=self.create_request.display_name,
            attached=self.attachment is not None,
            user_metadata=self.create_request.user_metadata,
        )
        if layout and (ready := self._settings.worker.ready) is not None:
            tell_layout(message, self.create_request, ready.lora_targets)
        message.created_at.FromDatetime(datetime.fromtimestamp(self.record.created_s, UTC))
        return message

    def _stop_drop_timer(self) -> None:
        if self._drop_timer is not None:
            self._drop_timer.cancel()
            self._drop_timer = None


def _left_to_the_next_trainer() -> GradwireError:
    text = "The trainer shut down before this was done. It is in the run's journal, and the next trainer does it."
    return error("DRAINING", text, retry_after_s=5.0)
