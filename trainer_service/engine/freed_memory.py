"""What a pass frees on the CPU stays with the process for the next pass, and goes back once the process is idle.

A pass takes and frees a gigabyte of tensors. glibc gives large blocks back to the system as soon as they are freed, and
taking them anew costs a page fault for every 4 KiB: 110,000 to 200,000 a pass of SmolLM2, a seventh of its time in
bfloat16. Which memory a tensor is in changes no bit of a result: torch aligns every tensor alike.

Huge pages, which spare most of what is left of that, are asked for by the trainer: glibc reads its GLIBC_TUNABLES once.
"""

import ctypes
import threading
import time
from contextlib import suppress
from typing import Any

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Settings of mallopt: how much may lie free at the heap's end, how many blocks may be taken from the system alone."""
_INTERVAL_S = 10.0
"""How often it looks whether the process works."""
_IDLE_BELOW = 0.05
"""Cores' worth of work below which it is idle: a worker that waits for its trainer uses 0.01."""
_IDLE_S = 30.0
"""How long it must have been idle. The first pass after that takes its memory anew, in a second at most."""


class Idleness:
    """Tells when a process that has worked has been idle for long enough."""

    def __init__(self) -> None:
        self._worked = False
        self._idle_s = 0.0

    def update(self, *, ran_s: float, elapsed_s: float) -> bool:
        """Takes in an interval, and returns whether now is the time to give memory back: once after each work.

        Args:
            ran_s: Seconds that the process's threads ran in it, all together.
            elapsed_s: Its length.
        """
        if ran_s >= _IDLE_BELOW * elapsed_s:
            self._worked, self._idle_s = True, 0.0
            return False
        self._idle_s += elapsed_s
        if not self._worked or self._idle_s < _IDLE_S:
            return False
        self._worked = False
        return True


def keep_while_working() -> None:
    """Has the process keep what it frees while it works, from now on. Does nothing where the C library is not glibc."""
    if (libc := _glibc()) is None:
        return
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, ctypes.c_int(-1))

    def watch() -> None:
        idleness, before, before_s = Idleness(), time.process_time(), time.monotonic()
        while True:
            time.sleep(_INTERVAL_S)
            now, now_s = time.process_time(), time.monotonic()
            if idleness.update(ran_s=now - before, elapsed_s=now_s - before_s):
                give_back()
            before, before_s = now, now_s

    threading.Thread(target=watch, name="freed-memory", daemon=True).start()


def give_back() -> None:
    """Gives all memory that is free back to the system."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> Any:
    """The process's C library, where it is glibc; None otherwise."""
    with suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None)
        if library.gnu_get_libc_version:
            return library
    return None
