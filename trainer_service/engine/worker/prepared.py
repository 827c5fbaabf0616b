"""Commands that were decoded and checked, and wait for their turn on the device."""

from collections.abc import Callable
from dataclasses import dataclass

from google.protobuf.message import Message

Work = Callable[[], Message | None]
"""Executes a command. Returns an operation's answer; None for a command that is not an operation."""


@dataclass(frozen=True)
class Prepared:
    """A command ready to execute.

    Attributes:
        command_id: Identifies the answer.
        run_id: The run it is about; "" for none.
        seq_id: The operation's; None for a command that is not an operation.
        what: Name of the operation or command; for an operation also the field of TrainResponse that answers it.
        work: Executes it, or raises the error found while preparing it.
        answered_later: Whether it continues in the background once begun, and is answered when it is done.
        received_s: When it was received, by time.monotonic.
    """

    command_id: int
    run_id: str
    seq_id: int | None
    what: str
    work: Work
    received_s: float
    answered_later: bool = False
