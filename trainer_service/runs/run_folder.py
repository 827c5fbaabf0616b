"""A run's folder, which one trainer at a time holds."""

import fcntl
import os
from pathlib import Path


class RunFolder:
    """A run's folder, held by this process alone until it is closed or dies.

    Raises:
        BlockingIOError: Another trainer holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(self._lock)
            raise

    def move(self, path: Path) -> None:
        """Renames the folder, which stays held."""
        self.path.rename(path)
        self.path = path

    def close(self) -> None:
        """Releases the folder for another process."""
        os.close(self._lock)
