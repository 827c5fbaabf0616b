"""How much disk saving may use, whether any is left, and when it has what was written."""

import contextlib
import os
import shutil
from pathlib import Path

from gradwire.errors import GradwireError, error

from trainer_service.atomic_folders import sync
from trainer_service.runs import journal, journal_contents

_LEAST_BYTES = 1024 * 1024
"""A little more than opening a journal takes."""


def has_no_room(folder: Path) -> bool:
    """Whether a failure in a folder may be due to a full disk."""
    try:
        return shutil.disk_usage(folder).free < _LEAST_BYTES
    except OSError:
        return False


def disk_full(data_dir: Path, *, max_disk_bytes: int) -> GradwireError | None:
    """LIMIT_EXCEEDED once the files of data_dir have that many bytes; saves that began earlier finish."""
    used_bytes = _size_bytes(data_dir)
    if used_bytes < max_disk_bytes:
        return None
    return error(
        "LIMIT_EXCEEDED",
        f"This trainer keeps {used_bytes} bytes on disk, and it may keep at most {max_disk_bytes}. Delete checkpoints, "
        "or ask its operator for a larger --max-disk-bytes.",
        limit=max_disk_bytes,
        got=used_bytes,
    )


def _size_bytes(folder: Path) -> int:
    total = 0
    for directory, _, files in os.walk(folder):
        for name in files:
            # A file that was deleted meanwhile counts nothing.
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(directory, name)).st_size
    return total


def wait_for_disk(folder: Path) -> None:
    """Returns once what a run's journal has is on the disk, whatever --journal-sync is.

    Raises:
        OSError: It cannot be written.
    """
    paths = [*journal_contents.files(folder), *(folder / f"{journal.FILE_NAME}{suffix}" for suffix in ("-wal", ""))]
    for path in [*paths, journal_contents.folder_of(folder), folder]:
        # The log is gone once the file has all of it.
        with contextlib.suppress(FileNotFoundError):
            sync(path)
