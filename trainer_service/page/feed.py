"""Live updates for pages: server-sent events, made once a second for all open pages.

Changes are found once, and encoded once for all pages that may see them; a further page costs one write, and without
pages nothing is done. A page that does not keep up is disconnected and continues from where it was, like one whose
laptop slept: the id of each event with points says which points of each run the page now has.
"""

import asyncio
import logging
import re
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from gradwire.errors import GradwireError, error

from trainer_service.access import Caller, current_caller
from trainer_service.page.page_json import Health, Rates, encode, operations_view, points_view, run_view
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
    told: dict[str, object] = field(default_factory=dict)
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

    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    health: dict[str, Any] = field(default_factory=dict)


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
            # Tells the page that it is connected, and how long to wait before it reconnects.
            yield b"retry: 2000\n\n"
            await self._tell((page,))
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
                await self._tell(tuple(self._pages))
            except Exception:
                # Whatever failed this time may work the next.
                logger.exception("The pages could not be updated.")
        self._groups.clear()

    async def _tell(self, pages: tuple[_Page, ...]) -> None:
        # Two updates at once would send points twice.
        async with self._telling:
            await self._tell_all(pages)

    async def _tell_all(self, pages: tuple[_Page, ...]) -> None:
        self._rates.look(self._runs.everybodys())
        self._tell_state(pages)
        await self._tell_runs(pages)
        for page in pages:
            page.idle_ticks += 1
            if page.idle_ticks > _IDLE_TICKS:
                page.tell(b": still here\n\n")
            page.send()

    def _tell_state(self, pages: tuple[_Page, ...]) -> None:
        """Sends runs and health: everything to new pages, changes to the others."""
        by_group: dict[tuple[bool, str], list[_Page]] = {}
        for page in pages:
            by_group.setdefault(page.group, []).append(page)
        for key, members in by_group.items():
            caller = members[0].caller
            runs = {
                run.run_id: run_view(run, caller, self._rates)
                for run in self._runs.everybodys()
                if caller.may_see(run.owner)
            }
            more = {"sample_requests": len(self._sampling), "pages": len(self), "operations": self._runs.unanswered}
            health = self._health.view(caller, **more)
            known = self._groups.setdefault(key, _Group())
            new = [page for page in members if not page.greeted]
            if new:
                everything = _event("state", {"full": True, "runs": list(runs.values()), "health": health})
                for page in new:
                    page.tell(everything)
                    page.greeted = True
            if len(pages) == 1 and new:
                continue  # Only the new page; the others are updated at the next tick.
            changed = [run for run_id, run in runs.items() if known.runs.get(run_id) != run]
            gone = [run_id for run_id in known.runs if run_id not in runs]
            if changed or gone or health != known.health:
                news: dict[str, Any] = {"runs": changed, "gone": gone}
                if health != known.health:
                    news["health"] = health
                event = _event("state", news)
                for page in members:
                    if page not in new:
                        page.tell(event)
            known.runs, known.health = runs, health

    async def _tell_runs(self, pages: tuple[_Page, ...]) -> None:
        """Sends points and operations of the runs that pages follow."""
        executing = self._executing()
        made: dict[tuple[str, int], tuple[int, bytes]] = {}
        operations: dict[str, bytes] = {}
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
                    if (run_id, cursor) not in made:
                        made[run_id, cursor] = await self._look(run, cursor, executing, operations)
                except GradwireError as exc:
                    logger.info("A run's curves cannot be shown.", extra={"fields": {"error": exc.message}})
                    continue
                page.told[run_id] = version
                page.cursors[run_id], points = made[run_id, cursor]
                if points:
                    ids = ",".join(f"{each}={seq_id}" for each, seq_id in page.cursors.items())
                    page.tell(b"id: " + ids.encode() + b"\n" + points)
                page.tell(operations[run_id])

    async def _look(
        self, run: Run, cursor: int, executing: Entry | None, operations: dict[str, bytes]
    ) -> tuple[int, bytes]:
        """(last point, event with the points after a cursor); also fills in the run's operations."""
        pieces: list[bytes] = []
        while True:
            points = await self._metrics.points(run, after_seq_id=cursor)
            if points.seq_ids:
                pieces.append(await asyncio.to_thread(_points_event, run.run_id, points))
                cursor = points.seq_ids[-1]
            if not points.more:
                break
        operations[run.run_id] = _event("operations", operations_view(run, points.recent, executing=executing))
        return cursor, b"".join(pieces)

    def _executing(self) -> Entry | None:
        """The operation that the worker executes; it executes them in the order they came."""
        waiting = [run.under_way[0] for run in self._runs.everybodys() if run.unanswered and run.placement.live]
        return min(waiting, key=lambda entry: entry.received_s, default=None)


def _points_event(run_id: str, points: Points) -> bytes:
    return _event("points", points_view(run_id, points))


def _event(name: str, found: Any) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + encode(found) + b"\n\n"
