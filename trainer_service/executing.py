"""Which command a worker is executing, known however the worker ends. Ground floor.

An event would be lost with the process that sent it, and would cost a message per operation. This is a number in a
file: once written, the kernel keeps it, even when it kills the process. There are two of them:

* beside the worker's socket, for the trainer that outlives its worker: the command;
* in a run's folder, for the next trainer, where both die at once: the operation. A worker that sees its trainer gone
  takes that note back, since what it executes has killed nobody.
"""

import contextlib
import os
import threading
from pathlib import Path

from google.rpc.status_pb2 import Status
from gradwire.errors import GradwireError, from_status, to_status

_NOTE = "executing"


class Executing:
    """The worker's end.

    Args:
        socket: Path of the trainer's socket.
    """

    def __init__(self, socket: str) -> None:
        self._file = _opened(_beside(socket))
        self._notes: dict[str, int] = {}  # Files in folders of runs, by run_id.
        self._noted: int | None = None  # The file of the run whose operation runs now.
        self._withdrawn = False
        self._lock = threading.Lock()

    def hold_run(self, run_id: str, folder: Path) -> None:
        """Notes operations of this run in its folder from now on."""
        self.drop_run(run_id)
        # On a full disk, or where the folder is gone, nothing is noted, and no operation is blamed.
        with contextlib.suppress(OSError):
            self._notes[run_id] = _opened(folder / _NOTE)

    def drop_run(self, run_id: str) -> None:
        """The run is not held any more."""
        if (file := self._notes.pop(run_id, None)) is not None:
            os.close(file)

    def begin(self, command_id: int, run_id: str, seq_id: int | None) -> None:
        """Says that this command runs now, and that operation of the run; None if it is no operation of one."""
        with self._lock:
            _write(self._file, command_id)
            if seq_id is not None and not self._withdrawn and (file := self._notes.get(run_id)) is not None:
                self._noted = file
                _write(file, seq_id)

    def end(self) -> None:
        """Says that nothing runs, such as while tokens are sampled between two commands."""
        with self._lock:
            _write(self._file, 0)
            self._take_back()

    def withdraw(self) -> None:
        """The trainer is gone and this worker is not: no operation is to blame for that. From any thread."""
        with self._lock:
            self._withdrawn = True
            self._take_back()

    def _take_back(self) -> None:
        if self._noted is not None:
            _write(self._noted, 0)
            self._noted = None


def executing_command(socket: str) -> int:
    """The trainer's end: the command that the worker on this socket runs, or ran when it died; 0 for none."""
    return _read(_beside(socket))


def noted_operation(folder: Path) -> int:
    """The next trainer's end: seq_id of the operation that a worker executed when it died, which it held of the run in
    this folder; 0 for none."""
    return _read(folder / _NOTE)


def remove_note(folder: Path) -> None:
    """The trainer's end: forgets that, since it is counted, or the worker was stopped."""
    with contextlib.suppress(OSError):
        (folder / _NOTE).unlink()


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


def _beside(socket: str, name: str = _NOTE) -> Path:
    return Path(socket).with_name(name)


def _opened(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)


def _write(file: int, number: int) -> None:
    # On a full disk nothing is recorded, and nothing is blamed.
    with contextlib.suppress(OSError):
        os.pwrite(file, number.to_bytes(8, "little"), 0)


def _read(path: Path) -> int:
    try:
        return int.from_bytes(path.read_bytes(), "little")
    except OSError:
        return 0
