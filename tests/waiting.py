"""Waiting for what must come. The deadline only bounds a failure: on a busy machine anything may take long."""

import asyncio
import time
from collections.abc import Callable

DEADLINE_S = 60.0


async def until(condition: Callable[[], object]) -> None:
    """Returns once it holds."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110  (not everything has an event)
            await asyncio.sleep(0.005)


def wait_until(condition: Callable[[], object], what: Callable[[], object] | None = None) -> None:
    """Returns once it holds; for threads.

    Args:
        condition: What must come to hold.
        what: Says what there is instead, if it does not.
    """
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, what and what()
        time.sleep(0.02)
