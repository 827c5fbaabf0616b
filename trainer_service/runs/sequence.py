"""The order of one run's operations. Pure: no clock, no network, no worker.

`seq_id` is order, reply address and idempotency key at once. The next number is accepted; a number further ahead is a
gap; a number seen before is a repeat, which gets the first answer if the operation is the same and is refused if not.
Which run's operation executes next, the worker decides (engine/worker/inbox.py).
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
"""Answers kept for a client that does not acknowledge, such as one typing by hand; the oldest are released first. No
operation waits for acknowledgements, since they come after it on the same stream."""
MAX_RETAINED_BYTES = 256 * 1024 * 1024
"""Bytes of such answers."""


@dataclass(eq=False)
class Entry:
    """One operation of the run."""

    seq_id: int
    digest: bytes
    operation: Operation
    """What to execute; its request is empty if there was no room to write it down."""
    kind: str
    waiters: list[Answered] = field(default_factory=list)
    failure: GradwireError | None = None
    """What it failed with without being executed; the failure's effect on the run is still to come."""
    attempts: int = 0
    """Times it was sent to a worker, not counting those that a death during another operation undid."""
    deaths: int = 0
    """Workers that died while they executed it, under earlier trainers too."""
    received_s: float = 0.0
    """When it came, by time.perf_counter, as all times here."""
    journalled_s: float = 0.0
    """When it was on disk; 0 before, and where an earlier trainer wrote it down."""
    sent_ahead: bool = False
    """Whether it was sent to the worker before it was on disk, and is not known to be on disk yet."""
    unwritten: bool = False
    """Whether it could not be written down, and is refused for that."""
    step_before: int | None = None
    """The run's step before the worker executed it ahead; None where it has not."""
    done_s: float = 0.0
    """When the worker had executed it; 0 before, and where none did."""
    memory_bytes: float = 0.0
    """What the worker took for it, as it said; 0 where it did not."""
    taken_up: bool = False
    """Whether an earlier trainer received it."""
    deaths_s: list[float] = field(default_factory=list)
    """When workers died while they executed it."""
    restorations: list[Any] = field(default_factory=list)
    """Span contexts of those its run needed meanwhile; see operation_spans.py."""


class Sequence:
    """Which seq_ids were used, and the answers kept for repeats.

    Args:
        min_retained_answers: So many of the latest answers are kept until acknowledged, whatever their size. A client
            with at most this many operations in flight therefore never loses an answer with its connection.
        next_seq_id: seq_id of the next new operation.
    """

    def __init__(self, *, min_retained_answers: int, next_seq_id: int = 1) -> None:
        self._min_retained_answers = min_retained_answers
        self._waiting: dict[int, Entry] = {}
        self._waiting_bytes = 0
        # (digest, answer) in the order of answers. Requests are not kept: they may be megabytes.
        self._retained: OrderedDict[int, tuple[bytes, bytes]] = OrderedDict()
        self._retained_bytes = 0
        self.next_seq_id = next_seq_id

    @property
    def unanswered(self) -> int:
        """Operations that wait for their answer."""
        return len(self._waiting)

    @property
    def waiting(self) -> list[Entry]:
        """Operations that wait for their answer, in order."""
        return list(self._waiting.values())

    @property
    def unanswered_bytes(self) -> int:
        """Memory that they take."""
        return self._waiting_bytes

    def receive(self, operation: Operation, answered: Answered) -> Entry | None:
        """Accepts an operation.

        Args:
            operation: Has its seq_id.
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
                f"seq_id {seq_id} was executed; its answer was acknowledged, or dropped because too many waited. "
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
        """Waits for the answer to a received operation.

        Args:
            seq_id: Its number.
            answered: Gets the answer; at once, if it is already there.

        Returns:
            A function that ends the waiting; None if the answer was released.

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
        """Waits for an operation's answer; also used for one that an earlier trainer received."""
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
        """Releases the answers up to acked_seq_id."""
        while self._retained and next(iter(self._retained)) <= acked_seq_id:
            self._release()

    def _release(self) -> None:
        _, (_, answer) = self._retained.popitem(last=False)
        self._retained_bytes -= len(answer)


def conflict(seq_id: int, next_seq_id: int) -> GradwireError:
    """The error for a seq_id that was used for another operation."""
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


def poisoned(entry: Entry, run_id: str) -> GradwireError:
    """Why an operation is given up that workers died of."""
    return error(
        "OPERATION_POISONED",
        f"Operation {entry.seq_id} ({entry.kind}) of {run_id} was given up: the worker died {entry.deaths} times "
        "while executing it. The run is as it was before this call, and continues; the trainer's log has the cause of "
        "each death. Send less at once, or other data.",
        seq_id=entry.seq_id,
        deaths=entry.deaths,
    )
