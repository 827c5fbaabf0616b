"""What a worker prints: copied to the trainer's log line by line, and its end kept to explain the worker's death."""

import asyncio
import collections
import contextlib
import logging
import os
import re
import signal

worker_log = logging.getLogger("worker")

_LAST_LINES = 20
_MAX_LINE_CHARS = 4096
_MAX_QUOTED_CHARS = 300
"""Bounded because an error's text travels in HTTP/2 headers, which hold a few KiB."""
_DRAIN_TIMEOUT_S = 0.5
_CHATTER = re.compile(r"^\S+ \S+ (DEBUG|INFO) ")
"""Lines of our own log that explain no death (observability._Lines)."""


class WorkerOutput:
    """A pipe that a worker prints to, read to its end. Made by `open`.

    It is not asyncio's (stdout=PIPE), which cannot be closed before its end: a process that outlives the worker would
    keep it open.
    """

    def __init__(self, stream: asyncio.StreamReader, transport: asyncio.ReadTransport) -> None:
        self._stream = stream
        self._transport = transport
        self._lines: collections.deque[str] = collections.deque(maxlen=_LAST_LINES)
        self._task = asyncio.create_task(self._read(), name="worker-output")

    @classmethod
    async def open(cls) -> tuple["WorkerOutput", int]:
        """A new pipe, and the descriptor that a process prints to; the caller closes that once the process has it.

        Raises:
            OSError: There are no descriptors left.
        """
        reading, writing = os.pipe()
        stream = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(reading, "rb", buffering=0)
        )
        return cls(stream, transport), writing

    def explain(self, exit_code: int | None, *, how: str = "lost its connection") -> str:
        """Why the process died, in a sentence.

        Args:
            exit_code: The process's; None while it lives.
            how: What happened to it, if it lives.
        """
        if exit_code is not None:
            how = f"ended ({_describe(exit_code)})"
        last = self._lines[-1] if self._lines else ""
        return f"The worker process {how}." + (f" Its last words: {last.strip()[:_MAX_QUOTED_CHARS]}" if last else "")

    async def drain(self) -> None:
        """Returns once all output is read, or after a moment: another process may keep the pipe open."""
        await asyncio.wait({self._task}, timeout=_DRAIN_TIMEOUT_S)

    async def close(self) -> None:
        """Stops reading and closes the pipe."""
        await self.drain()
        self._transport.close()
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _read(self) -> None:
        # In chunks: a line may have any length (a progress bar never ends one), and an unread pipe blocks the worker.
        rest = ""
        while chunk := await self._stream.read(65536):
            *lines, rest = re.split(r"[\r\n]", rest + chunk.decode(errors="replace"))
            if len(rest) > _MAX_LINE_CHARS:
                lines.append(rest)
                rest = ""
            for line in lines:
                self._line(line)
        self._line(rest)

    def _line(self, line: str) -> None:
        line = line.rstrip()[:_MAX_LINE_CHARS]
        if not line:
            return
        worker_log.info(line)
        if not _CHATTER.match(line):
            self._lines.append(line)


def _describe(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return f"signal {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"signal {-exit_code}"
