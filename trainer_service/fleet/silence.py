"""Notices when a ready worker no longer runs: a running one sends something every second, whatever it executes.

A process that is stopped (SIGSTOP, a frozen container, a debugger), or that hangs in all of its threads, sends nothing,
and neither ends nor closes its connection.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable

from trainer_service.fleet.link import Link
from trainer_service.worker_config import HEARTBEAT_INTERVAL_S

_UNRESPONSIVE_S = 15.0
"""Silence after which the trainer reports itself as not ready: on a machine that is merely busy, a worker's thread is
held up for a few seconds at most."""

_DEAF_S = 0.1
"""Pause after something was heard."""


async def silent_seconds(heard: asyncio.Event) -> AsyncGenerator[float]:
    """For how many seconds nothing has been heard: 0 whenever something is, more after each interval without.

    Counted in waits rather than by the clock: nobody must be given up because the trainer itself was stopped and did
    not listen.

    Args:
        heard: Set by whoever hears something, and cleared here.
    """
    silent_s = 0.0
    while True:
        heard.clear()
        try:
            await asyncio.wait_for(heard.wait(), HEARTBEAT_INTERVAL_S)
            silent_s = 0.0
            # A busy worker is heard hundreds of times a second.
            await asyncio.sleep(_DEAF_S)
        except TimeoutError:
            silent_s += HEARTBEAT_INTERVAL_S
        yield silent_s


async def silence(link: Link, *, timeout_s: float, changed: Callable[[], object]) -> None:
    """Returns once a worker has sent nothing for timeout_s.

    Args:
        link: That of a ready worker; `link.silent_s` and `link.responding` are kept up to date.
        timeout_s: 0 never returns.
        changed: Called whenever `link.responding` has changed.
    """
    unresponsive_s = min(_UNRESPONSIVE_S, timeout_s or _UNRESPONSIVE_S)
    link.silent_s = 0.0
    async for silent_s in silent_seconds(link.heard):
        link.silent_s = silent_s
        if link.responding != (silent_s < unresponsive_s):
            link.responding = not link.responding
            changed()
        if timeout_s and silent_s >= timeout_s:
            return
