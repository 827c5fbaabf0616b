"""Children that never outlive their parent, whichever process of the chain is killed, and however.

    program ── jobs ── trainer ── worker rank 0, 1…

* A child started with `start_child` has a pipe from its parent on stdin. The kernel closes it however the parent dies.
* Our programs end when `parent_gone` returns: stdin is closed, or the parent process is gone. The latter also works
  when a forked sibling keeps the pipe open.
* A rank may compute for minutes, so it asks the kernel for SIGKILL when its parent dies (`die_with_parent`). The kernel
  means the *thread* that forked, so this only works for parents that start children on their main thread, as the
  trainer does. The first rank is left a second for its last words (`die_a_second_after_parent`).
* `stop_child` ends the whole tree below a child, including sessions of its grandchildren.

Each child leads its own session, so that Ctrl-C reaches only the program the user started, which then stops its
children in order.
"""

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_PR_SET_PDEATHSIG = 1
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def held_bytes() -> int:
    """Memory that this process holds (its resident set); 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * _PAGE_BYTES
    except (OSError, ValueError, IndexError):
        return 0


def die_with_parent(sig: signal.Signals = signal.SIGKILL) -> None:
    """Asks the kernel to send `sig` to this process when the thread that started it ends. Only on Linux."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(sig), 0, 0, 0)
    if os.getppid() != parent:
        # The parent died in between.
        os.kill(os.getpid(), sig)


def die_a_second_after_parent() -> None:
    """Asks the kernel to end this process a second after the thread that started it ends. Only on Linux.

    Whatever this process is doing: the second is counted, and what ends it called, without Python. One that is stopped
    (SIGSTOP) ends once it is continued.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    # A handler is called with the number of its signal; SIGHUP's is 1, and SIGALRM ends a process.
    assert signal.SIGHUP == 1
    libc.signal(signal.SIGHUP, ctypes.cast(libc.alarm, ctypes.c_void_p))
    die_with_parent(signal.SIGHUP)


async def start_child(
    *command: str,
    env: dict[str, str] | None = None,
    stdout: int | IO[Any] | None = None,
    stderr: int | IO[Any] | None = None,
    cwd: Path | None = None,
) -> Process:
    """Starts a program that leads its own session and has a pipe from us on stdin.

    Args:
        *command: The program and its arguments.
        env: Its environment; None passes ours on.
        stdout: As in subprocess; None discards it.
        stderr: As in subprocess; None shares ours.
        cwd: Where it runs; None uses our own.
    """
    return await asyncio.create_subprocess_exec(
        *command,
        stdin=PIPE,
        stdout=DEVNULL if stdout is None else stdout,
        stderr=stderr,
        env=env,
        cwd=cwd,
        start_new_session=True,
    )


async def stop_child(process: Process, *, grace_s: float) -> int:
    """Ends a child and everything below it: SIGTERM to the child, and SIGKILL to whatever is left after grace_s.

    Returns:
        The child's exit code; negative for a signal.
    """
    below = descendants(process.pid)
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), grace_s)
    if process.returncode is None:
        below = descendants(process.pid) | below
    # The leader may be gone while others of its session still run.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    kill_all(below)
    return await process.wait()


@dataclass(frozen=True)
class ProcessKey:
    """One process; its start time tells it from a later one with the same id."""

    pid: int
    started: int
    """Clock ticks since boot."""


def process_key(pid: int) -> ProcessKey | None:
    """The process that has this id now; None if there is none, or no /proc.

    Raises:
        OSError: /proc cannot be read now, such as for want of a descriptor.
    """
    fields = _stat(pid)
    return ProcessKey(pid, int(fields[19])) if fields else None


def descendants(pid: int) -> set[ProcessKey]:
    """Every process below `pid`, at any depth, as far as /proc can be read."""
    children: dict[int, list[ProcessKey]] = {}
    with contextlib.suppress(OSError):
        for entry in Path("/proc").glob("[0-9]*"):
            if fields := _stat(int(entry.name)):
                children.setdefault(int(fields[1]), []).append(ProcessKey(int(entry.name), int(fields[19])))
    found: set[ProcessKey] = set()
    line = [pid]
    while line:
        for child in children.get(line.pop(), []):
            found.add(child)
            line.append(child.pid)
    return found


def kill_all(processes: Iterable[ProcessKey]) -> None:
    """Sends SIGKILL to each process that still runs."""
    for key in processes:
        try:
            there = process_key(key.pid) == key
        except OSError:
            # No descriptor is left to check with; it ran a moment ago.
            there = True
        if there:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(key.pid, signal.SIGKILL)


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat after the command name, which may contain anything; empty if there are none.

    Raises:
        OSError: /proc cannot be read now, such as for want of a descriptor.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return []


async def wait_for_signal() -> None:
    """Returns at the first SIGTERM or SIGINT; a second one ends the process at once."""
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    for sig in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sig, asked.set)
    await asked.wait()
    for sig in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(ValueError):
            loop.remove_signal_handler(sig)
            signal.signal(sig, signal.SIG_DFL)


async def told_to_stop(*, exit_with_parent: bool) -> None:
    """Returns when this process should stop: at SIGTERM or SIGINT, or, if asked for, once its parent is gone."""
    ends = [asyncio.create_task(wait_for_signal())]
    if exit_with_parent:
        ends.append(asyncio.create_task(parent_gone()))
    try:
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for end in ends:
            end.cancel()


async def parent_gone() -> None:
    """Returns when the program that started this one is gone, or has closed our stdin to stop us."""
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()

    def read_to_the_end() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        with contextlib.suppress(RuntimeError):  # The loop is closed: this process is about to end.
            loop.call_soon_threadsafe(gone.set)

    # In a thread, since stdin may be something an event loop cannot watch, such as a file.
    threading.Thread(target=read_to_the_end, name="stdin", daemon=True).start()
    parent = -1
    if hasattr(os, "pidfd_open"):
        with contextlib.suppress(OSError):
            parent = os.pidfd_open(os.getppid())
            loop.add_reader(parent, gone.set)
    try:
        await gone.wait()
    finally:
        if parent >= 0:
            loop.remove_reader(parent)
            os.close(parent)


def write_ready_file(path: Path, **values: object) -> None:
    """Writes where a server listens, as JSON with this process's id, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps({**values, "pid": os.getpid()}) + "\n")
    aside.replace(path)
