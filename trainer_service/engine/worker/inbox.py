"""Commands between the thread that reads them and the one that executes them. Light: no torch.

Operations execute in the order they came. Commands of sampling overtake them: a request should join the batch, or leave
it, between two operations rather than after all that wait. Preparing a command (decoding a batch, tokenizing a prompt)
may take long: each of the two lines has a thread for it, so that neither waits for the other, and reading never waits.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

C = TypeVar("C")
P = TypeVar("P")

_AHEAD = 8
"""Operations prepared while one executes: enough to keep the device busy, few enough to bound memory."""


class _Line(Generic[C, P]):
    """Commands of one kind, in the order they came."""

    def __init__(self, ahead: int | None) -> None:
        self.ahead = ahead
        """How many may be prepared and not taken; None for any number."""
        self.raw: deque[C] = deque()
        self.prepared: deque[P] = deque()
        self.ended = False
        """Whether all commands are prepared and no more will come."""

    @property
    def next_may_be_prepared(self) -> bool:
        return bool(self.raw) and (self.ahead is None or len(self.prepared) < self.ahead)


class Inbox(Generic[C, P]):
    """Takes commands from a stream, prepares them ahead, and hands them out.

    Args:
        prepare: Decodes and checks a command; must not raise.
        overtakes: Whether a command overtakes operations.
    """

    def __init__(self, prepare: Callable[[C], P], overtakes: Callable[[C], bool]) -> None:
        self._prepare = prepare
        self._overtakes = overtakes
        self._changed = threading.Condition()
        self._in_turn: _Line[C, P] = _Line(_AHEAD)
        # The trainer bounds how many sample requests are under way.
        self._urgent: _Line[C, P] = _Line(None)
        self._ended = False

    def read(self, commands: Iterable[C]) -> None:
        """Reads commands until there are no more; on a thread of its own."""
        try:
            for command in commands:
                line = self._urgent if self._overtakes(command) else self._in_turn
                with self._changed:
                    line.raw.append(command)
                    self._changed.notify_all()
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def prepare_operations(self) -> None:
        """Prepares operations ahead of their turn until there are no more; on a thread of its own."""
        self._prepare_line(self._in_turn)

    def prepare_overtaking(self) -> None:
        """Prepares overtaking commands until there are no more; on a thread of its own."""
        self._prepare_line(self._urgent)

    def _prepare_line(self, line: _Line[C, P]) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: line.next_may_be_prepared or (self._ended and not line.raw))
                if not line.raw:
                    line.ended = True
                    self._changed.notify_all()
                    return
                command = line.raw.popleft()
            prepared = self._prepare(command)
            with self._changed:
                line.prepared.append(prepared)
                self._changed.notify_all()

    def take(self, *, wait: bool) -> tuple[P | None, bool]:
        """The next command, and whether it is an operation in its turn; None when there is none.

        Args:
            wait: Wait for one; None then means that none will come any more.
        """
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._urgent.prepared or self._in_turn.prepared or self._all_prepared)
            if self._urgent.prepared:
                return self._urgent.prepared.popleft(), False
            if self._in_turn.prepared:
                prepared = self._in_turn.prepared.popleft()
                self._changed.notify_all()
                return prepared, True
            return None, False

    def take_from(self, *, in_turn: bool) -> P:
        """The next operation, or the next that overtakes, which is there or will come."""
        line = self._in_turn if in_turn else self._urgent
        with self._changed:
            self._changed.wait_for(lambda: line.prepared or line.ended)
            prepared = line.prepared.popleft()
            self._changed.notify_all()
            return prepared

    @property
    def ended(self) -> bool:
        """Whether all commands have been taken and no more will come."""
        with self._changed:
            return self._all_prepared and not self._urgent.prepared and not self._in_turn.prepared

    @property
    def _all_prepared(self) -> bool:
        return self._urgent.ended and self._in_turn.ended
