"""A second worker that has imported its libraries, holds no model, and waits until the first one dies.

Imports are most of a start on a machine with a small model, and the same every time.
"""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable

from trainer_service.fleet.rank_processes import WorkerRanks

logger = logging.getLogger(__name__)

Start = Callable[[str], Awaitable[WorkerRanks]]


class Spare:
    """At most one spare worker.

    Args:
        start: Starts ranks that wait, given the token by which they will prove to be the worker.
        socket: Returns the path at which ranks started now will call.
        after_s: How long a worker must have been ready before it gets a spare; 0 for none ever.
    """

    def __init__(self, start: Start, socket: Callable[[], str], *, after_s: float) -> None:
        self._start = start
        self._socket = socket
        self._after_s = after_s
        self._task: asyncio.Task[None] | None = None
        self._token = self._path = ""
        self._ranks: WorkerRanks | None = None

    def prepare(self) -> None:
        """Has a spare started in a while, unless there is one."""
        if self._after_s and self._ranks is None and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._prepare(), name="spare-worker")

    async def take(self, path: str) -> tuple[str, WorkerRanks] | None:
        """The spare's token and its ranks, which have been told to begin; None if there is none of use.

        Args:
            path: Of the trainer's socket, which may not be where it was.
        """
        await self._give_up_preparing()
        ranks, self._ranks = self._ranks, None
        if ranks is None:
            return None
        if not ranks.all_run or self._path != path:
            await ranks.stop(grace_s=0)
            return None
        logger.info("The spare worker takes over.")
        ranks.begin()
        return self._token, ranks

    async def stop(self) -> None:
        """Ends it."""
        await self._give_up_preparing()
        if self._ranks is not None:
            await self._ranks.stop(grace_s=0)
            self._ranks = None

    async def _give_up_preparing(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _prepare(self) -> None:
        await asyncio.sleep(self._after_s)
        token = secrets.token_urlsafe(32)
        try:
            self._ranks = await self._start(token)
        except OSError as exc:
            # The next worker then starts as the first one did.
            logger.warning("No spare worker could be started.", extra={"fields": {"why": str(exc)}})
        else:
            self._token, self._path = token, self._socket()
