"""The order of one run's operations. Pure: no clock, no network, no worker.

`seq_id` is order, reply address and idempotency key at once. The next number is taken; a number skipped is a gap; a
number seen before is a repeat, which gets the first answer if it is the same operation and is refused if it is another.
"""

import hashlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from gradwire.errors import GradwireError, error, to_status
from gradwire.v1.trainer_service_pb2 import TrainRequest, TrainResponse

Answered = Callable[[TrainResponse], object]

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
    waiters: list[Answered] = field(default_factory=list)
    response: TrainResponse | None = None
    size_bytes: int = 0


def digest(request: TrainRequest) -> bytes:
    """Tells operations apart: over kind and content, not over how they were sent."""
    kind = request.WhichOneof("operation") or ""
    content = getattr(request, kind).SerializeToString(deterministic=True)
    return hashlib.blake2b(content, digest_size=16, person=kind.encode()[:16]).digest()


class Sequence:
    """Numbers taken, answers kept.

    Args:
        min_retained_answers: The latest answers are kept until acknowledged whatever their size. A client that keeps
            to this many operations in flight therefore never loses an answer with its connection.
    """

    def __init__(self, *, min_retained_answers: int) -> None:
        self._min_retained_answers = min_retained_answers
        self._entries: dict[int, Entry] = {}
        self._retained: deque[Entry] = deque()
        self._retained_bytes = 0
        self.next_seq_id = 1
        self.unanswered = 0

    def receive(self, request: TrainRequest, answered: Answered) -> Entry | None:
        """Takes an operation in.

        Args:
            request: With its seq_id.
            answered: Gets the answer; at once, if it is already there.

        Returns:
            The new entry, to be executed; None for a repeat.

        Raises:
            GradwireError: SEQ_ID_GAP, SEQ_ID_CONFLICT or ANSWER_RELEASED. Nothing was changed.
        """
        seq_id = request.seq_id
        if seq_id > self.next_seq_id:
            raise error(
                "SEQ_ID_GAP",
                f"seq_id is {seq_id}, but the next operation of this run is {self.next_seq_id}; numbers have no gaps.",
                expected=self.next_seq_id,
                got=seq_id,
            )
        if seq_id == self.next_seq_id:
            entry = Entry(seq_id, digest(request), [answered])
            self._entries[seq_id] = entry
            self.next_seq_id += 1
            self.unanswered += 1
            return entry
        entry = self._entries.get(seq_id)
        if entry is None:
            raise error(
                "ANSWER_RELEASED",
                f"seq_id {seq_id} was executed, and its answer let go after it was acknowledged or too many waited. "
                f"The next operation of this run is {self.next_seq_id}.",
                expected=self.next_seq_id,
                got=seq_id,
            )
        if entry.digest != digest(request):
            raise error(
                "SEQ_ID_CONFLICT",
                f"seq_id {seq_id} was used before for another operation: another client works on this run. "
                f"The next operation is {self.next_seq_id}; attach again to take the run over.",
                expected=self.next_seq_id,
                got=seq_id,
            )
        if entry.response is not None:
            answered(entry.response)
        else:
            entry.waiters.append(answered)
        return None

    def answer(self, entry: Entry, response: TrainResponse) -> None:
        """Records an operation's one answer and hands it to all who wait."""
        assert entry.response is None, f"operation {entry.seq_id} was answered twice"
        response.seq_id = entry.seq_id
        entry.response = response
        entry.size_bytes = response.ByteSize()
        self.unanswered -= 1
        self._retained.append(entry)
        self._retained_bytes += entry.size_bytes
        while len(self._retained) > MAX_RETAINED_ANSWERS or (
            self._retained_bytes > MAX_RETAINED_BYTES and len(self._retained) > self._min_retained_answers
        ):
            self._release(self._retained.popleft())
        waiters, entry.waiters = entry.waiters, []
        for answered in waiters:
            answered(response)

    def acknowledge(self, acked_seq_id: int) -> None:
        """Lets go of the answers up to acked_seq_id."""
        while self._retained and self._retained[0].seq_id <= acked_seq_id:
            self._release(self._retained.popleft())

    def _release(self, entry: Entry) -> None:
        self._retained_bytes -= entry.size_bytes
        del self._entries[entry.seq_id]


def error_response(exc: GradwireError) -> TrainResponse:
    """An error as an answer inside the stream."""
    return TrainResponse(error=to_status(exc))
