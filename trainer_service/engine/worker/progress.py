"""Tells slow from stuck: reports whenever this process makes progress. Light: no torch."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_LOOK_S = 5.0
_CPU_S = 0.1
_IO_BYTES = 64 << 10
"""What counts as progress between two looks. In that time an idle worker computes for 0.01 s and reads
and writes next to nothing, which must not add up over many looks."""


@contextlib.contextmanager
def told_of_progress(tell: Callable[[], object]) -> Iterator[None]:
    """Calls `tell`, on a thread of its own, each time the process has computed, read or written some more.

    Downloads, reads from a slow disk and conversions count; waiting for a driver or a file system that hangs does not.
    """
    over = threading.Event()

    def watch() -> None:
        cpu_s, io_bytes = time.process_time(), _io_bytes()
        while _time_to_look(over):
            before_s, before_bytes = cpu_s, io_bytes
            cpu_s, io_bytes = time.process_time(), _io_bytes()
            if cpu_s - before_s >= _CPU_S or io_bytes - before_bytes >= _IO_BYTES:
                tell()

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _time_to_look(over: threading.Event) -> bool:
    """Waits for the next look. Returns False once it is over."""
    return not over.wait(_LOOK_S)


def _io_bytes() -> int:
    """What the process has read and written so far, memory maps included; 0 if there is no /proc."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    counted = {name: int(value) for name, _, value in (line.partition(": ") for line in lines)}
    return sum(counted.get(name, 0) for name in ("rchar", "wchar", "read_bytes"))
