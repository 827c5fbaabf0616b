"""The unix socket that workers connect to, in a private folder of its own."""

import contextlib
import logging
import os
import shutil
import tempfile
from pathlib import Path

import grpc
import grpc.aio

from trainer_service.processes import ProcessKey, process_key

logger = logging.getLogger(__name__)

_FOLDER_PARENT = "/tmp"  # noqa: S108  (the folder itself is made by mkdtemp)
_FOLDER_PREFIX = "gradwire-worker-"
"""Name of the socket's folder in /tmp; followed by the trainer's process id and start time."""


class WorkerSocket:
    """The server that workers connect to.

    Args:
        *handlers: The WorkerService, or what else the worker's ranks ask.
        max_message_bytes: Limit on one operation.
    """

    def __init__(self, *handlers: grpc.GenericRpcHandler, max_message_bytes: int) -> None:
        self._handlers = handlers
        self._max_message_bytes = max_message_bytes
        self._server: grpc.aio.Server | None = None
        self.folder = ""
        """Private to this user; "" before it is open."""

    @property
    def path(self) -> str:
        """Where workers connect."""
        return f"{self.folder}/worker.sock"

    async def open(self) -> None:
        """Listens, unless it does already. If the folder or the socket is gone, as after a cleaning of /tmp, it listens
        again in another folder.

        Raises:
            OSError: No folder can be made.
        """
        if self._server is not None:
            # Two system calls on a folder in memory or on a local disk.
            if Path(self.path).is_socket():  # noqa: ASYNC240
                return
            logger.warning("The worker's socket is gone; making another.", extra={"fields": {"socket": self.path}})
            await self.close()
        own = process_key(os.getpid()) or ProcessKey(os.getpid(), 0)
        _remove_left_behind()
        # Short, because a socket's path is limited to 107 bytes; private, because whoever opens it commands the worker.
        self.folder = tempfile.mkdtemp(prefix=f"{_FOLDER_PREFIX}{own.pid}-{own.started}-", dir=_FOLDER_PARENT)
        # Twice the limit of one message: an operation travels inside a command, which is a little larger.
        largest = 2 * self._max_message_bytes
        options = [("grpc.max_receive_message_length", largest), ("grpc.max_send_message_length", largest)]
        server = grpc.aio.server(options=options)
        server.add_generic_rpc_handlers(self._handlers)
        try:
            server.add_insecure_port(f"unix:{self.path}")
        except RuntimeError as exc:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise OSError(f"cannot listen on {self.path}: {exc}") from exc
        await server.start()
        self._server = server

    async def close(self) -> None:
        """Stops listening and removes the folder."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(grace=0)
            shutil.rmtree(self.folder, ignore_errors=True)


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
