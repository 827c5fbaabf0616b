"""Which operation of a run goes out next. Pure: no clock, no network, one thread.

Calls are sent in the order made, with one exception that keeps custom losses cheap. A custom loss is a forward now and
a backward later, when the user's function has run; calls behind it need not wait for that, except those that would see
or change what the backward does: `optim_step`, `zero_grad`, saving and loading wait at the head of the line until every
custom loss before them has sent its backward. What belongs to an open custom loss (its backward, its cancel, a forward
made inside the user's function) overtakes the line, so that nothing can wait for itself.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from gradwire._wire.wire_format import Parts
from gradwire.errors import GradwireError
from gradwire.v1.trainer_service_pb2 import TrainRequest, TrainResponse


@dataclass(eq=False)
class OutgoingOperation:
    """One message to the trainer, and what to do with its answer."""

    request: TrainRequest
    """All of it but `content`; gets its seq_id when it is sent."""
    answered: Callable[[TrainResponse], object]
    """Called once with the answer, an error answer included."""
    failed: Callable[[GradwireError], object]
    """Called once, instead, when no answer will come."""
    content: Parts = field(default_factory=list)
    """Large fields of the request, encoded."""
    size_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.size_bytes = self.request.ByteSize() + sum(map(len, self.content))

    def encode(self) -> bytes:
        """The message as it is sent."""
        return b"".join((self.request.SerializeToString(), *self.content))


@dataclass(eq=False)
class Call:
    """The operations that one call of the user sends."""

    operations: deque[OutgoingOperation]
    barrier: bool = False
    """Waits for every custom loss before it."""
    custom: bool = False
    """A custom loss: open from here until `close`."""
    more: bool = False
    """Further operations are being made; what is behind the call waits for them."""


class CallOrder:
    """The line of calls not yet sent, and the custom losses still open."""

    def __init__(self) -> None:
        self._line: deque[Call] = deque()
        self._first: deque[OutgoingOperation] = deque()
        self._open: set[Call] = set()

    def add(self, call: Call) -> None:
        """Puts a call at the end of the line."""
        self._line.append(call)

    def extend(self, call: Call, operation: OutgoingOperation, *, more: bool) -> None:
        """Adds the next operation of a call that has more."""
        call.operations.append(operation)
        call.more = more

    def break_off(self, call: Call) -> None:
        """No more operations of a call will come, and those not sent yet must not be."""
        call.more = False
        if call in self._line:
            self._line.remove(call)

    def overtake(self, operations: Iterable[OutgoingOperation]) -> None:
        """Sends operations of an open custom loss before everything in the line."""
        self._first.extend(operations)

    def close(self, call: Call) -> None:
        """The custom loss has handed over its last operation."""
        self._open.discard(call)
        if call in self._line:
            # Its forward had not all gone out: the rest must not.
            self._line.remove(call)

    def barrier_waits(self) -> bool:
        """Whether a call in the line would act on what the open custom losses leave behind."""
        return any(call.barrier for call in self._line)

    def idle(self) -> bool:
        """Whether nothing waits to be sent and no custom loss is open."""
        return not (self._first or self._line or self._open)

    def next(self) -> OutgoingOperation | None:
        """The operation to send now; None while nothing may be sent."""
        if self._first:
            return self._first.popleft()
        if not self._line:
            return None
        head = self._line[0]
        if head.barrier and self._open:
            return None
        if head.custom:
            self._open.add(head)
        if not head.operations:
            return None
        operation = head.operations.popleft()
        if not (head.operations or head.more):
            self._line.popleft()
        return operation

    def drain(self) -> list[OutgoingOperation]:
        """Removes and returns everything, when the run's stream is over."""
        left = [*self._first, *(operation for call in self._line for operation in call.operations)]
        self._first.clear()
        self._line.clear()
        self._open.clear()
        return left
