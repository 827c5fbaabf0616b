"""Group commit: one thread writes the journals of all runs, and operations that arrive together share a commit.

The event loop never waits for a disk. What arrives while the thread commits becomes the next commit; an idle journal
therefore writes at once, and a busy one writes rarely, without a timer.
"""

import asyncio
import contextlib
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from errno import ENOSPC
from pathlib import Path
from types import MappingProxyType

from gradwire.errors import GradwireError, error
from gradwire.v1.trainer_service_pb2 import TrainResponse

from trainer_service.config import Retention, Sync
from trainer_service.executing import remove_note
from trainer_service.runs import journal
from trainer_service.runs.journal_contents import Contents
from trainer_service.runs.operation import Operation

logger = logging.getLogger(__name__)

Write = Callable[[sqlite3.Connection], object]
Written = Callable[[GradwireError | None], object]
"""Gets None once the write is on disk, or STORAGE_FAILED."""


@dataclass(frozen=True)
class _Entry:
    journal: "Journal"
    write: Write
    written: Written
    append: int = 0
    """It is the operation of this seq_id, which must not be written if one before it was not."""
    outcome_of: int = 0
    """It is the outcome of the operation of this seq_id, and void if that was not written."""
    resume: bool = False
    """It is the first operation after those that failed."""
    size_bytes: int = 0
    """Size of an operation."""
    prunes: bool = False
    """It deletes operations."""
    keep: bool = False
    """It is small and must not be lost: without room it waits, and is written before anything else."""


class JournalWriter:
    """The writing thread. Made and closed on the event loop that its callbacks run on."""

    def __init__(self) -> None:
        self._entries: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.commits = 0
        """Transactions written."""
        self.commit_s = 0.0
        """Time spent writing them."""

    def submit(self, entry: _Entry) -> None:
        """Queues an entry; entries of one journal are written, and called back, in order."""
        if self._thread is None:
            self._loop = asyncio.get_running_loop()
            # A daemon: nothing that is unwritten when the process ends was acknowledged.
            self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
            self._thread.start()
        self._entries.put(entry)

    async def close(self) -> None:
        """Ends the thread once the queue is written."""
        if self._thread is not None:
            self._entries.put(None)
            await asyncio.to_thread(self._thread.join)
            self._thread = None

    def _run(self) -> None:
        open_ = True
        while open_:
            entries = [self._entries.get()]
            while not self._entries.empty():
                entries.append(self._entries.get())
            open_ = None not in entries
            by_journal: dict[Journal, list[_Entry]] = {}
            for entry in entries:
                if entry is not None:
                    by_journal.setdefault(entry.journal, []).append(entry)
            done: list[tuple[Written, GradwireError | None]] = []
            for each, its_entries in by_journal.items():
                start = time.perf_counter()
                done += zip((entry.written for entry in its_entries), each.commit(its_entries), strict=True)
                self.commits += 1
                self.commit_s += time.perf_counter() - start
            assert self._loop is not None
            try:
                self._loop.call_soon_threadsafe(_call_back, done)
            except RuntimeError:
                return  # The loop is closed: this process is ending.


def _call_back(done: list[tuple[Written, GradwireError | None]]) -> None:
    for written, failure in done:
        written(failure)


