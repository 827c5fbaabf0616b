"""Runs as an earlier trainer left them on disk."""

import contextlib
import logging
import shutil
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from trainer_service.runs import journal
from trainer_service.runs.journal import DamagedJournal, Record, Row, RunFolder

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


def stored_run_folders(runs_dir: Path) -> list[Path]:
    """Folders with a journal."""
    try:
        return sorted(folder for folder in runs_dir.iterdir() if (folder / journal.FILE_NAME).exists())
    except FileNotFoundError:
        return []


def open_stored_run(path: Path) -> StoredRun | None:
    """A run; None where another trainer holds it, or where it cannot be read, which is told and left as it is."""
    try:
        folder = RunFolder(path)
    except BlockingIOError:
        return None
    except OSError as exc:
        logger.error("A run cannot be read.", extra={"fields": {"folder": path, "why": exc}})
        return None
    try:
        with contextlib.closing(journal.connect(path)) as db:
            if not journal.was_made(db):
                # Its trainer died while it was being made, and nobody ever heard of it.
                shutil.rmtree(path, ignore_errors=True)
                folder.close()
                return None
            record = journal.read_record(db)
            _, last, first_undone = journal.seq_ids(db)
            undone: list[Row] = []
            while chunk := journal.read(db, undone[-1].seq_id if undone else first_undone - 1):
                undone += chunk
    except (DamagedJournal, sqlite3.Error, OSError) as exc:
        logger.error("A run's journal is damaged; it is left as it is.", extra={"fields": {"folder": path, "why": exc}})
        folder.close()
        return None
    return StoredRun(folder, record, last + 1, undone)
