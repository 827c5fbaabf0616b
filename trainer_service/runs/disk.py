"""How much disk saving may use, and whether any is left."""

import contextlib
import os
import shutil
from pathlib import Path

from gradwire.errors import GradwireError, error

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
