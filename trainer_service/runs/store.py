"""Runs on disk: a folder each, with journal, snapshots and a lock; those an earlier trainer left included.

A run's folder is there whole or not at all: it is made aside and renamed into its place, and renamed away before it is
removed. What a trainer that was killed left aside, the next one clears.
"""

import asyncio
import contextlib
import logging
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gradwire.errors import GradwireError, error

from trainer_service.adapter_folders import copy_adapter
from trainer_service.config import Durability
from trainer_service.folders import alone, sync
from trainer_service.runs import journal
from trainer_service.runs.disk import has_no_room
from trainer_service.runs.journal import DamagedJournal, Record, Row, RunFolder
from trainer_service.runs.journal_writer import Journal, JournalWriter

logger = logging.getLogger(__name__)

_NEW = ".new-"
_TRASH = ".trash-"
_ADAPTER = "adapter"


@dataclass(frozen=True)
class StoredRun:
    """A run to be taken up.

    Attributes:
        folder: Its folder, now this process's.
        record: What it is.
        next_seq_id: Number of its next new operation.
        undone: Its operations from the first without outcome on.
    """

    folder: RunFolder
    record: Record
    next_seq_id: int
    undone: list[Row]


class RunStore:
    """The folders of a trainer's runs. Several trainers may share one; a run's folder is one trainer's.

    Args:
        runs_dir: Where they are.
        writer: Writes their journals.
        durability: How they are kept.
    """

    def __init__(self, runs_dir: Path, writer: JournalWriter, durability: Durability) -> None:
        self._runs_dir = runs_dir
        self._writer = writer
        self._durability = durability
        self._held: dict[str, RunFolder] = {}

    def folder(self, run_id: str) -> Path:
        """A run's folder."""
        return self._runs_dir / run_id

    def adapter_folder(self, run_id: str) -> Path:
        """Where a run has a copy of the adapter it started from: what its caller named may change or go, and a run is
        restored from what it was."""
        return (self.folder(run_id) / _ADAPTER).absolute()

    def journal(self, run_id: str) -> Journal:
        """A run's journal, to be written."""
        durability = self._durability
        return Journal(self.folder(run_id), self._writer, sync=durability.sync, retention=durability.retention)

    async def write_down(self, record: Record, adapter: Path | None) -> Path:
        """Makes a run's folder and journal, with a copy of the adapter it starts from.

        Returns:
            Where the folder is until it is published; the next trainer removes one that was not.

        Raises:
            FailedPreconditionError: STORAGE_FAILED.
        """
        path = self._runs_dir / f"{_NEW}{record.run_id}"

        def make() -> RunFolder:
            self._runs_dir.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as undo:
                # Before it is locked, a trainer that starts would clear it.
                with alone(self._runs_dir):
                    path.mkdir()
                    undo.callback(shutil.rmtree, path, ignore_errors=True)
                    folder = RunFolder(path)
                undo.callback(folder.close)
                if adapter is not None:
                    copy_adapter(adapter, path / _ADAPTER)
                journal.create(path, record, sync=self._durability.sync)
                undo.pop_all()
            return folder

        with self._storing():
            self._held[record.run_id] = await asyncio.to_thread(make)
        return path

    async def publish(self, run_id: str) -> None:
        """A run that was written down is made: its folder takes its place.

        Raises:
            FailedPreconditionError: STORAGE_FAILED.
        """

        def move() -> None:
            self._held[run_id].move(self.folder(run_id))
            sync(self._runs_dir)

        with self._storing():
            await asyncio.to_thread(move)

    async def remove(self, run_id: str) -> None:
        """Removes a run's folder, of any size, published or not."""
        held = self._held.pop(run_id)

        def remove() -> None:
            with contextlib.suppress(OSError):
                held.move(self._runs_dir / f"{_TRASH}{run_id}")
            shutil.rmtree(held.path, ignore_errors=True)
            held.close()

        await asyncio.to_thread(remove)

    def clear(self) -> None:
        """Removes what trainers that were killed left of runs half made or half removed."""
        for left in [*self._runs_dir.glob(f"{_NEW}*"), *self._runs_dir.glob(f"{_TRASH}*")]:
            # Another trainer has it in hand, or it is gone meanwhile.
            with contextlib.suppress(OSError):
                with alone(self._runs_dir):
                    folder = RunFolder(left)
                shutil.rmtree(left, ignore_errors=True)
                folder.close()

    def open_all(self, wanted: Callable[[Record], bool]) -> list[StoredRun]:
        """Takes hold of the runs there are, oldest first, but for those others hold and those not wanted.

        Raises:
            OSError: The disk is so full that a run's journal cannot be opened.
        """
        found: list[StoredRun] = []
        for path in stored_run_folders(self._runs_dir):
            run = open_stored_run(path)
            if run is not None and not wanted(run.record):
                run.folder.close()
            elif run is not None:
                self._held[run.record.run_id] = run.folder
                found.append(run)
        return sorted(found, key=lambda run: run.record.created_s)

    async def close(self) -> None:
        """Writes what is left to write, and lets go of every folder."""
        await self._writer.close()
        for held in self._held.values():
            held.close()

    @contextlib.contextmanager
    def _storing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as exc:
            if isinstance(exc, GradwireError):
                raise
            text = f"The run could not be written down in {self._runs_dir} ({exc}). Make room there and try again."
            raise error("STORAGE_FAILED", text) from exc


def stored_run_folders(runs_dir: Path) -> list[Path]:
    """Folders of runs, by name."""
    found = runs_dir.glob(f"*/{journal.FILE_NAME}")
    return sorted(file.parent for file in found if not file.parent.name.startswith((_NEW, _TRASH)))


def open_stored_run(path: Path) -> StoredRun | None:
    """A run; None where another trainer holds it, or where it cannot be read, which is told and left as it is.

    Raises:
        OSError: The disk is so full that it cannot be opened.
    """
    try:
        folder = RunFolder(path)
    except BlockingIOError:
        return None
    except OSError as exc:
        logger.error("A run cannot be read.", extra={"fields": {"folder": path, "why": exc}})
        return None
    try:
        try:
            stored = _read_stored_run(folder)
        except (sqlite3.Error, OSError):
            # Opening a journal may take a little room, which may have been there a moment too late.
            if has_no_room(path):
                journal.spend_reserve(path)
            stored = _read_stored_run(folder)
    except (DamagedJournal, sqlite3.Error, OSError) as exc:
        folder.close()
        if has_no_room(path) and not isinstance(exc, DamagedJournal):
            # Not passed over: its client would take it for gone.
            raise OSError(
                f"{path} cannot be opened, since its disk is full ({exc}); make room and start again"
            ) from exc
        logger.error("A run's journal is damaged; it is left as it is.", extra={"fields": {"folder": path, "why": exc}})
        return None
    return stored


def _read_stored_run(folder: RunFolder) -> StoredRun:
    with contextlib.closing(journal.connect(folder.path)) as db:
        record = journal.read_record(db)
        _, last, first_undone = journal.seq_ids(db)
        undone: list[Row] = []
        while chunk := journal.read(db, undone[-1].seq_id if undone else first_undone - 1):
            undone += chunk
    return StoredRun(folder, record, last + 1, undone)
