"""Live updates for pages: server-sent events, made once a second for all open pages.

Changes are found once, and encoded once for all pages that may see them; a further page costs one write, also where
many open at once, and without pages nothing is done. A page that does not keep up is disconnected and continues from
where it was, like one whose laptop slept: the id of each event with points says which points of each run the page now
has.
"""

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from gradwire.errors import GradwireError, error

from trainer_service.access import Caller, current_caller
from trainer_service.page.page_json import Health, Rates, encode, operations_view, points_view, run_version, run_view
from trainer_service.page.sessions import Sessions
from trainer_service.runs.registry import Runs
from trainer_service.runs.run import Run
from trainer_service.runs.run_metrics import Points, RunMetrics
from trainer_service.runs.sampling import SampleRequests
from trainer_service.runs.sequence import Entry

logger = logging.getLogger(__name__)

INTERVAL_S = 1.0
_IDLE_TICKS = 15
"""After this long without news, a page is told that the trainer is still there."""
MAX_PAGES = 256
MAX_RUNS = 16
"""The most runs whose curves one page compares."""
_MAX_UNREAD = 16
"""How many seconds of events a page may be behind."""
_CURSOR = re.compile(r"([^=,]+)=(\d{1,19})")
_Version = tuple[int, int, int]
"""Of a run's operations: the next seq_id, how many are unanswered, the step."""


def read_cursors(text: str) -> dict[str, int]:
    """Which points of each run a page has: "run-a=12,run-b=40", as its last event's id said."""
    return {run_id: int(seq_id) for run_id, seq_id in _CURSOR.findall(text[:4096])}


@dataclass(eq=False)
class _Page:
    """An open page."""

    caller: Caller
    cursors: dict[str, int]
    """The last point it has of each run it follows."""
    events: asyncio.Queue[bytes | None] = field(default_factory=lambda: asyncio.Queue(_MAX_UNREAD))
    greeted: bool = False
    """Whether it has the full state, so that changes are enough."""
    told: dict[str, _Version] = field(default_factory=dict)
    """The version of operations it has of each run it follows."""
    idle_ticks: int = 0
    unsent: list[bytes] = field(default_factory=list)

    @property
    def group(self) -> tuple[bool, str]:
        """Pages of one group see the same."""
        return self.caller.admin, "" if self.caller.admin else self.caller.owner

    def tell(self, event: bytes) -> None:
        """Adds an event to what is sent next."""
        self.unsent.append(event)
        self.idle_ticks = 0

    def send(self) -> None:
        """Sends its events in one write: writes cost, not bytes."""
        if self.unsent and self.events.full():
            self.end()
        elif self.unsent:
            self.events.put_nowait(b"".join(self.unsent))
        self.unsent.clear()

    def end(self) -> None:
        """Ends its stream; a page that is still there opens another."""
        while not self.events.empty():
            self.events.get_nowait()
        self.events.put_nowait(None)


@dataclass
class _Group:
    """What pages that see the same have been told."""

    runs: dict[str, object]
    """The version of each run's view."""
    health: dict[str, Any]
    greeting: tuple[list[str], bytes] | None = None
    """(ids of all runs, event with everything) for pages that open before the next tick."""


@dataclass(frozen=True)
class _News:
    """What comes after some point of a run."""

    last_seq_id: int
    points: bytes
    operations: bytes


