"""The order of one run's operations. Pure: no clock, no network, no worker.

`seq_id` is order, reply address and idempotency key at once. The next number is taken; a number skipped is a gap; a
number seen before is a repeat, which gets the first answer if it is the same operation and is refused if it is another.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gradwire.errors import GradwireError, error, to_status
from gradwire.v1.trainer_service_pb2 import TrainResponse

from trainer_service.runs.operation import Operation

Answered = Callable[[bytes], object]
"""Gets an answer: an encoded TrainResponse."""

MAX_RETAINED_ANSWERS = 4096
"""Answers kept for a client that does not acknowledge, such as one typing by hand; older ones are let go first. No
operation waits for acknowledgements, since those come behind it on the same stream."""
MAX_RETAINED_BYTES = 256 * 1024 * 1024
"""Bytes of such answers."""


@dataclass(eq=False)
class Entry:
    """One operation of the run."""

    seq_id: int
    digest: bytes
    operation: Operation
    """What to execute; its request is empty where it was refused for want of room to write it down."""
    kind: str
    waiters: list[Answered] = field(default_factory=list)
    failure: GradwireError | None = None
    """What it failed with without being executed; what such a failure does to the run is still to be done."""
    attempts: int = 0
    """Times it was sent to a worker and not given back by it, this one included."""
    received_s: float = 0.0
    """When it came, by time.perf_counter, as all times here."""
    journalled_s: float = 0.0
    """When it was on disk; 0 before, and where an earlier trainer wrote it down."""
    done_s: float = 0.0
    """When the worker had executed it; 0 before, and where none did."""
    memory_bytes: float = 0.0
    """What the worker took for it, as it said; 0 where it did not."""
    taken_up: bool = False
    """Whether an earlier trainer received it."""
    deaths_s: list[float] = field(default_factory=list)
    """When workers died while they executed it."""
    restorations: list[Any] = field(default_factory=list)
    """Span contexts of those its run needed meanwhile; see traces.py."""


class Sequence:
    """Numbers taken, answers kept.

    Args:
        min_retained_answers: The latest answers are kept until acknowledged whatever their size. A client that keeps
            to this many operations in flight therefore never loses an answer with its connection.
        next_seq_id: Number of the next new operation.
    """

    def __init__(self, *, min_retained_answers: int, next_seq_id: int = 1) -> None:
        self._min_retained_answers = min_retained_answers
        self._waiting: dict[int, Entry] = {}
        self._waiting_bytes = 0
        # (digest, answer) in the order of answers. What was asked is let go: it may be megabytes.
        self._retained: OrderedDict[int, tuple[bytes, bytes]] = OrderedDict()
        self._retained_bytes = 0
        self.next_seq_id = next_seq_id

    @property
    def unanswered(self) -> int:
        """Operations that wait for their answer."""
        return len(self._waiting)

    @property
    def waiting(self) -> list[Entry]:
        """They, in order."""
        return list(self._waiting.values())

    @property
    def unanswered_bytes(self) -> int:
        """Memory that they take up."""
        return self._waiting_bytes

    def receive(self, operation: Operation, answered: Answered) -> Entry | None:
        """Takes an operation in.

        Args:
            operation: With its seq_id.
            answered: Gets the answer; at once, if it is already there.

        Returns:
            The new entry, to be executed; None for a repeat.

        Raises:
            GradwireError: SEQ_ID_GAP, SEQ_ID_CONFLICT or ANSWER_RELEASED. Nothing was changed.
        """
        seq_id = operation.seq_id
        if seq_id > self.next_seq_id:
            raise error(
                "SEQ_ID_GAP",
                f"seq_id is {seq_id}, but the next operation of this run is {self.next_seq_id}; numbers have no gaps.",
                expected=self.next_seq_id,
                got=seq_id,
            )
        if seq_id == self.next_seq_id:
            entry = Entry(seq_id, operation.digest(), operation, operation.kind, [answered])
            self.next_seq_id += 1
            self.take_up(entry)
            return entry
        entry = self._waiting.get(seq_id)
        digest, answer = (entry.digest, None) if entry else self._retained.get(seq_id, (None, None))
        if digest is None:
            raise error(
                "ANSWER_RELEASED",
                f"seq_id {seq_id} was executed, and its answer let go after it was acknowledged or too many waited. "
                f"The next operation of this run is {self.next_seq_id}.",
                expected=self.next_seq_id,
                got=seq_id,
            )
        if digest != operation.digest():
            raise conflict(seq_id, self.next_seq_id)
        if answer is not None:
            answered(answer)
        elif entry is not None:
            entry.waiters.append(answered)
        return None

    def wait_for(self, seq_id: int, answered: Answered) -> Callable[[], object] | None:
        """Waits for the answer to an operation that was received.

        Args:
            seq_id: Its number.
            answered: Gets the answer; at once, if it is already there.

        Returns:
            What ends the waiting; None where the answer was let go.

        Raises:
            OutOfRangeError: SEQ_ID_GAP: no operation has that number yet.
        """
        if not 1 <= seq_id < self.next_seq_id:
            received = f"1 to {self.next_seq_id - 1}" if self.next_seq_id > 1 else "none"
            text = f"seq_id is {seq_id}, but the operations of this run that were received are {received}."
            raise error("SEQ_ID_GAP", text, expected=self.next_seq_id, got=seq_id)
        if (entry := self._waiting.get(seq_id)) is not None:
            entry.waiters.append(answered)
            return lambda: answered in entry.waiters and entry.waiters.remove(answered)
        if seq_id not in self._retained:
            return None
        answered(self._retained[seq_id][1])
        return lambda: None

    def take_up(self, entry: Entry) -> None:
        """Waits for an operation's answer; one received by an earlier trainer is taken up so."""
        self._waiting[entry.seq_id] = entry
        self._waiting_bytes += entry.operation.memory_bytes

    def answer(self, entry: Entry, answer: bytes) -> None:
        """Records an operation's one answer and hands it to all who wait."""
        assert entry.seq_id in self._waiting, f"operation {entry.seq_id} was answered twice"
        del self._waiting[entry.seq_id]
        self._waiting_bytes -= entry.operation.memory_bytes
        self._retained[entry.seq_id] = entry.digest, answer
        self._retained_bytes += len(answer)
        while len(self._retained) > MAX_RETAINED_ANSWERS or (
            self._retained_bytes > MAX_RETAINED_BYTES and len(self._retained) > self._min_retained_answers
        ):
            self._release()
        waiters, entry.waiters = entry.waiters, []
        for answered in waiters:
            answered(answer)

    def acknowledge(self, acked_seq_id: int) -> None:
        """Lets go of the answers up to acked_seq_id."""
        while self._retained and next(iter(self._retained)) <= acked_seq_id:
            self._release()

    def _release(self) -> None:
        _, (_, answer) = self._retained.popitem(last=False)
        self._retained_bytes -= len(answer)


def conflict(seq_id: int, next_seq_id: int) -> GradwireError:
    """A number that came again with another operation."""
    return error(
        "SEQ_ID_CONFLICT",
        f"seq_id {seq_id} was used before for another operation: another client works on this run. "
        f"The next operation is {next_seq_id}; attach again to take the run over.",
        expected=next_seq_id,
        got=seq_id,
    )


def error_response(seq_id: int, exc: GradwireError) -> TrainResponse:
    """An error as an answer inside the stream."""
    return TrainResponse(seq_id=seq_id, error=to_status(exc))
