"""Which requests wait, and which may run: by owner, and by the room that caches take now.

Room is taken as samples grow, not for all that they may come to. Where it runs out, the newest request of whoever takes
most is put back into its line without its caches, and computes them again, token by token as before, when its turn
comes: so its samples are the same as without. One put back twice comes in again only where all it may need fits, and
stays.

With several owners each has a share of samples and room that nobody else's requests keep it from. So behind one owner's
long samples another's request waits for a step or two. It may need more than that share: then it waits until others are
done, and after a while nobody new comes in before it.
"""

import time
from collections import Counter, deque
from collections.abc import Iterator

from trainer_service.engine.sampling.job import Job

_PATIENCE_S = 10.0
"""How long a request of an owner of whom nothing runs waits before it keeps others out."""
_GROWTH_SHARE = 8
"""One part in so many is left to those that run, to grow into, by a request of an owner who has others running."""
_MAX_PUT_BACK = 2


class Admission:
    """The requests that are not done.

    Args:
        max_rows: Samples that run at once; those of an owner's share come on top where others take them all.
        max_cache_bytes: Of all running requests' caches together; a request that needs more runs alone.
    """

    def __init__(self, *, max_rows: int, max_cache_bytes: int) -> None:
        self.max_rows = max_rows
        self.max_cache_bytes = max_cache_bytes
        self.running: list[Job] = []
        """In the order they came in."""
        self._waiting: dict[str, deque[Job]] = {}
        """By owner, in the order they came; no line is empty."""
        self._changed = False
        """Whether anybody came or went since admit looked: what grows makes no room."""

    def __iter__(self) -> Iterator[Job]:
        for line in self._waiting.values():
            yield from line
        yield from self.running

    def __len__(self) -> int:
        return len(self.running) + sum(map(len, self._waiting.values()))

    def add(self, job: Job) -> None:
        """Takes a request in: it waits."""
        self._waiting.setdefault(job.owner, deque()).append(job)
        self._changed = True

    def remove(self, job: Job) -> None:
        """Forgets a request."""
        self._changed = True
        if job in self.running:
            self.running.remove(job)
            return
        line = self._waiting[job.owner]
        line.remove(job)
        self._drop_line(job.owner)

    def admit(self) -> tuple[list[Job], list[Job]]:
        """Lets in whom there is room for.

        Returns:
            Those let in, and those put back to make their room.
        """
        let_in: dict[Job, None] = {}
        put_back: list[Job] = []
        if not self._changed:
            return [], []
        self._changed = False
        while (found := self._next()) is not None:
            job, others = found
            for other in others:
                self._put_back(other)
                put_back.append(other)
            self._waiting[job.owner].popleft()
            self._drop_line(job.owner)
            self.running.append(job)
            let_in[job] = None
        return [job for job in let_in if job in self.running], put_back

    def make_room(self) -> list[Job]:
        """Those put back for the rest to have room for a token more each."""
        put_back: list[Job] = []
        sizes = {job: self._bytes(job) for job in self.running}
        total = sum(sizes.values())
        while total > self.max_cache_bytes and len(self.running) > 1:
            taken = Counter[str]()
            for job in self.running:
                taken[job.owner] += sizes[job]
            movable = [job for job in self.running if not self._stays(job)]
            if not movable:
                break
            most = max(movable, key=lambda job: taken[job.owner]).owner
            newest = next(job for job in reversed(movable) if job.owner == most)
            total -= sizes[newest]
            self._put_back(newest)
            put_back.append(newest)
        return put_back

    def _next(self) -> tuple[Job, list[Job]] | None:
        """Who comes in next, and who is put back for it; None for nobody."""
        if not self._waiting:
            return None
        rows, taken = Counter[str](), Counter[str]()
        for job in self.running:
            rows[job.owner] += len(job.held)
            taken[job.owner] += self._bytes(job)
        now_s = time.monotonic()

        def impatient(job: Job) -> bool:
            return not rows[job.owner] and now_s - job.waiting_since_s > _PATIENCE_S

        heads = [line[0] for line in self._waiting.values()]
        for job in sorted(heads, key=lambda job: (not impatient(job), rows[job.owner], job.waiting_since_s)):
            others = self._others_to_put_back(job, rows, taken)
            if others is not None:
                return job, others
            if impatient(job):
                return None
        return None

    def _others_to_put_back(self, job: Job, rows: Counter[str], taken: Counter[str]) -> list[Job] | None:
        """Whom a request may come in for; None where it must wait."""
        if not self.running:
            return []
        num_owners = len({*self._waiting, *(other.owner for other in self.running)})
        own_rows = rows[job.owner]
        fits = rows.total() + len(job.held) <= self.max_rows
        if own_rows and not fits and own_rows + len(job.held) > self.max_rows // num_owners:
            return None
        room = self.max_cache_bytes
        if own_rows:
            room -= room // _GROWTH_SHARE
        needed, total = self._bytes(job), taken.total()
        if total + needed <= room:
            return []
        share = room // num_owners
        if taken[job.owner] + needed > share:
            return None
        others: list[Job] = []
        left = Counter(taken)
        for other in reversed(self.running):
            if other.owner != job.owner and left[other.owner] > share and not self._stays(other):
                others.append(other)
                left[other.owner] -= self._bytes(other)
                if left.total() + needed <= room:
                    return others
        return None

    def _put_back(self, job: Job) -> None:
        self.running.remove(job)
        job.put_back()
        self._waiting.setdefault(job.owner, deque()).appendleft(job)

    def _drop_line(self, owner: str) -> None:
        if not self._waiting[owner]:
            del self._waiting[owner]

    def _stays(self, job: Job) -> bool:
        return job.times_put_back >= _MAX_PUT_BACK

    def _bytes(self, job: Job) -> int:
        return job.cache_bytes(in_the_end=self._stays(job))
