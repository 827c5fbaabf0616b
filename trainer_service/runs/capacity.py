"""Room on the worker: how many runs it holds, which are restored first, and which make room for others."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Mapping

from gradwire.errors import GradwireError, error

from trainer_service.fleet.worker import Worker
from trainer_service.runs.run import Run

logger = logging.getLogger(__name__)

_TURN_S = 1.0
"""How often runs are checked for unloading and restoring."""
_PAUSE_S = 1.0
"""How long a run must have been quiet before it makes room for one that waits."""


class Capacity:
    """Room for runs on one worker.

    Args:
        worker: Holds the runs.
        runs: All runs, by run_id.
        max_runs: The most it holds.
        max_runs_per_key: The most one owner may have, on the worker or not; 0 for no limit.
        idle_lease_s: How long a run that nobody holds and nobody calls stays loaded; 0 for ever.
    """

    def __init__(
        self, worker: Worker, runs: Mapping[str, Run], *, max_runs: int, max_runs_per_key: int, idle_lease_s: float
    ) -> None:
        self._worker = worker
        self._runs = runs
        self._max_runs = max_runs
        self._max_runs_per_key = max_runs_per_key
        self._idle_lease_s = idle_lease_s
        self._being_made: list[str | None] = []
        """The owners of runs that are being made."""

    def full(self) -> GradwireError | None:
        """Why there is no room for another run; None if there is."""
        active = len(self._being_made) + sum(run.placement.on_worker for run in self._runs.values())
        if active < self._max_runs:
            return None
        return error(
            "LIMIT_EXCEEDED",
            f"This trainer's worker holds {active} runs and takes at most {self._max_runs}. Delete one with "
            f"DeleteRun, or leave one alone: {self._idle_lease_s:g} s after its last call it makes room.",
            limit=self._max_runs,
            got=active + 1,
        )

    @contextlib.asynccontextmanager
    async def one_more(self, *, owner: str | None) -> AsyncGenerator[None]:
        """Reserves room for another run while it is being made.

        Args:
            owner: Whose run it will be; None for the copy that a replay makes.

        Raises:
            GradwireError: LIMIT_EXCEEDED, WORKER_NOT_READY.
        """
        refusal = self._too_many(owner) if owner is not None else None
        if (refusal := refusal or self.full()) is not None:
            raise refusal
        if self._worker.ready is None:
            text = f"The worker is not ready: {self._worker.status_message}."
            raise error("WORKER_NOT_READY", text, retry_after_s=0.5)
        # Counted at once, so that runs made at the same time count against each other.
        self._being_made.append(owner)
        try:
            yield
        finally:
            self._being_made.remove(owner)

    def _too_many(self, owner: str) -> GradwireError | None:
        own = self._being_made.count(owner) + sum(not run.lost and run.owner == owner for run in self._runs.values())
        if not self._max_runs_per_key or own < self._max_runs_per_key:
            return None
        return error(
            "LIMIT_EXCEEDED",
            f"This API key has {own} runs and may have at most {self._max_runs_per_key}; delete one with DeleteRun.",
            limit=self._max_runs_per_key,
            got=own + 1,
        )

    def bring_back(self) -> None:
        """A worker is ready: restores the wanted runs, first those that had a place and have work."""
        wanted = [run for run in self._runs.values() if run.placement.waiting or run.attachment is not None]
        for run in sorted(wanted, key=lambda run: (not run.placement.has_place, not run.placement.waiting)):
            run.placement.wake()

    def let_in(self, *, made_room: bool = True) -> None:
        """Restores as many waiting runs as there is room for, those that have waited longest first.

        Args:
            made_room: Whether a run was unloaded, which may have freed memory for another.
        """
        for run in self._waiting():
            if self.full() is None and (made_room or time.monotonic() >= run.placement.not_before_s):
                run.placement.wake()

    async def keep(self) -> None:
        """Unloads unused runs, and quiet runs for those that wait; until cancelled."""
        lease_s = self._idle_lease_s
        while True:
            await asyncio.sleep(min(_TURN_S, lease_s / 4) if lease_s > 0 else _TURN_S)
            for run in list(self._runs.values()):
                over = lease_s > 0 and run.placement.live and run.idle and time.monotonic() - run.used_s > lease_s
                if over and await self._unload(run, keep_place=False):
                    logger.info("Unloaded an idle run.", extra={"fields": {"run_id": run.run_id}})
            self.let_in(made_room=False)
            if self._waiting():
                await self._make_room()

    def _waiting(self) -> list[Run]:
        waiting = [run for run in self._runs.values() if run.placement.waits_for_room]
        return sorted(waiting, key=lambda run: run.used_s)

    async def _make_room(self) -> None:
        """Unloads the least recently used run, attached or not, that has nothing under way."""
        paused_s = time.monotonic() - _PAUSE_S
        paused = [run for run in self._runs.values() if run.used_s < paused_s and not run.unanswered]
        for run in sorted(paused, key=lambda run: run.used_s):
            if await self._unload(run, keep_place=True):
                logger.info("Unloaded a run for one that waits.", extra={"fields": {"run_id": run.run_id}})
                self.let_in()
                return

    async def _unload(self, run: Run, *, keep_place: bool) -> bool:
        try:
            return await run.placement.unload(keep_place=keep_place)
        except Exception:
            # One run's failure must not stop the unloading of others.
            logger.exception("Unloading a run failed.", extra={"fields": {"run_id": run.run_id}})
            return False
