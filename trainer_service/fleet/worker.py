"""The one interface through which the trainer sees a worker; tests have a fake of it."""

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
    """The event's `response` as the worker encoded it; empty where it has none."""


class Died(UnavailableError):
    """A command gets no answer: the worker died first, there is none, or the trainer stops.

    Args:
        cause: Says which, in words for whoever asked.
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
"""Gets the answer to a command, or why there is none. That is the last call; the tokens of a sample command come before
it."""


class Worker(Protocol):
    """Executes commands in the order submitted, but for those of sampling, which overtake, and answers each exactly
    once. On the event loop's thread.

    Answers come in that order too, but for snapshots, which are written while what is behind them executes, and for
    samples, which are generated between operations.
    """

    @property
    def ready(self) -> WorkerReady | None:
        """The model and losses once loaded; None while there is no worker to take commands."""
        ...

    @property
    def responding(self) -> bool:
        """Whether anything came from it a short while ago. One that is ready and does not respond takes commands still,
        and may go on where it stopped, or is replaced."""
        ...

    @property
    def status_message(self) -> str:
        """What it is doing while not ready, or that it does not respond, in a sentence."""
        ...

    @property
    def counters(self) -> Mapping[str, float]:
        """What it counts, by Prometheus name."""
        ...

    def submit(self, command: WorkerCommand, deliver: Deliver, *, request: bytes = b"") -> None:
        """Sends a command, whose command_id is set here.

        Args:
            command: What to do.
            request: For an operation, an encoded TrainRequest to stand as `command.request`, which is then absent.
            deliver: Gets Died where no answer comes: WORKER_DIED when the worker dies first, WORKER_NOT_READY when
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
        """Calls back whenever a worker died, with the reason, before its pending commands are answered with it."""
        ...

    def on_responding(self, callback: Callable[[], object]) -> None:
        """Calls back whenever `responding` has changed, other than by a death."""
        ...
