"""The one background event loop that all clients share."""

import asyncio
import atexit
import logging
import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future as ConcurrentFuture
from concurrent.futures import TimeoutError as ConcurrentTimeoutError
from typing import Any, TypeVar

from gradwire._client.process_forks import keep_for_ever
from gradwire.errors import FailedPreconditionError, OperationTimeoutError

logger = logging.getLogger("gradwire")

T = TypeVar("T")


class LoopThread:
    """An asyncio event loop on a daemon thread of its own, started on first use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self.connections: weakref.WeakSet[Any] = weakref.WeakSet()
        """Whose channels live on the loop."""
        self.lost = False
        """Whether this process is a fork of one whose loop ran: then none will run here."""

    def loop(self) -> asyncio.AbstractEventLoop:
        """The running loop.

        Raises:
            FailedPreconditionError: This process was forked from one whose loop ran.
        """
        self.refuse_if_lost()
        with self._lock:
            if self._loop is None:
                loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=loop.run_forever, name="gradwire-loop", daemon=True)
                self._thread.start()
                self._loop = loop
            return self._loop

    def refuse_if_lost(self) -> None:
        """Raises FailedPreconditionError where no loop can run; see `lost`."""
        if self.lost:
            raise FailedPreconditionError(
                "This process was forked from one that had already called a Gradwire server, and gRPC connections do "
                "not survive a fork; the parent is not disturbed. Start such processes with "
                'multiprocessing.get_context("spawn") or "forkserver" (for torch, '
                'DataLoader(multiprocessing_context="spawn")), and give them a base_url or a pickled SamplingClient; '
                "or fork before the first call."
            )

    def call_soon(self, callback: Callable[..., object], *args: object) -> None:
        """Runs `callback(*args)` on the loop; calls from one thread run in the order made."""
        self.loop().call_soon_threadsafe(callback, *args)

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> "ConcurrentFuture[T]":
        """Runs a coroutine on the loop, from any thread."""
        try:
            loop = self.loop()
        except BaseException:
            coroutine.close()
            raise
        return asyncio.run_coroutine_threadsafe(coroutine, loop)

    def start(self, coroutine: Coroutine[Any, Any, T], name: str) -> "asyncio.Task[T]":
        """Runs a coroutine on the loop, from the loop's own thread. It lives until it is over, whoever forgets it."""
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        # A loop refers to its tasks only weakly.
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def run(self, coroutine: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """Runs a coroutine on the loop and waits for it; not to be called on the loop's own thread."""
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError(
                "A blocking Gradwire call was made on Gradwire's own event loop; make it on another thread."
            )
        future = self.submit(coroutine)
        try:
            return future.result(timeout_s)
        except ConcurrentTimeoutError:
            if future.done():
                raise
            future.cancel()
            raise OperationTimeoutError(f"No answer within {timeout_s:g} s.") from None
        except BaseException:
            # Ctrl-C while waiting: what was asked for is no longer wanted.
            future.cancel()
            raise

    def stop(self) -> None:
        """Ends the loop and its thread."""
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is None or thread is None or not thread.is_alive():
            return

        async def drain() -> None:
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        try:
            asyncio.run_coroutine_threadsafe(drain(), loop).result(2)
        except (ConcurrentTimeoutError, TimeoutError):
            logger.debug("The event loop did not drain within 2 s; it ends with the process.")
            return
        loop.call_soon_threadsafe(loop.stop)
        thread.join(2)

    def forget(self) -> None:
        """In a forked child, where the thread does not exist: a loop that ran is not touched again."""
        self._lock = threading.Lock()
        loop, self._loop, self._thread = self._loop, None, None
        if loop is not None:
            self.lost = True
            keep_for_ever([loop, *asyncio.all_tasks(loop), *self.connections])


LOOP = LoopThread()
atexit.register(LOOP.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=LOOP.forget)
