"""Runs on disk: a folder each, with journal, snapshots and a lock; including those an earlier trainer left.

A run's folder exists whole or not at all: it is made under another name and renamed into place, and renamed away before
it is removed. What a killed trainer left half made, the next one clears.
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
from trainer_service.atomic_folders import alone, sync
from trainer_service.config import Durability
from trainer_service.executing import noted_operation
from trainer_service.runs import journal
from trainer_service.runs.disk import has_no_room
from trainer_service.runs.journal import DamagedJournal, Record, Row
from trainer_service.runs.journal_writer import Journal, JournalWriter
from trainer_service.runs.run_folder import RunFolder
from trainer_service.runs.snapshots import list_snapshots, remove_snapshots_after

logger = logging.getLogger(__name__)

_NEW = ".new-"
_TRASH = ".trash-"
_ADAPTER = "adapter"


@dataclass(frozen=True)
class StoredRun:
    """A run to be taken over.

    Attributes:
        folder: Its folder, held by this process.
        record: What describes it.
        next_seq_id: seq_id of its next new operation.
        undone: Its operations, beginning with the first that has no outcome.
        executing: seq_id of the operation that the worker executed when it died with the trainer; 0 for none.
    """

    folder: RunFolder
    record: Record
    next_seq_id: int
    undone: list[Row]
    executing: int


class RunStore:
    """The folders of a trainer's runs. Several trainers may share runs_dir; each run's folder belongs to one of them.

    Args:
        runs_dir: Holds the folders.
        writer: Writes the journals.
        durability: How runs are kept.
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
        """Where a run keeps its copy of the adapter it started from: the original may change or disappear, and the run
        is restored from the copy."""
        return (self.folder(run_id) / _ADAPTER).absolute()

    def journal(self, run_id: str) -> Journal:
        """The writing end of a run's journal."""
        durability = self._durability
        return Journal(self.folder(run_id), self._writer, sync=durability.sync, retention=durability.retention)

    async def write_down(self, record: Record, adapter: Path | None) -> Path:
        """Makes a run's folder and journal, with a copy of the adapter it starts from.

        Returns:
            Where the folder is until it is published; the next trainer removes one that never was.

        Raises:
            FailedPreconditionError: STORAGE_FAILED.
        """
        path = self._runs_dir / f"{_NEW}{record.run_id}"

        def make() -> RunFolder:
            self._runs_dir.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as undo:
                # Alone, since a trainer that starts would clear the folder before it is locked.
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
        """Moves the folder of a run that was written down, and is made, into its place.

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
        """Removes what killed trainers left of half-made or half-removed runs."""
        for left in [*self._runs_dir.glob(f"{_NEW}*"), *self._runs_dir.glob(f"{_TRASH}*")]:
            # It is in use by another trainer, or gone meanwhile.
            with contextlib.suppress(OSError):
                with alone(self._runs_dir):
                    folder = RunFolder(left)
                shutil.rmtree(left, ignore_errors=True)
                folder.close()

    def open_all(self, wanted: Callable[[Record], bool]) -> list[StoredRun]:
        """Takes hold of the wanted runs that no other trainer holds, oldest first.

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
        """Writes what is left to write, and releases every folder."""
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
    """A run; None if another trainer holds it, or if it cannot be read, which is logged and left as it is.

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
            # Opening a journal takes a little room; the reserve is there for that.
            if has_no_room(path):
                journal.spend_reserve(path)
            stored = _read_stored_run(folder)
    except (DamagedJournal, sqlite3.Error, OSError) as exc:
        folder.close()
        if has_no_room(path) and not isinstance(exc, DamagedJournal):
            # Not skipped: its client would believe that the run is gone.
            raise OSError(
                f"{path} cannot be opened because its disk is full ({exc}); make room and start again"
            ) from exc
        logger.error("A run's journal is damaged; it is left as it is.", extra={"fields": {"folder": path, "why": exc}})
        return None
    return stored


def _read_stored_run(folder: RunFolder) -> StoredRun:
    with contextlib.closing(journal.connect(folder.path)) as db:
        record = journal.read_record(db)
        snapshots = [snapshot.seq_id for snapshot in list_snapshots(folder.path)]
        if (lost := journal.take_up(folder.path, db, snapshots=snapshots)) is not None:
            logger.error(
                "A power cut took the contents of operations; the run is as it was before them.",
                extra={"fields": {"run_id": record.run_id, "seq_id": lost}},
            )
        _, last, first_undone = journal.seq_ids(db)
        remove_snapshots_after(folder.path, last)
        undone: list[Row] = []
        while chunk := journal.read(folder.path, db, undone[-1].seq_id if undone else first_undone - 1):
            undone += chunk
    return StoredRun(folder, record, last + 1, undone, executing=noted_operation(folder.path))
