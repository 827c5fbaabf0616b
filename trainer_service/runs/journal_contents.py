"""Large contents of a journal, beside its database: files that are only appended to.

In the database each content would be written twice, once to the log and once to the file, page by page, with sums over
every page: three to eight times the processor time. A file is filled up to some size, then the next one is begun; it is
removed once nothing in it is needed. The database's table `contents` says where a content lies. Its row is committed
after the content was written, so that a killed process leaves at most a tail that no row speaks of, which the next
writer overwrites. A power cut may leave a row whose content never reached the disk, where commits are not waited for
either: its digest tells.
"""

import contextlib
import os
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path

import xxhash

from trainer_service.atomic_folders import sync

LARGE_BYTES = 64 * 1024
"""Size from which contents lie beside the database."""
SCHEMA = """
CREATE TABLE IF NOT EXISTS contents (
    seq_id INTEGER, part TEXT, file INTEGER NOT NULL, place INTEGER NOT NULL, size INTEGER NOT NULL,
    digest BLOB NOT NULL, PRIMARY KEY (seq_id, part)
) WITHOUT ROWID
"""
_FILE_BYTES = 64 * 1024 * 1024
"""Size at which another file is begun."""
_Row = tuple[int, str, int, int, int, bytes]
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class LostContentError(OSError):
    """A content is not in its file as it was written."""


def folder_of(run_folder: Path) -> Path:
    """Where a run's large contents are."""
    return run_folder / "contents"


class Contents:
    """The writing end. For the thread that writes the journal, within its transactions.

    Args:
        run_folder: The run's.
        db: Its journal, which has the table `contents`.
        wait: Wait for the disk at each `flush`.
    """

    def __init__(self, run_folder: Path, db: sqlite3.Connection, *, wait: bool) -> None:
        self._folder = folder_of(run_folder)
        self._db = db
        self._wait = wait
        self._file = -1
        self._number, self._end = self._last()
        self._committed = self._number, self._end

    def _last(self) -> tuple[int, int]:
        """Number and end of the file that is appended to, as the journal says."""
        query = "SELECT file, max(place + size) FROM contents WHERE file = (SELECT max(file) FROM contents)"
        number, end = self._db.execute(query).fetchone()
        return (1, 0) if number is None else (number, end)

    def write(self, seq_id: int, part: str, content: bytes) -> None:
        """Writes a content and its row.

        Raises:
            OSError: There is no room.
        """
        if self._end >= _FILE_BYTES:
            self.flush()
            self.close()
            self._number, self._end = self._number + 1, 0
        if self._file < 0:
            self._folder.mkdir(exist_ok=True)
            self._file = os.open(self._folder / f"{self._number:08d}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if self._wait:
                # A file that was synced is lost all the same if its name was not.
                sync(self._folder)
                sync(self._folder.parent)
        left = memoryview(content)
        while left:
            left = left[os.pwrite(self._file, left, self._end + len(content) - len(left)) :]
        row = (seq_id, part, self._number, self._end, len(content), xxhash.xxh3_128_digest(content))
        self._db.execute("INSERT OR REPLACE INTO contents VALUES (?, ?, ?, ?, ?, ?)", row)
        self._end += len(content)

    def flush(self) -> None:
        """Before a commit: what was written must be on the disk, if commits are waited for."""
        if self._wait and (self._number, self._end) != self._committed and self._file >= 0:
            os.fdatasync(self._file)

    def committed(self) -> None:
        """The rows are in the journal."""
        self._committed = self._number, self._end

    def roll_back(self) -> None:
        """They are not: gives back the room that their contents took."""
        number, end = self._committed
        if self._number == number and self._file >= 0:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, end)
        else:
            self.close()
        self._number, self._end = number, end

    def remove_unused(self) -> None:
        """Removes the files that no row speaks of."""
        used = self._db.execute("SELECT min(file) FROM contents").fetchone()[0]
        for path in files(self._folder.parent):
            if int(path.name) < min(self._number, used or self._number):
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Closes the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def files(run_folder: Path) -> list[Path]:
    """The files of a run's large contents, oldest first."""
    return sorted(path for path in folder_of(run_folder).glob("*") if path.name.isdigit())


def read(run_folder: Path, db: sqlite3.Connection, seq_ids: tuple[int, int]) -> dict[tuple[int, str], bytes]:
    """Contents by seq_id and part, of operations from the first seq_id to the second.

    Raises:
        OSError: A file cannot be read, or does not have what was written to it.
    """
    rows = db.execute("SELECT * FROM contents WHERE seq_id BETWEEN ? AND ? ORDER BY file", seq_ids).fetchall()
    return {(seq_id, part): content for seq_id, part, content in _contents(run_folder, rows)}


def lost(run_folder: Path, db: sqlite3.Connection) -> list[int]:
    """The operations with a content that did not survive, in order."""
    found: set[int] = set()
    for row in db.execute("SELECT * FROM contents ORDER BY file, place").fetchall():
        try:
            next(_contents(run_folder, [row]))
        except OSError:
            found.add(row[0])
    return sorted(found)


def boot_id() -> str:
    """Tells this start of the machine from others; "" where nothing does. What was written since is not lost."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def _contents(run_folder: Path, rows: Iterable[_Row]) -> Iterator[tuple[int, str, bytes]]:
    for seq_id, part, number, place, size, digest in rows:
        path = folder_of(run_folder) / f"{number:08d}"
        with path.open("rb") as file:
            content = os.pread(file.fileno(), size, place)
        if xxhash.xxh3_128_digest(content) != digest:
            raise LostContentError(f"{path} does not have the {part} of operation {seq_id} as it was written")
        yield seq_id, part, content
