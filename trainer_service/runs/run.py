"""One run: its order, its journal, and the client that holds it.

An operation gets its place, is written to the journal, is sent to the worker (placement.py), and is answered once its
outcome is in the journal too.
"""

import asyncio
import contextlib
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
from trainer_service.runs.journal import Record, Row
from trainer_service.runs.journal_writer import Journal
from trainer_service.runs.lora_layout import lora_layout
from trainer_service.runs.operation import Operation
from trainer_service.runs.placement import Placement
from trainer_service.runs.sequence import Answered, Entry, Sequence, conflict, error_response
from trainer_service.served_model import ServedModel

Observe = Callable[[str, TrainResponse], object]
"""Gets kind and answer of every operation, for metrics."""

MAX_UNANSWERED_BYTES = 512 * 1024 * 1024
"""Memory that a run's operations may take up until they are answered; no more are read from their client beyond it."""


@dataclass(frozen=True)
class RunSettings:
    """What all runs of a trainer share."""

    worker: Worker
    observe: Observe
    base_model: ServedModel
    detach_grace_s: float
    """How long graphs are kept after the client has gone."""
    max_in_flight: int
    """Operations a client may have in flight; see Sequence."""
    full: Callable[[], GradwireError | None]
    """Says why the worker has no room for one run more, if it has none."""
    background: Callable[[Coroutine[Any, Any, object]], object]
    """Runs what nobody waits for."""
    refuse: Callable[[Operation], GradwireError | None] = lambda operation: None
    """Says why an operation may not run now, for the current caller; None when it may."""
    snapshots: SnapshotPolicy = field(default_factory=SnapshotPolicy)


