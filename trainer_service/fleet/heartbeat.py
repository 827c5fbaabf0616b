"""Whether a worker that is ready still runs: it sends something every second, whatever it executes.

A process that is stopped (SIGSTOP, a frozen container, a debugger), or that hangs so that none of its threads runs,
sends nothing, and neither ends nor closes its connection.
"""

import asyncio
from collections.abc import Callable

from trainer_service.fleet.link import Link
from trainer_service.worker_config import HEARTBEAT_INTERVAL_S

_UNRESPONSIVE_S = 15.0
"""Silence after which the trainer calls itself not ready: a machine that is merely busy holds a worker's thread up for
a few seconds at most."""


async def silence(link: Link, *, timeout_s: float, changed: Callable[[], object]) -> None:
    """Returns once a worker has sent nothing for timeout_s.

    Args:
        link: Of a worker that is ready; `link.silent_s` and `link.responding` are kept.
        timeout_s: 0 never returns.
        changed: Called whenever `link.responding` has changed.
    """
    unresponsive_s = min(_UNRESPONSIVE_S, timeout_s or _UNRESPONSIVE_S)
    link.silent_s = 0.0
    while not timeout_s or link.silent_s < timeout_s:
        link.heard.clear()
        try:
            await asyncio.wait_for(link.heard.wait(), HEARTBEAT_INTERVAL_S)
            link.silent_s = 0.0
        except TimeoutError:
            # Counted by the look, not by the clock: while the trainer itself is stopped nobody listens, and a worker
            # must not be killed for that.
            link.silent_s += HEARTBEAT_INTERVAL_S
        if link.responding != (link.silent_s < unresponsive_s):
            link.responding = not link.responding
            changed()
