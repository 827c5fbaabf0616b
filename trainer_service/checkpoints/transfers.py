"""Uploads to the store and downloads from it, for an event loop: on threads, one download per checkpoint."""

import asyncio
import contextvars
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from trainer_service.checkpoints.catalog import Catalog
from trainer_service.checkpoints.checkpoint import Checkpoint
from trainer_service.checkpoints.object_store import UPLOAD

P = ParamSpec("P")
T = TypeVar("T")

_THREADS = 8
"""Not those of asyncio.to_thread: a transfer may take minutes, and nothing else must wait for it."""


class Transfers:
    """The catalog's slow half.

    Args:
        catalog: The catalog, whose calls block.
    """

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="store")
        self._under_way: dict[tuple[str, object], asyncio.Task[None]] = {}

    async def find(self, path: str, *, field: str = "path", recent: bool = False) -> Checkpoint:
        """See Catalog.find."""
        if self.catalog.storage is None:
            return self.catalog.find(path, field=field)
        return await self._on_a_thread(self.catalog.find, path, field=field, recent=recent)

    async def fetch(self, path: str, *, field: str = "path", recent: bool = False) -> None:
        """Makes the current caller's checkpoint at a path readable for the worker.

        Raises:
            As Catalog.find and Catalog.fetch.
        """
        found = await self.find(path, field=field, recent=recent)
        if self.catalog.storage is None:
            return
        key = path, found.manifest.about.get(UPLOAD)
        task = self._under_way.get(key)
        if task is None:
            task = asyncio.create_task(self._on_a_thread(self.catalog.fetch, found))
            self._under_way[key] = task
            task.add_done_callback(lambda done: self._fetched(key, done))
        # Shielded: other callers may wait for the same download.
        await asyncio.shield(task)

    async def store(self, path: str) -> None:
        """See Catalog.store."""
        await self._on_a_thread(self.catalog.store, path)

    async def sweep(self) -> None:
        """See Catalog.sweep."""
        await self._on_a_thread(self.catalog.sweep)

    def close(self) -> None:
        """Starts no more transfers."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _fetched(self, key: tuple[str, object], task: "asyncio.Task[None]") -> None:
        del self._under_way[key]
        if not task.cancelled():
            task.exception()  # Retrieved, since nobody may be waiting any more.

    async def _on_a_thread(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        inside = functools.partial(contextvars.copy_context().run, call, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._threads, inside)