class Run:
    """Takes operations in order, has them executed, brings their answers back.

    Args:
        record: What it is.
        journal: Where it is written down.
        settings: What all runs share.
        next_seq_id: Number of its next new operation.
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
        """When it was last asked or answered anything, by time.monotonic."""
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
        """The number of the next new operation."""
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
        """Whether its state is gone."""
        return self.placement.lost is not None

    @property
    def idle(self) -> bool:
        """Whether nobody holds it and nothing of it is under way."""
        return self.attachment is None and not self.unanswered and self.placement.idle

    # ── operations ────────────────────────────────────────────────────────────────────────────────────────────────

    def submit(self, operation: Operation, answered: Answered) -> None:
        """Takes an operation in.

        Raises:
            GradwireError: The operation has no place in the order; see Sequence.receive.
        """
        self.used_s = time.monotonic()
        # Whoever sends an operation, again perhaps, has no answer to it, whatever the message says.
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
            self._journal.append(operation, entry.digest, lambda failure: self._journalled(entry, failure))

    def take_up(self, rows: list[Row]) -> None:
        """Operations that an earlier trainer received and whose worker had not done them, in order.

        Args:
            rows: The first has no outcome.
        """
        for row in rows:
            request = TrainRequest.FromString(row.request)
            entry = Entry(
                row.seq_id, row.digest, Operation(request, row.request), row.kind, attempts=max(0, row.attempts)
            )
            entry.received_s = time.perf_counter()
            if row.reason is None:
                self._sequence.take_up(entry)
            else:
                # Refused at once, so it has its answer; what its failure does is still to be done in its turn.
                entry.failure = error(row.reason, "as answered before")
            if row is rows[0] and row.attempts == 0:
                # The one being executed, for all we know, when whoever held the run died.
                entry.attempts = 1
            self.placement.take_up(entry)

    def acknowledge(self, acked_seq_id: int) -> None:
        """Lets go of answers the client has."""
        self._sequence.acknowledge(acked_seq_id)

    async def execute(self, operation: Operation) -> TrainResponse:
        """One operation and its answer. The operation goes on if the caller stops waiting.

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
        """The answer to an operation that was received, an encoded TrainResponse; None where none came in time.

        Raises:
            OutOfRangeError: SEQ_ID_GAP: it was not received.
            AbortedError: ANSWER_RELEASED: the journal no longer has it.
            UnavailableError: DRAINING: the next trainer will have it.
            FailedPreconditionError: STORAGE_FAILED: the journal cannot be read.
        """
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        forget = self._sequence.wait_for(seq_id, lambda answer: None if future.done() else future.set_result(answer))
        if forget is None:
            row = await self._row(seq_id)
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
        """Returns once fewer than `limit` operations wait for their answer, and at most MAX_UNANSWERED_BYTES of them,
        or none will be answered here."""
        waiting = self._sequence
        while not self._suspended and (waiting.unanswered >= limit or waiting.unanswered_bytes > MAX_UNANSWERED_BYTES):
            self._answered.clear()
            await self._answered.wait()

    async def quiet(self) -> None:
        """Returns once no operation waits for its answer."""
        await self.room(1)

    def suspend(self) -> None:
        """No operation will be answered any more: they stay in the journal, for the next trainer."""
        self._suspended = True
        self._answered.set()
        for future in self._executing:
            if not future.done():
                future.set_exception(_left_to_the_next_trainer())

    def _journalled(self, entry: Entry, failure: GradwireError | None) -> None:
        """The operation is on disk, or could not be written."""
        if self._deleted is not None:
            self._answer(entry, error_response(entry.seq_id, self._deleted))
            return
        if failure is not None:
            entry.failure = failure
            response = error_response(entry.seq_id, failure)
            operation, digest = entry.operation, entry.digest
            # Answered once its number is taken on disk, if there is any room at all.
            self._journal.owe(
                lambda db: journal_file.insert_refused(db, operation, digest, response),
                lambda: self._answer(entry, response),
            )
        elif entry.failure is not None:
            self.failed(entry, entry.failure)
        self.placement.send(entry)

    def done(self, entry: Entry, response: TrainResponse, encoded: bytes) -> None:
        """The worker executed an operation."""
        total_ms = (time.perf_counter() - entry.received_s) * 1000
        # What neither the wait in the worker nor the device took was the way there and back, and the journal.
        response.transfer_ms = max(0.0, total_ms - response.queue_ms - response.execute_ms)
        # Of a field that comes twice the last counts, so what the trainer adds goes behind what the worker said.
        encoded += TrainResponse(seq_id=entry.seq_id, transfer_ms=response.transfer_ms).SerializeToString()
        result = response.WhichOneof("result")
        if result in ("optim_step", "load_state"):
            self.step = getattr(response, result).step
        self._record(entry, response, encoded)

    def failed(self, entry: Entry, failure: GradwireError) -> None:
        """An operation will not be executed."""
        response = error_response(entry.seq_id, failure)
        self._record(entry, response, response.SerializeToString())

    def _record(self, entry: Entry, response: TrainResponse, encoded: bytes) -> None:
        """Answers an operation once what came of it is on disk."""
        if self._deleted is not None:
            self._answer(entry, response, encoded)
            return

        def written() -> None:
            self._answer(entry, response, encoded)

        reported = dict(entry.operation.request.backward.metrics) if entry.kind == "backward" else {}
        self._journal.record(entry.seq_id, response, encoded, step=self.step, written=written, reported=reported)

    def _answer(self, entry: Entry, response: TrainResponse, encoded: bytes = b"") -> None:
        self.used_s = time.monotonic()
        self._settings.observe(entry.kind, response)
        self._sequence.answer(entry, encoded or response.SerializeToString())
        self._answered.set()

    async def _answer_from_journal(self, operation: Operation, answered: Answered, released: GradwireError) -> None:
        """A repeat whose answer is no longer in memory gets it from the disk, if it is still there."""

        exc = released
        try:
            row = await self._row(operation.seq_id)
        except GradwireError as failed:
            row, exc = None, failed
        if row is not None and row.answer:
            if row.digest == operation.digest():
                answered(row.answer)
                return
            exc = conflict(operation.seq_id, self.next_seq_id)
        answered(error_response(operation.seq_id, exc).SerializeToString())

    async def _row(self, seq_id: int) -> Row | None:
        """An operation as the journal has it; None where it has it no longer.

        Raises:
            FailedPreconditionError: STORAGE_FAILED: it cannot be read.
        """

        def look() -> list[Row]:
            with closing(journal_file.connect(self.folder)) as db:
                return journal_file.read(db, seq_id - 1, up_to=seq_id)

        if self._deleted is not None:
            return None
        try:
            rows = await asyncio.to_thread(look)
        except (sqlite3.Error, OSError) as exc:
            text = f"Operation {seq_id} was executed, but its answer cannot be read: {exc}."
            raise error("STORAGE_FAILED", text) from exc
        return rows[0] if rows else None

    # ── the client ────────────────────────────────────────────────────────────────────────────────────────────────

    def attach(self, client_id: str) -> Attachment:
        """Takes hold of the run; who held it before is told. A run that was unloaded comes back for it."""
        if self.attachment is not None:
            text = f"Another client attached to {self.run_id}; this stream is over."
            self.attachment.take(error("ATTACH_SUPERSEDED", text, run_id=self.run_id))
        self._stop_drop_timer()
        self.used_s = time.monotonic()
        self.attachment = Attachment(client_id)
        self.placement.wake()
        return self.attachment

    def detach(self, attachment: Attachment) -> None:
        """The client's stream ended; if none comes back in time, what it alone could use goes."""
        if self.attachment is not attachment:
            return
        self.attachment = None
        self.used_s = time.monotonic()
        loop = asyncio.get_running_loop()
        self._drop_timer = loop.call_later(self._settings.detach_grace_s, self.placement.drop_graphs)

    @asynccontextmanager
    async def settled(self) -> AsyncGenerator[int]:
        """What was answered so far, up to the operation given, is on disk and stays there while the block lasts.

        Raises:
            GradwireError: RUN_NOT_FOUND: what the block read was deleted meanwhile.
        """
        with self._journal.kept():
            up_to = self.placement.last_done_seq_id
            await self._journal.flush()
            try:
                yield up_to
            except (sqlite3.Error, OSError) as exc:
                if self._deleted is None:
                    raise
                raise self._deleted from exc

    async def delete(self) -> None:
        """Ends the run: its client's stream, its operations, its memory and what it has on disk."""
        self._stop_drop_timer()
        gone = error("RUN_NOT_FOUND", f"{self.run_id} was deleted.", run_id=self.run_id)
        if self.attachment is not None:
            self.attachment.take(gone)
        await self._journal.flush()
        self._deleted = gone
        await self.placement.close(gone)
        await self._journal.close()

    def describe(self, *, layout: bool = False) -> RunMessage:
        """The run as the protocol tells it.

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
        ready = self._settings.worker.ready
        if layout and ready is not None and self.create_request.lora_rank:
            # A copy of an adapter that cannot be read is told when the run is restored from it.
            with contextlib.suppress(OSError, ValueError, KeyError):
                message.lora.CopyFrom(lora_layout(self.create_request, ready.lora_targets))
        message.created_at.FromDatetime(datetime.fromtimestamp(self.record.created_s, UTC))
        return message

    def _stop_drop_timer(self) -> None:
        if self._drop_timer is not None:
            self._drop_timer.cancel()
            self._drop_timer = None


def _left_to_the_next_trainer() -> GradwireError:
    text = "The trainer shut down before this was done. It is in the run's journal: the next trainer does it."
    return error("DRAINING", text, retry_after_s=5.0)
