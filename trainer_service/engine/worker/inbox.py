"""Commands between the thread that reads them and the one that executes them. Light: no torch.

Operations execute in the order they came. Commands of sampling overtake them: a request should join the batch, or leave
it, between two operations rather than after all that wait. Preparing a command (decoding a batch, tokenizing a prompt)
may take long: each of the two lines has a thread for it, so that neither waits for the other, and reading never waits.
A small operation that finds the executing thread idle is prepared there.
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
    """Commands of one kind, in the order they came.

    Args:
        ahead: How many may be prepared and not taken; None for any number.
        lock: The inbox's.
    """

    def __init__(self, ahead: int | None, lock: threading.Lock) -> None:
        self.ahead = ahead
        self.raw: deque[tuple[C, bool]] = deque()  # And whether it is quick.
        self.prepared: deque[P] = deque()
        self.preparing = False
        """Whether a thread prepares one of them."""
        self.ended = False
        """Whether all commands are prepared and no more will come."""
        self.changed = threading.Condition(lock)
        """For the thread that prepares."""

    @property
    def next_may_be_prepared(self) -> bool:
        free = self.ahead is None or len(self.prepared) < self.ahead
        return bool(self.raw) and not self.preparing and free


class Inbox(Generic[C, P]):
    """Takes commands from a stream, prepares them ahead, and hands them out.

    Args:
        prepare: Decodes and checks a command; must not raise.
        overtakes: Whether a command overtakes operations.
        quick: Whether an operation is prepared so quickly that the thread that executes may do it while it is idle.
    """

    def __init__(
        self,
        prepare: Callable[[C], P],
        overtakes: Callable[[C], bool],
        *,
        quick: Callable[[C], bool] = lambda command: False,
    ) -> None:
        self._prepare = prepare
        self._overtakes = overtakes
        self._quick = quick
        self._lock = threading.Lock()
        self._in_turn: _Line[C, P] = _Line(_AHEAD, self._lock)
        # The trainer bounds how many sample requests are under way.
        self._urgent: _Line[C, P] = _Line(None, self._lock)
        self._takes = threading.Condition(self._lock)  # For the thread that executes.
        self._idle = False  # Whether that one waits for whatever comes.
        self._ended = False

    def read(self, commands: Iterable[C]) -> None:
        """Reads commands until there are no more; on a thread of its own."""
        try:
            for command in commands:
                line = self._urgent if self._overtakes(command) else self._in_turn
                quick = line is self._in_turn and self._quick(command)
                with self._lock:
                    line.raw.append((command, quick))
                    # One thread is woken rather than two in turn.
                    here = line is self._in_turn and self._may_prepare_here()
                    (self._takes if here else line.changed).notify()
        finally:
            with self._lock:
                self._ended = True
                for condition in (self._in_turn.changed, self._urgent.changed, self._takes):
                    condition.notify_all()

    def prepare_operations(self) -> None:
        """Prepares operations ahead of their turn until there are no more; on a thread of its own."""
        self._prepare_line(self._in_turn)

    def prepare_overtaking(self) -> None:
        """Prepares overtaking commands until there are no more; on a thread of its own."""
        self._prepare_line(self._urgent)

    def _prepare_line(self, line: _Line[C, P]) -> None:
        while True:
            with self._lock:
                line.changed.wait_for(lambda: line.next_may_be_prepared or (self._ended and not line.raw))
                if not line.raw:
                    line.ended = True
                    self._takes.notify_all()
                    return
                command, _ = line.raw.popleft()
                line.preparing = True
            prepared = self._prepare(command)
            with self._lock:
                line.preparing = False
                line.prepared.append(prepared)
                self._takes.notify_all()

    def take(self, *, wait: bool) -> tuple[P | None, bool]:
        """The next command, and whether it is an operation in its turn; None when there is none.

        Args:
            wait: Wait for one, and prepare it here if nobody has; None then means that none will come any more.
        """
        with self._lock:
            if wait:
                self._idle = True
                self._takes.wait_for(
                    lambda: (
                        self._urgent.prepared
                        or self._in_turn.prepared
                        or self._may_prepare_here()
                        or self._all_prepared
                    )
                )
            here, self._idle = self._may_prepare_here(), False
            if self._urgent.prepared:
                # What came meanwhile was left to this thread.
                self._in_turn.changed.notify()
                return self._urgent.prepared.popleft(), False
            if self._in_turn.prepared:
                return self._take_operation(), True
            if not here:
                return None, False
            command, _ = self._in_turn.raw.popleft()
            self._in_turn.preparing = True
        prepared = self._prepare(command)
        with self._lock:
            self._in_turn.preparing = False
            self._in_turn.changed.notify()
        return prepared, True

    def take_from(self, *, in_turn: bool) -> P:
        """The next operation, or the next that overtakes, which is there or will come."""
        line = self._in_turn if in_turn else self._urgent
        with self._lock:
            self._takes.wait_for(lambda: line.prepared or line.ended)
            return self._take_operation() if in_turn else line.prepared.popleft()

    def _may_prepare_here(self) -> bool:
        """Whether the executing thread is idle, and may prepare the next operation itself."""
        return self._idle and self._in_turn.next_may_be_prepared and self._in_turn.raw[0][1]

    def _take_operation(self) -> P:
        prepared = self._in_turn.prepared.popleft()
        self._in_turn.changed.notify()
        return prepared

    @property
    def ended(self) -> bool:
        """Whether all commands have been taken and no more will come."""
        with self._lock:
            return self._all_prepared and not self._urgent.prepared and not self._in_turn.prepared

    @property
    def _all_prepared(self) -> bool:
        return self._urgent.ended and self._in_turn.ended
