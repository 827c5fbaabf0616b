"""Which command a worker is executing, known however the worker ends. Ground floor.

An event would be lost with the process that sent it, and would cost a message per operation. This is a number in a
file beside the worker's socket: once written, the kernel keeps it, even when it kills the process.
"""

import contextlib
import os
from pathlib import Path

from google.rpc.status_pb2 import Status
from gradwire.errors import GradwireError, from_status, to_status


class Executing:
    """The worker's end.

    Args:
        socket: Path of the trainer's socket.
    """

    def __init__(self, socket: str) -> None:
        self._file = os.open(_beside(socket), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)

    def say(self, command_id: int) -> None:
        """Says that this command runs now; 0 for none, such as while tokens are sampled between two commands."""
        # On a full disk nothing is recorded, and no command is blamed.
        with contextlib.suppress(OSError):
            os.pwrite(self._file, command_id.to_bytes(8, "little"), 0)


def executing_command(socket: str) -> int:
    """The trainer's end: the command that the worker on this socket runs, or ran when it died; 0 for none."""
    try:
        return int.from_bytes(_beside(socket).read_bytes(), "little")
    except OSError:
        return 0


def leave_reason(socket: str, failure: GradwireError) -> None:
    """The worker's end: why what it executes cannot be, before this rank ends for it; the others end with it.

    A rank that has failed alone cannot answer: the others wait for it in the middle of the same operation.
    """
    reason = _beside(socket, "reason")
    aside = reason.with_name(f".reason-{os.getpid()}")
    with contextlib.suppress(OSError):
        aside.write_bytes(to_status(failure).SerializeToString())
        aside.replace(reason)


def take_reason(socket: str) -> GradwireError | None:
    """The trainer's end: the reason that a rank has left, once; None where none has."""
    reason = _beside(socket, "reason")
    try:
        encoded = reason.read_bytes()
        reason.unlink()
    except OSError:
        return None
    return from_status(Status.FromString(encoded))


def _beside(socket: str, name: str = "executing") -> Path:
    return Path(socket).with_name(name)
