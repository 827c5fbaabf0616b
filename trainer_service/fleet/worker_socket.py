"""The unix sockets that a worker's ranks connect to, in a private folder of their own."""

import asyncio
import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import grpc
import grpc.aio

from trainer_service.processes import ProcessKey, process_key

logger = logging.getLogger(__name__)

_FOLDER_PARENT = "/tmp"  # noqa: S108  (the folder itself is made by mkdtemp)
_FOLDER_PREFIX = "gradwire-worker-"
"""Name of the socket's folder in /tmp; followed by the trainer's process id and start time."""


class WorkerSocket:
    """Where a worker's ranks connect: the first for its commands, those of several machines for the store they meet in.

    Args:
        worker: Makes the end of a connection for commands; None where no worker gets any.
        store: The rank store; None where ranks do not need it.
    """

    def __init__(
        self, worker: Callable[[], asyncio.BaseProtocol] | None = None, *, store: grpc.GenericRpcHandler | None = None
    ) -> None:
        self._worker = worker
        self._store = store
        self._listener: asyncio.Server | None = None
        self._store_server: grpc.aio.Server | None = None
        self.folder = ""
        """Private to this user; "" before it is open."""

    @property
    def path(self) -> str:
        """Where the worker connects."""
        return f"{self.folder}/worker.sock"

    async def open(self) -> None:
        """Listens, unless it does already. If the folder or a socket is gone, as after a cleaning of /tmp, it listens
        again in another folder.

        Raises:
            OSError: No folder can be made.
        """
        if self.folder:
            # Two system calls on a folder in memory or on a local disk.
            if self._there():
                return
            logger.warning("The worker's socket is gone; making another.", extra={"fields": {"socket": self.path}})
            await self.close()
        own = process_key(os.getpid()) or ProcessKey(os.getpid(), 0)
        _remove_left_behind()
        # Short, because a socket's path is limited to 107 bytes; private, because whoever opens it commands the worker.
        self.folder = tempfile.mkdtemp(prefix=f"{_FOLDER_PREFIX}{own.pid}-{own.started}-", dir=_FOLDER_PARENT)
        try:
            await self._listen()
        except BaseException:
            await self.close()
            raise

    def _there(self) -> bool:
        wanted = [path for path, used in ((self.path, self._worker), (store_path(self.folder), self._store)) if used]
        return all(Path(path).is_socket() for path in wanted)

    async def _listen(self) -> None:
        if self._worker is not None:
            self._listener = await asyncio.get_running_loop().create_unix_server(self._worker, self.path)
        if self._store is not None:
            path = store_path(self.folder)
            server = self._store_server = grpc.aio.server()
            server.add_generic_rpc_handlers((self._store,))
            try:
                server.add_insecure_port(f"unix:{path}")
            except RuntimeError as exc:
                raise OSError(f"cannot listen on {path}: {exc}") from exc
            await server.start()

    async def close(self) -> None:
        """Stops listening and removes the folder. Connections stay."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()
        server, self._store_server = self._store_server, None
        if server is not None:
            await server.stop(grace=0)
        folder, self.folder = self.folder, ""
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def store_path(folder: str) -> str:
    """Where ranks ask the store that is served from a folder."""
    return f"{folder}/ranks.sock"


def _remove_left_behind() -> None:
    """Removes the folders of trainers that were killed."""
    with contextlib.suppress(OSError):
        for folder in Path(_FOLDER_PARENT).glob(f"{_FOLDER_PREFIX}*-*-*"):
            pid, started, _ = folder.name.removeprefix(_FOLDER_PREFIX).split("-", 2)
            if not (pid.isdigit() and started.isdigit()) or not Path("/proc/self").exists():
                continue
            if process_key(int(pid)) != ProcessKey(int(pid), int(started)):
                # Another user's cannot be removed, and need not be.
                shutil.rmtree(folder, ignore_errors=True)
