"""Children that never outlive their parent.

Two threads hold them: a child started with `start_child` has a pipe from its parent on stdin and ends at its EOF
(`stdin_closed`), which comes however the parent dies; and a child may ask the kernel for a signal at its parent's death
(`die_with_parent`). Each child leads a session of its own, so that Ctrl-C reaches only the program the user started,
which then takes its children down in order.
"""

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from pathlib import Path
from typing import IO, Any

_PR_SET_PDEATHSIG = 1


def die_with_parent(sig: signal.Signals = signal.SIGKILL) -> None:
    """Asks the kernel to send `sig` to this process when its parent dies. Linux only; elsewhere does nothing."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(sig), 0, 0, 0)
    if os.getppid() != parent:
        # It died between the two lines.
        os.kill(os.getpid(), sig)


async def start_child(
    *command: str,
    env: dict[str, str] | None = None,
    stdout: int | IO[Any] | None = None,
    stderr: int | IO[Any] | None = None,
) -> Process:
    """Starts a program that leads its own session and has a pipe from us on stdin."""
    return await asyncio.create_subprocess_exec(
        *command,
        stdin=PIPE,
        stdout=DEVNULL if stdout is None else stdout,
        stderr=stderr,
        env=env,
        start_new_session=True,
    )


async def stop_child(process: Process, *, grace_s: float) -> int:
    """Ends a child and everything in its session: SIGTERM, and SIGKILL after grace_s. Returns its exit code."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), grace_s)
    # The leader may be gone and others of its session not.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    return await process.wait()


async def stdin_closed() -> None:
    """Returns when stdin reaches its end: the program that started this one closed it or died."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while await reader.read(4096):
        pass


def write_ready_file(path: Path, **values: object) -> None:
    """Says where a server listens, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps({**values, "pid": os.getpid()}) + "\n")
    aside.replace(path)
