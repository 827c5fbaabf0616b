"""Commands between the thread that reads them and the one that executes them. Light: no torch.

Operations execute in the order they came. What belongs to sampling overtakes them: a request should join the batch, or
leave it, between two operations rather than behind all that wait.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

C = TypeVar("C")
P = TypeVar("P")

_AHEAD = 8
"""Operations decoded while one executes: enough to keep the device busy, few enough to bound memory."""


class Inbox(Generic[C, P]):
    """Takes commands from a stream, decodes them ahead, and hands them out.

    Args:
        prepare: Decodes a command; must not raise.
        overtakes: Whether a command is of those that overtake.
    """

    def __init__(self, prepare: Callable[[C], P], overtakes: Callable[[C], bool]) -> None:
        self._prepare = prepare
        self._overtakes = overtakes
        self._changed = threading.Condition()
        self._raw: deque[C] = deque()
        self._decoded: deque[P] = deque()
        self._urgent: deque[P] = deque()
        self._ended = False
        self._read = False

    def read(self, commands: Iterable[C]) -> None:
        """Takes commands in until there are no more; on a thread of its own."""
        try:
            for command in commands:
                overtakes = self._overtakes(command)
                prepared = self._prepare(command) if overtakes else None
                with self._changed:
                    if prepared is None:
                        self._raw.append(command)
                    else:
                        self._urgent.append(prepared)
                    self._changed.notify_all()
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def decode(self) -> None:
        """Decodes operations ahead of their turn until there are no more; on a thread of its own."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ended or (self._raw and len(self._decoded) < _AHEAD))
                if not self._raw:
                    self._read = self._ended
                    self._changed.notify_all()
                    if self._ended:
                        return
                    continue
                command = self._raw.popleft()
            prepared = self._prepare(command)
            with self._changed:
                self._decoded.append(prepared)
                self._changed.notify_all()

    def take(self, *, wait: bool) -> tuple[P | None, bool]:
        """The next command, and whether it is an operation in its turn; None when there is none.

        Args:
            wait: Wait for one; None then means that none will come any more.
        """
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._urgent or self._decoded or self._read)
            if self._urgent:
                return self._urgent.popleft(), False
            if self._decoded:
                prepared = self._decoded.popleft()
                self._changed.notify_all()
                return prepared, True
            return None, False

    @property
    def ended(self) -> bool:
        """Whether all commands there will ever be have been taken."""
        with self._changed:
            return self._read and not self._urgent and not self._decoded