class Journal:
    """The writing end of one run's journal. For the event loop, except `commit`.

    Args:
        folder: The run's.
        writer: The thread that writes it.
        sync: See journal.py.
        retention: What `prune` keeps.
    """

    def __init__(self, folder: Path, writer: JournalWriter, *, sync: Sync, retention: Retention) -> None:
        self.folder = folder
        self.retention = retention
        self._writer = writer
        self._sync: Sync = sync
        self._db: sqlite3.Connection | None = None  # The writer's thread alone uses it.
        self._contents: Contents | None = None  # The same.
        self._file_id: tuple[int, int] | None = None  # The writer's too: of the file it writes.
        self._gone = False  # Whether that file was no longer in its place at the last attempt.
        self._reserve_spent = False  # The writer's too.
        # The writer's: operations that could not be written, since when none behind them may be.
        self._unwritten: frozenset[int] = frozenset()
        self._owed: list[Write] = []  # The writer's: what waits for room, in order.
        self._appending = 0
        self._readers = 0
        self._failing = False
        self._doubtful = False  # Whether the last operation could not be written.

    def has_room(self, operation: Operation) -> bool:
        """Whether an operation can be expected to be written down: the ones before it were, and there is room. It may
        fail all the same."""
        if self._doubtful or self._reserve_spent:
            return False
        try:
            return journal.has_room(self.folder, len(operation.encoded))
        except OSError:
            return False

    def append(self, operation: Operation, digest: bytes, written: Written) -> None:
        """Writes an operation down.

        Args:
            operation: The next one of the run.
            digest: Its digest.
            written: Gets STORAGE_FAILED if it could not be written. Every later operation that was appended before
                this call is then refused too, so that the journal never has a gap.
        """
        received_s = time.time()
        if self._failing and self._appending:
            self._doubtful = True
            failure = _refused(operation.seq_id, "an operation before it failed so", gone=self._gone)
            asyncio.get_running_loop().call_soon(written, failure)
            return
        resume, self._failing = self._failing, False
        self._appending += 1

        def insert(db: sqlite3.Connection) -> None:
            journal.insert_operation(db, operation, digest, received_s=received_s, contents=self._contents)

        def done(failure: GradwireError | None) -> None:
            self._appending -= 1
            self._doubtful = failure is not None
            if failure is not None:
                failure = _refused(operation.seq_id, failure.message, gone=self._gone)
                self._failing = True
            written(failure)

        size_bytes = len(operation.encoded)
        self._writer.submit(_Entry(self, insert, done, append=operation.seq_id, resume=resume, size_bytes=size_bytes))

    def owe(self, write: Write, written: Callable[[], object]) -> None:
        """Writes something small that must not be lost, if need be into the reserved room. If even that is gone it
        waits, and is written before anything else. `written` is called in either case."""
        self._owe(write, written)

    def _owe(self, write: Write, written: Callable[[], object], *, outcome_of: int = 0) -> None:
        self._writer.submit(_Entry(self, write, lambda failure: written(), keep=True, outcome_of=outcome_of))

    def record(
        self,
        seq_id: int,
        response: TrainResponse,
        answer: bytes,
        *,
        step: int,
        written: Callable[[], object],
        reported: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Writes an outcome down, behind its operation, or not at all if that could not be written. With a full disk it
        is kept and written with the next write; if the trainer dies before that, a replay executes the operation once
        more."""

        def insert(db: sqlite3.Connection) -> None:
            contents = self._contents
            journal.insert_outcome(db, seq_id, response, answer, step=step, reported=reported, contents=contents)

        self._owe(insert, written, outcome_of=seq_id)

    def write(self, write: Write, written: Written = lambda failure: None) -> None:
        """Writes anything else, in order."""
        self._writer.submit(_Entry(self, write, written))

    def set_deaths(self, seq_id: int, deaths: int) -> None:
        """Remembers how many workers died while they executed an operation, for which the last one's note is removed: a
        trainer killed right now at most counts one death too few."""

        def write(db: sqlite3.Connection) -> None:
            remove_note(self.folder)
            journal.set_deaths(db, seq_id, deaths)

        self.write(write)

    @property
    def being_read(self) -> bool:
        """Whether somebody reads it, so that nothing may be pruned."""
        return self._readers > 0

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Keeps the journal's content and the snapshots during the block; the next snapshot prunes again."""
        self._readers += 1
        try:
            yield
        finally:
            self._readers -= 1

    def prune(self, *, snapshot_seq_id: int) -> None:
        """Deletes what neither recovery nor `retention` needs."""
        if not self.being_read:
            self._writer.submit(
                _Entry(
                    self,
                    lambda db: journal.prune(db, self.retention, snapshot_seq_id=snapshot_seq_id),
                    lambda failure: None,
                    prunes=True,
                )
            )

    async def flush(self) -> None:
        """Returns once everything submitted is on disk, or has failed."""
        await self._call(lambda db: None)

    async def close(self) -> None:
        """Closes the file; the next write opens it again."""
        await self._call(lambda db: None, close=True)

    async def _call(self, write: Write, *, close: bool = False) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def done(failure: GradwireError | None) -> None:
            if close:
                self._disconnect()
            if not future.done():
                future.set_result(None)

        self.write(write, done)
        await future

    def commit(self, entries: list[_Entry]) -> list[GradwireError | None]:
        """On the writer's thread: writes entries in one transaction. Returns the failure of each, or None."""
        try:
            return self._transaction(entries)
        except (sqlite3.Error, OSError) as exc:
            self._give_back(exc)
            if len(entries) > 1:
                # One by one: where a large operation has no room, a small outcome may.
                return [failure for entry in entries for failure in self.commit([entry])]
            [entry] = entries
            if journal.spend_reserve(self.folder):
                self._spend(True)
                if not entry.append:
                    return self.commit(entries)
            logger.error("Writing a journal failed.", extra={"fields": {"folder": self.folder, "error": exc}})
            if entry.append:
                self._unwritten |= {entry.append}
            if entry.keep:
                self._owed.append(entry.write)
            return [error("STORAGE_FAILED", str(exc))]

    def _transaction(self, entries: list[_Entry]) -> list[GradwireError | None]:
        results: list[GradwireError | None] = []
        unwritten = self._unwritten
        self._check_in_place()
        if self._db is None:
            self._db = journal.connect(self.folder, sync=self._sync)
            self._contents = Contents(self.folder, self._db, wait=self._sync == "full")
            # It may have been spent by a trainer that was killed before there was room again.
            self._spend(self._reserve_spent or not journal.has_reserve(self.folder))
        self._db.execute("BEGIN IMMEDIATE")
        for write in self._owed:
            write(self._db)
        for entry in entries:
            if entry.resume:
                unwritten = frozenset()
            blocked = bool(unwritten)
            if entry.append and not blocked and self._reserve_spent:
                # The reserve is for answers; one operation could take all of it.
                blocked = not journal.has_room(self.folder, entry.size_bytes)
            if (entry.append and blocked) or entry.outcome_of in unwritten:
                unwritten |= {entry.append} if entry.append else set()
                results.append(error("STORAGE_FAILED", "the disk is full"))
                continue
            entry.write(self._db)
            results.append(None)
        if self._contents is not None:
            self._contents.flush()
        self._db.execute("COMMIT")
        if self._contents is not None:
            self._contents.committed()
            if any(entry.prunes for entry in entries):
                self._contents.remove_unused()
        self._owed.clear()
        self._unwritten = unwritten
        if self._reserve_spent and any(
            entry.append and not refused for entry, refused in zip(entries, results, strict=True)
        ):
            # There is room again.
            self._spend(not journal.make_reserve(self.folder))
        return results

    def _check_in_place(self) -> None:
        """Raises OSError if the file was removed, moved or replaced: writes to it would be lost."""
        try:
            file_id = journal.file_id(self.folder)
            if self._file_id not in (None, file_id):
                raise FileNotFoundError("another file is in its place")
        except OSError:
            self._gone = True
            raise
        self._file_id, self._gone = file_id, False

    def _spend(self, spent: bool) -> None:
        self._reserve_spent = spent
        if self._db is not None:
            # Copying the log into the file takes room too, which is now kept for answers.
            self._db.execute(f"PRAGMA wal_autocheckpoint = {0 if spent else journal.CHECKPOINT_PAGES}")

    def _give_back(self, exc: sqlite3.Error | OSError) -> None:
        """Undoes a transaction that failed."""
        full = getattr(exc, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL or getattr(exc, "errno", 0) == ENOSPC
        if self._contents is not None and full:
            # Otherwise the transaction may turn out whole when the file is opened again, and needs its contents.
            self._contents.roll_back()
        if self._db is not None and full:
            try:
                # Not closed: that would copy the log into the file, and take the room that is left.
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                return
            except sqlite3.Error:
                logger.debug("Rolling back failed.", exc_info=True)
        # Opened anew next time: after an I/O error a connection may believe in pages that are not on disk.
        self._disconnect()

    def _disconnect(self) -> None:
        contents, self._contents = self._contents, None
        if contents is not None:
            contents.close()
        db, self._db = self._db, None
        if db is not None:
            try:
                db.close()
            except sqlite3.Error:
                logger.debug("Closing a journal failed.", exc_info=True)


def _refused(seq_id: int, why: str, *, gone: bool) -> GradwireError:
    if gone:
        return error(
            "STORAGE_FAILED",
            f"Operation {seq_id} was refused and had no effect: the run's journal is no longer in its place under the "
            "trainer's --data-dir. Put the folder back and continue with the next call, or load a checkpoint into a "
            "new run.",
        )
    return error(
        "STORAGE_FAILED",
        f"Operation {seq_id} was refused and had no effect: the trainer could not write it to its journal ({why}). "
        "Make room on the disk that holds the trainer's --data-dir, then continue: the run lost nothing.",
    )
