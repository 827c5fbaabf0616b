"""Calls that make a run, each carried out once: a repeat under the same request_id gets the run that the first made."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from trainer_service.runs.run import Run


class RequestIds:
    """The runs that were made, or are being made, by the request_id of the call.

    Args:
        discard: Deletes a run whose caller went away and cannot ask for it again.
    """

    def __init__(self, discard: Callable[[Run], object]) -> None:
        self._discard = discard
        self._made: dict[tuple[str, str], asyncio.Future[Run]] = {}

    def remember(self, owner: str, run: Run) -> None:
        """Restores what an earlier trainer remembered of a run."""
        if request_id := run.create_request.request_id:
            made: asyncio.Future[Run] = asyncio.get_running_loop().create_future()
            made.set_result(run)
            self._made[owner, request_id] = made

    def forget(self, run: Run) -> None:
        """Forgets a deleted run, so that its request_id makes a new one."""
        for key, made in list(self._made.items()):
            if made.done() and not made.cancelled() and made.exception() is None and made.result() is run:
                del self._made[key]

    async def once(self, owner: str, request_id: str, making: Coroutine[Any, Any, Run]) -> Run:
        """What `making` makes, or what was made under the same request_id of the same owner.

        Args:
            owner: Whose call it is.
            request_id: The call's; "" if it has none, and then nobody can ask for the run again.
            making: Makes the run; closed if it is made already.

        Raises:
            GradwireError: As `making`. A call that failed may be repeated under its request_id.
        """
        if not request_id:
            task = asyncio.create_task(making)
            try:
                return await asyncio.shield(task)
            except asyncio.CancelledError:
                task.add_done_callback(self._discard_unclaimed)
                raise
        key = owner, request_id
        future = self._made.get(key)
        if future is None:
            future = self._made[key] = asyncio.create_task(making)
            future.add_done_callback(lambda done: self._forget_failure(key, done))
        else:
            making.close()
        # Shielded: a caller that goes away must not undo what its repeat will ask for.
        return await asyncio.shield(future)

    def _discard_unclaimed(self, made: "asyncio.Task[Run]") -> None:
        if not made.cancelled() and made.exception() is None:
            self._discard(made.result())

    def _forget_failure(self, key: tuple[str, str], done: "asyncio.Future[Run]") -> None:
        if done.cancelled() or done.exception() is not None:
            self._made.pop(key, None)
