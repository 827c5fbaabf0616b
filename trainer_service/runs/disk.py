"""How much of the disk saving may use, and whether there is any left."""

import contextlib
import os
import shutil
from pathlib import Path

from gradwire.errors import GradwireError, error

_LEAST_BYTES = 1024 * 1024
"""What opening a journal takes, and some."""


def has_no_room(folder: Path) -> bool:
    """Whether what failed in a folder may have failed for want of room, and may go well once there is some."""
    try:
        return shutil.disk_usage(folder).free < _LEAST_BYTES
    except OSError:
        return False


def disk_full(data_dir: Path, *, max_disk_bytes: int) -> GradwireError | None:
    """LIMIT_EXCEEDED once the files of data_dir have that many bytes; a save that began before ends in peace."""
    used_bytes = _size_bytes(data_dir)
    if used_bytes < max_disk_bytes:
        return None
    return error(
        "LIMIT_EXCEEDED",
        f"What this trainer keeps on disk has {used_bytes} bytes, and it may keep at most {max_disk_bytes}. Delete "
        "checkpoints, or ask whoever runs it for a larger --max-disk-bytes.",
        limit=max_disk_bytes,
        got=used_bytes,
    )


def _size_bytes(folder: Path) -> int:
    total = 0
    for directory, _, files in os.walk(folder):
        for name in files:
            # One deleted meanwhile counts nothing.
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(directory, name)).st_size
    return total
