"""Keeps one worker alive: starts it through torchrun, notices its death at once, starts the next."""

import asyncio
import collections
import contextlib
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
from asyncio.subprocess import Process
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
from gradwire.errors import GradwireError, error
from gradwire.v1.worker_service_pb2 import WorkerCommand, WorkerReady
from gradwire.v1.worker_service_pb2_grpc import add_WorkerServiceServicer_to_server

from trainer_service.fleet.link import Link, WorkerServicer
from trainer_service.fleet.worker import Deliver
from trainer_service.processes import start_child, stop_child

logger = logging.getLogger(__name__)
worker_log = logging.getLogger("worker")

_LAST_LINES = 20
_MAX_BACKOFF_S = 30.0
_STOP_GRACE_S = 5.0


@dataclass(frozen=True)
class WorkerSettings:
    """How to start a worker."""

    base_model: str
    checkpoint_dir: Path
    max_context_length: int
    max_message_bytes: int

    def command(self, socket: str) -> list[str]:
        """The command line: torchrun, also for one rank."""
        return [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=1"),
            # A rendezvous of its own on a free port: several trainers share a machine.
            *("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--max-restarts=0"),
            *("-m", "trainer_service.engine", "--socket", socket, "--base-model", self.base_model),
            *("--checkpoint-dir", str(self.checkpoint_dir), "--max-context-length", str(self.max_context_length)),
        ]


class WorkerSupervisor:
    """A Worker that outlives worker processes. All on one event loop.

    Args:
        settings: How to start a worker.
        command: Replaces the command line, for tests; gets the socket's path.
    """

    def __init__(self, settings: WorkerSettings, *, command: Callable[[str], list[str]] | None = None) -> None:
        self._settings = settings
        self._command = command or settings.command
        self._link: Link | None = None
        self._status_message = "starting the worker"
        self._ready_callbacks: list[Callable[[], object]] = []
        self._death_callbacks: list[Callable[[GradwireError], object]] = []
        self._folder: str | None = None
        self._server: grpc.aio.Server | None = None
        self._task: asyncio.Task[None] | None = None
        self._last_lines: collections.deque[str] = collections.deque(maxlen=_LAST_LINES)
        self.restarts = 0
        """Workers started after another one died."""
        self.gave_up: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Why no worker can be had, once that is certain: the model could not be loaded on the first try."""

    @property
    def ready(self) -> WorkerReady | None:
        return self._link.ready if self._link is not None else None

    @property
    def status_message(self) -> str:
        return self._link.status_message if self._link is not None else self._status_message

    @property
    def counters(self) -> Mapping[str, float]:
        return self._link.counters if self._link is not None else {}

    def on_ready(self, callback: Callable[[], object]) -> None:
        self._ready_callbacks.append(callback)

    def on_death(self, callback: Callable[[GradwireError], object]) -> None:
        self._death_callbacks.append(callback)

    def submit(self, command: WorkerCommand, deliver: Deliver) -> None:
        if self._link is None or self._link.ready is None:
            deliver(error("WORKER_NOT_READY", f"The worker is not ready: {self.status_message}.", retry_after_s=0.5))
            return
        self._link.submit(command, deliver)

    async def start(self) -> None:
        """Opens the socket and starts the first worker; returns before the model is loaded."""
        # Short, because a socket's path may have 107 bytes; private, because who opens it commands the worker.
        self._folder = tempfile.mkdtemp(prefix="gradwire-", dir="/tmp")
        # Twice the limit of one message: an operation travels inside a command, and a little larger.
        largest = 2 * self._settings.max_message_bytes
        options = [("grpc.max_receive_message_length", largest), ("grpc.max_send_message_length", largest)]
        self._server = grpc.aio.server(options=options)
        add_WorkerServiceServicer_to_server(WorkerServicer(lambda: self._link, self._became_ready), self._server)
        self._server.add_insecure_port(f"unix:{self._socket}")
        await self._server.start()
        self._task = asyncio.create_task(self._supervise(), name="worker-supervisor")

    async def stop(self) -> None:
        """Ends the worker and removes the socket; commands still pending get DRAINING."""
        link, self._link = self._link, None
        if link is not None:
            link.fail_pending(error("DRAINING", "The trainer stopped before this was done.", retry_after_s=5.0))
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._server is not None:
            await self._server.stop(grace=0)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _socket(self) -> str:
        return f"{self._folder}/worker.sock"

    def _became_ready(self) -> None:
        logger.info("The worker is ready.")
        for callback in self._ready_callbacks:
            callback()

    async def _supervise(self) -> None:
        """Worker after worker, with back-off between those that did not get ready."""
        backoff_s, ever_ready = 0.0, False
        while True:
            link = self._link = Link(secrets.token_urlsafe(32))
            process = await self._start_process(link)
            reader = asyncio.create_task(self._read_log(process))
            try:
                reason = await self._wait_for_end(process, link)
            finally:
                await stop_child(process, grace_s=0.2 if link.closed.is_set() else _STOP_GRACE_S)
                reader.cancel()
            was_ready = link.ready is not None
            ever_ready = ever_ready or was_ready
            self._link = None
            died = link.failure or error("WORKER_DIED", reason)
            self._status_message = died.message
            logger.error("Worker ended.", extra={"fields": {"reason": died.message}})
            for callback in self._death_callbacks:
                callback(died)
            link.fail_pending(died)
            if not ever_ready and (link.failure is not None or backoff_s >= 2):
                # What failed from the start, and again or for a stated reason, will not come right by itself.
                self.gave_up.set_result(died.message)
                return
            backoff_s = 0.0 if was_ready else min(_MAX_BACKOFF_S, max(0.5, backoff_s * 2))
            await asyncio.sleep(backoff_s)
            self.restarts += 1

    async def _start_process(self, link: Link) -> Process:
        env = {**os.environ, "GRADWIRE_WORKER_TOKEN": link.token, "PYTHONUNBUFFERED": "1"}
        # The worker needs no key, and what it does not have it cannot leak.
        env.pop("GRADWIRE_API_KEY", None)
        self._last_lines.clear()
        logger.info("Starting the worker.", extra={"fields": {"base_model": self._settings.base_model}})
        return await start_child(
            *self._command(self._socket), env=env, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )

    async def _wait_for_end(self, process: Process, link: Link) -> str:
        """Waits until the process or its stream ends, and says which in a sentence."""
        exited = asyncio.create_task(process.wait())
        closed = asyncio.create_task(link.closed.wait())
        try:
            await asyncio.wait({exited, closed}, return_when=asyncio.FIRST_COMPLETED)
            if closed.done() and not exited.done():
                # torchrun says how its rank ended a moment later; those who wait should not wait for that.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(asyncio.shield(exited), 0.3)
        finally:
            for task in (exited, closed):
                task.cancel()
        how = "lost its connection" if process.returncode is None else f"ended ({_describe_exit(process.returncode)})"
        last = next((line for line in reversed(self._last_lines) if line.strip()), "")
        return f"The worker process {how}." + (f" Its last words: {last}" if last else "")

    async def _read_log(self, process: Process) -> None:
        """Puts the worker's output into the trainer's log, line by line."""
        assert process.stdout is not None
        while line := await process.stdout.readline():
            text = line.decode(errors="replace").rstrip()
            self._last_lines.append(text)
            worker_log.info(text)


def _describe_exit(returncode: int) -> str:
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        return f"signal {signal.Signals(-returncode).name}"
    except ValueError:
        return f"signal {-returncode}"
