"""What of a sampler is answered, told to clients that ask about all their requests with one long poll."""

import asyncio
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

CLONE_SIZE = 1_000_000_000
"""A copy of a sampling client, in another process, counts its requests from its own multiple of this."""
_LINGER_S = 0.005
"""How long an answer waits, so that others can be told with it."""

Target = tuple[str, int]
"""A sampler's id, and the number of the copy of its client."""


def target_of(request_id: str) -> Target:
    """The target of a sample request."""
    sampler_id, _, seq_id = request_id.rpartition(":")
    return sampler_id, int(seq_id) // CLONE_SIZE


@dataclass
class _Queue:
    """The answered requests of one target, oldest first."""

    answered: deque[tuple[int, dict[str, Any]]] = field(default_factory=deque)
    came: asyncio.Event = field(default_factory=asyncio.Event)


class Completions:
    """Answered requests by target, in the order of their cursors: microseconds since 1970, which go on where an earlier
    gateway's ended."""

    def __init__(self) -> None:
        self._queues: dict[Target, _Queue] = {}
        self._last = 0

    def tick(self) -> int:
        """The next cursor."""
        self._last = max(self._last + 1, time.time_ns() // 1000)
        return self._last

    def knows(self, target: Target) -> bool:
        """Whether a client has asked about this target; for others nothing is kept."""
        return target in self._queues

    def open(self, target: Target, answered: Iterable[tuple[int, str, int | None]]) -> None:
        """Starts keeping what is answered for a target that a client asks about for the first time.

        Args:
            target: The target.
            answered: (cursor, request id, size in bytes, or None for a failure) of what is answered already.
        """
        self._queues[target] = _Queue()
        for cursor, request_id, size_bytes in sorted(answered):
            self.add(cursor, request_id, size_bytes)

    def add(self, cursor: int, request_id: str, size_bytes: int | None) -> None:
        """Notes that a request is answered; size_bytes is None for a failure."""
        queue = self._queues.get(target_of(request_id))
        if queue is None:
            return
        told: dict[str, Any] = {"state": "failed" if size_bytes is None else "finished", "request_id": request_id}
        if size_bytes is not None:
            told["response_payload_uncompressed_size"] = size_bytes
        queue.answered.append((cursor, told))
        queue.came.set()

    async def since(self, target: Target, cursor: int) -> tuple[list[dict[str, Any]], int]:
        """(what was answered behind the cursor, the cursor behind that); waits for something. What is before the cursor
        is forgotten."""
        queue = self._queues[target]
        while queue.answered and queue.answered[0][0] <= cursor:
            queue.answered.popleft()
        if not queue.answered:
            queue.came.clear()
            await queue.came.wait()
            await asyncio.sleep(_LINGER_S)
        return [told for _, told in queue.answered], queue.answered[-1][0]

    def forget(self, sampler_ids: Iterable[str]) -> None:
        """Forgets targets that nobody asks about any more."""
        gone = set(sampler_ids)
        self._queues = {target: queue for target, queue in self._queues.items() if target[0] not in gone}
