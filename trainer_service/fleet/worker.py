"""The one interface between the trainer and a worker; tests have a fake of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from gradwire.errors import GradwireError, UnavailableError
from gradwire.v1.worker_service_pb2 import WorkerCommand, WorkerEvent, WorkerReady


@dataclass(frozen=True)
class Reply:
    """A worker's answer to a command."""

    event: WorkerEvent
    encoded_response: memoryview
    """The event's `response` as the worker encoded it; empty if it has none."""


class Died(UnavailableError):
    """A command gets no answer: the worker died first, there is none, or the trainer stops.

    Args:
        cause: Says which, in words for the caller.
        executing: Whether the worker died while it executed this very command.
        because: Why this command cannot be executed, where the worker has left that; it need not be tried again.
    """

    def __init__(self, cause: GradwireError, *, executing: bool = False, because: GradwireError | None = None) -> None:
        super().__init__(
            cause.message,
            reason=cause.reason,
            metadata=cause.metadata,
            retry_after_s=cause.retry_after_s,
            code=cause.code,
        )
        self.executing = executing
        self.because = because


Deliver = Callable[[Reply | Died], None]
"""Gets the answer to a command, or why there is none. That call is the last; the tokens of a sample command come
before it."""


class Worker(Protocol):
    """Executes commands in the order submitted, except those of sampling, which overtake, and answers each exactly
    once. For the event loop's thread.

    Answers come in that order too, except those of snapshots, which are written while later commands execute, and of
    samples, which are generated between operations.
    """

    @property
    def ready(self) -> WorkerReady | None:
        """The model and losses once loaded; None while there is no worker to take commands."""
        ...

    @property
    def responding(self) -> bool:
        """Whether anything came from it a short while ago. A ready worker that does not respond still takes commands,
        and may resume where it stopped, or be replaced."""
        ...

    @property
    def status_message(self) -> str:
        """What it is doing while not ready, or that it does not respond, in a sentence."""
        ...

    @property
    def counters(self) -> Mapping[str, float]:
        """Its counters, by Prometheus name."""
        ...

    def submit(self, command: WorkerCommand, deliver: Deliver, *, request: bytes = b"") -> None:
        """Sends a command, whose command_id is set here.

        Args:
            command: What to do.
            request: For an operation, the encoded TrainRequest to send as `command.request`, which is then absent.
            deliver: Gets the answer, or Died if none comes: WORKER_DIED if the worker dies first, WORKER_NOT_READY if
                there is none.
        """
        ...

    async def stop(self) -> None:
        """Ends the worker; commands still pending get DRAINING."""
        ...

    def on_ready(self, callback: Callable[[], object]) -> None:
        """Calls back whenever a worker has loaded its model."""
        ...

    def on_death(self, callback: Callable[[GradwireError], object]) -> None:
        """Calls back with the reason whenever a worker died, before its pending commands are answered with it."""
        ...

    def on_responding(self, callback: Callable[[], object]) -> None:
        """Calls back whenever `responding` changes, except through a death."""
        ...