class Feed:
    """All pages that are open.

    Args:
        runs: The runs they show.
        metrics: The runs' curves.
        sampling: Requests to count.
        health: State of the trainer.
        sessions: Tells which keys are still valid; the streams of others end.
    """

    def __init__(
        self, runs: Runs, metrics: RunMetrics, sampling: SampleRequests, health: Health, sessions: Sessions
    ) -> None:
        self._runs = runs
        self._metrics = metrics
        self._sampling = sampling
        self._health = health
        self._sessions = sessions
        self._pages: set[_Page] = set()
        self._groups: dict[tuple[bool, str], _Group] = {}
        self._news: dict[tuple[str, int, _Version], _News] = {}
        """By run, last point and version; for pages that open before the next tick."""
        self._rates = Rates()
        self._ticking: asyncio.Task[None] | None = None
        self._closed = False
        self._telling = asyncio.Lock()

    def __len__(self) -> int:
        return len(self._pages)

    def open(self, run_ids: list[str], after: str) -> AsyncGenerator[bytes]:
        """Events for a page of the current caller, from now on.

        Args:
            run_ids: Runs whose curves and operations it shows; those that do not exist are ignored.
            after: Which of their points it has, see read_cursors.

        Raises:
            ResourceExhaustedError: LIMIT_EXCEEDED: too many runs, or pages.
        """
        if len(run_ids) > MAX_RUNS:
            raise error("LIMIT_EXCEEDED", f"A page compares at most {MAX_RUNS} runs.", limit=MAX_RUNS)
        if len(self._pages) >= MAX_PAGES:
            text = f"{MAX_PAGES} pages are open, the most that this trainer serves at once; close one."
            raise error("LIMIT_EXCEEDED", text, limit=MAX_PAGES)
        known = read_cursors(after)
        page = _Page(current_caller.get(), {run_id: known.get(run_id, 0) for run_id in run_ids})
        return self._events(page)

    async def _events(self, page: _Page) -> AsyncGenerator[bytes]:
        self._pages.add(page)
        if self._ticking is None or self._ticking.done():
            self._ticking = asyncio.create_task(self._tick_on(), name="page-feed")
        try:
            await self._greet(page)
            while not self._closed and (event := await page.events.get()) is not None:
                yield event
        finally:
            self._pages.discard(page)

    def close(self) -> None:
        """Ends every page's stream, and accepts no more."""
        self._closed = True
        self.disconnect_all()

    def disconnect_all(self) -> None:
        """Ends every page's stream; a page that is still open starts another."""
        for page in self._pages:
            page.end()

    async def _tick_on(self) -> None:
        """Sends updates as long as there are pages."""
        while self._pages:
            await asyncio.sleep(INTERVAL_S)
            for page in [page for page in self._pages if not self._sessions.opens(page.caller)]:
                page.end()
            try:
                await self._tell_all()
            except Exception:
                # Whatever failed this time may work the next.
                logger.exception("The pages could not be updated.")
        self._groups.clear()
        self._news.clear()

    async def _greet(self, page: _Page) -> None:
        """Sends a new page everything. Most of that is made once for all pages that open between two ticks."""
        # Two updates at once would send points twice.
        async with self._telling:
            runs = self._runs_for(page.caller)
            group = self._groups.get(page.group)
            if group is None:
                group = self._groups[page.group] = self._look_for(page.caller, runs)
            ids = [run.run_id for run in runs]
            if group.greeting is None or group.greeting[0] != ids:
                views = [run_view(run, page.caller, self._rates) for run in runs]
                group.greeting = ids, _event("state", {"full": True, "runs": views, "health": group.health})
            # Also tells it how long to wait before it connects again.
            page.tell(b"retry: 2000\n\n" + group.greeting[1])
            page.greeted = True
            await self._tell_runs((page,))
            page.send()

    async def _tell_all(self) -> None:
        """Sends all pages what has changed."""
        async with self._telling:
            pages = [page for page in self._pages if page.greeted]
            self._rates.look(self._runs.everybodys())
            self._tell_state(pages)
            self._news.clear()
            await self._tell_runs(pages)
            for page in pages:
                page.idle_ticks += 1
                if page.idle_ticks > _IDLE_TICKS:
                    page.tell(b": still here\n\n")
                page.send()

    def _tell_state(self, pages: Sequence[_Page]) -> None:
        """Sends changes of runs and health."""
        by_group: dict[tuple[bool, str], list[_Page]] = {}
        for page in pages:
            by_group.setdefault(page.group, []).append(page)
        groups: dict[tuple[bool, str], _Group] = {}
        for key, members in by_group.items():
            caller, known = members[0].caller, self._groups[key]
            runs = self._runs_for(caller)
            now = groups[key] = self._look_for(caller, runs)
            changed = [run for run in runs if known.runs.get(run.run_id) != now.runs[run.run_id]]
            gone = [run_id for run_id in known.runs if run_id not in now.runs]
            if changed or gone or now.health != known.health:
                views = [run_view(run, caller, self._rates) for run in changed]
                news: dict[str, Any] = {"runs": views, "gone": gone}
                if now.health != known.health:
                    news["health"] = now.health
                event = _event("state", news)
                for page in members:
                    page.tell(event)
        self._groups = groups

    def _runs_for(self, caller: Caller) -> list[Run]:
        return [run for run in self._runs.everybodys() if caller.may_see(run.owner)]

    def _look_for(self, caller: Caller, runs: list[Run]) -> _Group:
        more = {"sample_requests": len(self._sampling), "pages": len(self), "operations": self._runs.unanswered}
        versions = {run.run_id: run_version(run, self._rates) for run in runs}
        return _Group(versions, self._health.view(caller, **more))

    async def _tell_runs(self, pages: Sequence[_Page]) -> None:
        """Sends points and operations of the runs that pages follow."""
        for page in pages:
            for run_id, cursor in list(page.cursors.items()):
                token = current_caller.set(page.caller)
                try:
                    run = self._runs.get(run_id)
                except GradwireError:
                    continue  # Deleted, or never existed; the list of runs shows that.
                finally:
                    current_caller.reset(token)
                version = run.next_seq_id, run.unanswered, run.step
                if page.told.get(run_id) == version and not run.unanswered:
                    continue
                try:
                    news = self._news.get((run_id, cursor, version)) or await self._look(run, cursor)
                except GradwireError as exc:
                    logger.info("A run's curves cannot be shown.", extra={"fields": {"error": exc.message}})
                    continue
                self._news[run_id, cursor, version] = news
                page.told[run_id] = version
                page.cursors[run_id] = news.last_seq_id
                if news.points:
                    ids = ",".join(f"{each}={seq_id}" for each, seq_id in page.cursors.items())
                    page.tell(b"id: " + ids.encode() + b"\n" + news.points)
                page.tell(news.operations)

    async def _look(self, run: Run, cursor: int) -> _News:
        """What comes after a point."""
        pieces: list[bytes] = []
        while True:
            points = await self._metrics.points(run, after_seq_id=cursor)
            if points.seq_ids:
                pieces.append(await asyncio.to_thread(_points_event, run.run_id, points))
                cursor = points.seq_ids[-1]
            if not points.more:
                break
        operations = _event("operations", operations_view(run, points.recent, executing=self._executing()))
        return _News(cursor, b"".join(pieces), operations)

    def _executing(self) -> Entry | None:
        """The operation that the worker executes; it executes them in the order they came."""
        waiting = [run.under_way[0] for run in self._runs.everybodys() if run.unanswered and run.placement.live]
        return min(waiting, key=lambda entry: entry.received_s, default=None)


def _points_event(run_id: str, points: Points) -> bytes:
    return _event("points", points_view(run_id, points))


def _event(name: str, found: Any) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + encode(found) + b"\n\n"
