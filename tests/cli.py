"""The gradwire command line as tests call it: in this process, or in one of its own on a terminal."""

import contextlib
import fcntl
import io
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gradwire.cli import main


@dataclass(frozen=True)
class Done:
    """What a command said."""

    stdout: str
    stderr: str


def gradwire(base_url: str, *arguments: object, code: int = 0) -> Done:
    """Runs a command in this process.

    Args:
        base_url: Of the trainer.
        *arguments: Noun, verb and the rest.
        code: What it must end with.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            ended = main([*map(str, arguments), "--base-url", base_url])
        except SystemExit as exc:  # argparse's
            ended = exc.code
    assert ended == code, err.getvalue()
    return Done(out.getvalue(), err.getvalue())


def refusal(base_url: str, *arguments: object, code: int = 1) -> str:
    """The one sentence of a command that is refused."""
    done = gradwire(base_url, *arguments, code=code)
    lines = done.stderr.splitlines()
    assert (done.stdout, len(lines)) == ("", 1), done
    assert lines[0].startswith("gradwire: ")
    assert lines[0].endswith(".")
    return lines[0].removeprefix("gradwire: ")


class Command:
    """A command in a process of its own.

    Attributes:
        process: The command's process.
        terminal: What it wrote to standard error so far, if that is a terminal.
    """

    def __init__(self, process: subprocess.Popen[str], master: int | None) -> None:
        self.process = process
        self.terminal = ""
        self._reader = threading.Thread(target=self._read, args=(master,)) if master is not None else None
        if self._reader is not None:
            self._reader.start()

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def wait(self) -> tuple[int, str, str]:
        """Its exit code, and all it wrote to standard output and standard error."""
        stdout, stderr = self.process.communicate(timeout=30)
        if self._reader is not None:
            self._reader.join(30)
        return self.process.returncode, stdout, stderr or self.terminal

    def _read(self, master: int) -> None:
        # A terminal holds some KiB only, so that its other end must be read all the time.
        with contextlib.suppress(OSError):  # The other end is closed.
            while data := os.read(master, 65536):
                self.terminal += data.decode()
        os.close(master)


@contextlib.contextmanager
def command(base_url: str, *arguments: object, columns: int | None = None) -> Iterator[Command]:
    """Runs a command in a process of its own.

    Args:
        base_url: Of the trainer.
        *arguments: Noun, verb and the rest.
        columns: Width of the terminal that standard error is; None makes it a pipe.
    """
    master, stderr = None, subprocess.PIPE
    if columns is not None:
        master, stderr = pty.openpty()
        fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with sigint_heeded():
        process: subprocess.Popen[str] = subprocess.Popen(
            [sys.executable, "-m", "gradwire.cli", *map(str, arguments), "--base-url", base_url],
            env={**os.environ, "TERM": "xterm"},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    if master is not None:
        os.close(stderr)
    started = Command(process, master)
    try:
        yield started
    finally:
        process.kill()
        started.wait()


@contextlib.contextmanager
def sigint_heeded() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where tests run in the background, for which a shell has it ignored."""
    before: Any = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
