"""Runs on disk: a folder each, with journal, snapshots and a lock; those an earlier trainer left included."""

import asyncio
import contextlib
import logging
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gradwire.errors import GradwireError, error

from trainer_service.adapter_path import copy_adapter
from trainer_service.config import Durability
from trainer_service.runs import journal
from trainer_service.runs.disk import has_no_room
from trainer_service.runs.journal import DamagedJournal, Record, Row, RunFolder
from trainer_service.runs.journal_writer import Journal, JournalWriter

logger = logging.getLogger(__name__)


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
        return (self.folder(run_id) / "adapter").absolute()

    def journal(self, run_id: str) -> Journal:
        """A run's journal, to be written."""
        durability = self._durability
        return Journal(self.folder(run_id), self._writer, sync=durability.sync, retention=durability.retention)

    async def write_down(self, record: Record, adapter: Path | None) -> None:
        """Makes a run's folder and journal, with a copy of the adapter it starts from, whole or not at all.

        Raises:
            FailedPreconditionError: STORAGE_FAILED.
        """
        path = self.folder(record.run_id)

        def make() -> RunFolder:
            path.mkdir(parents=True)
            folder = RunFolder(path)
            try:
                if adapter is not None:
                    copy_adapter(adapter, self.adapter_folder(record.run_id))
                journal.create(path, record, sync=self._durability.sync)
            except BaseException:
                folder.close()
                shutil.rmtree(path, ignore_errors=True)
                raise
            return folder

        try:
            self._held[record.run_id] = await asyncio.to_thread(make)
        except (OSError, sqlite3.Error) as exc:
            if isinstance(exc, GradwireError):
                raise
            text = f"The run could not be written down in {path.parent} ({exc}). Make room there and try again."
            raise error("STORAGE_FAILED", text) from exc

    def forget(self, run_id: str) -> None:
        """Removes the folder of a run that was not made after all."""
        if (held := self._held.pop(run_id, None)) is not None:
            held.close()
        shutil.rmtree(self.folder(run_id), ignore_errors=True)

    async def remove(self, run_id: str) -> None:
        """Removes a run's folder, of any size."""
        await asyncio.to_thread(shutil.rmtree, self.folder(run_id), ignore_errors=True)
        self._held.pop(run_id).close()

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


def stored_run_folders(runs_dir: Path) -> list[Path]:
    """Folders with a journal."""
    try:
        return sorted(folder for folder in runs_dir.iterdir() if (folder / journal.FILE_NAME).exists())
    except FileNotFoundError:
        return []


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
    if stored is None:
        # Its trainer died while it was being made, and nobody ever heard of it.
        shutil.rmtree(path, ignore_errors=True)
        folder.close()
    return stored


def _read_stored_run(folder: RunFolder) -> StoredRun | None:
    """What a run's journal says; None where it was never made."""
    with contextlib.closing(journal.connect(folder.path)) as db:
        if not journal.was_made(db):
            return None
        record = journal.read_record(db)
        _, last, first_undone = journal.seq_ids(db)
        undone: list[Row] = []
        while chunk := journal.read(db, undone[-1].seq_id if undone else first_undone - 1):
            undone += chunk
    return StoredRun(folder, record, last + 1, undone)
