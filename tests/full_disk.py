"""A disk that a test can fill to the last byte, and what stands in for one where none can be had."""

import contextlib
import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from unittest import mock

from trainer_service.runs import journal

_SOURCE = "gradwire-small-disk-"
"""What such file systems are mounted from, as /proc/mounts shows it; behind it, the process that mounted it."""


class NoMount(Exception):
    """This user may not mount a file system; root may, and anybody within `unshare --user --map-root-user --mount`."""


class SmallDisk:
    """A file system of its own.

    Args:
        path: Where it is mounted.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    def fill(self) -> None:
        """Takes all room there is."""
        with self._ballast.open("wb") as file:
            size, chunk = 0, shutil.disk_usage(self.path).total
            while chunk:
                try:
                    os.posix_fallocate(file.fileno(), size, chunk)
                    size += chunk
                except OSError as exc:
                    if exc.errno != errno.ENOSPC:
                        raise
                    # What did not fit whole; pages are of 4 KiB.
                    chunk = chunk // 2 // 4096 * 4096

    def free(self) -> None:
        """Gives it back."""
        self._ballast.unlink(missing_ok=True)


class FileLimit:
    """Has every write of some processes to a file fail, as on a full disk; those they start inherit that.

    Args:
        pids: Which, when it is asked.
    """

    def __init__(self, pids: Callable[[], Iterable[int]]) -> None:
        self._pids = pids

    def fill(self) -> None:
        """From now on."""
        # One byte: with a limit of none, files cannot even be made.
        self._limit(1)

    def free(self) -> None:
        """No more."""
        self._limit(resource.RLIM_INFINITY)

    def _limit(self, size_bytes: int) -> None:
        for pid in self._pids():
            # One that ended meanwhile writes nothing.
            with contextlib.suppress(ProcessLookupError):
                _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (size_bytes, hard))


@contextlib.contextmanager
def small_disk(path: Path, size_bytes: int) -> Iterator[SmallDisk]:
    """A disk of that size, in memory, until the block ends; those of processes that were killed go first.

    Args:
        path: An empty folder, or none.
        size_bytes: Of the disk.

    Raises:
        NoMount: It cannot be had.
    """
    _unmount_left_behind()
    path.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", f"{_SOURCE}{os.getpid()}", str(path)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as exc:
        raise NoMount(str(exc)) from exc
    try:
        yield SmallDisk(path)
    finally:
        # Lazily: what still has a file open there must not keep the disk.
        subprocess.run(["umount", "-l", str(path)], check=True)


def _unmount_left_behind() -> None:
    for line in Path("/proc/mounts").read_text().splitlines():
        source, path, *_ = line.split()
        pid = source.removeprefix(_SOURCE)
        if source.startswith(_SOURCE) and not Path(f"/proc/{pid}").exists():
            subprocess.run(["umount", "-l", path], check=False)


@contextlib.contextmanager
def nothing_can_be_written(*, foreseen: bool = True) -> Iterator[None]:
    """Every write of this process to a file fails, as on a full disk.

    Args:
        foreseen: Whether the disk says that it has no room.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, before[1]))
    try:
        with mock.patch.object(journal, "has_room", return_value=False) if foreseen else contextlib.nullcontext():
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
