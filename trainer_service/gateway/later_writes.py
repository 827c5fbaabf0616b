"""Writes that can wait a moment, so that several go to the store in one transaction."""

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class LaterWrites(Generic[T]):
    """Collects rows and writes them together.

    Args:
        write: Writes them.
        after_s: How long the first of them waits.
    """

    def __init__(self, write: Callable[[list[T]], object], *, after_s: float) -> None:
        self._write = write
        self._after_s = after_s
        self._rows: list[T] = []
        self._timer: asyncio.TimerHandle | None = None

    def add(self, row: T) -> None:
        """Has a row written soon."""
        self._rows.append(row)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._after_s, self.flush)

    def flush(self) -> None:
        """Writes now what waits."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        rows, self._rows = self._rows, []
        if rows:
            self._write(rows)
