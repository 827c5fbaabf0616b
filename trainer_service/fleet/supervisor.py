"""Keeps one worker alive: starts it through torchrun, notices its death at once, starts the next."""

import asyncio
import logging
import os
import secrets
import shutil
import sys
import tempfile
from asyncio.subprocess import Process
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
from gradwire.errors import GradwireError, error
from gradwire.v1.worker_service_pb2 import WorkerCommand, WorkerReady

from trainer_service.config import MAX_RUNS_VARIABLE, EngineSettings
from trainer_service.executing import executing_command
from trainer_service.fleet.link import Link, WorkerServicer, worker_service_handler
from trainer_service.fleet.output import WorkerOutput
from trainer_service.fleet.worker import Deliver
from trainer_service.processes import ProcessKey, kill_all, process_key, start_child, stop_child

logger = logging.getLogger(__name__)

_MAX_BACKOFF_S = 30.0
_GIVE_UP_BACKOFF_S = 2.0
"""A worker that never got ready and has come to this much back-off (the fourth start) is given up."""
_EXIT_DETAIL_S = 1.0
"""How long the end of a broken stream's process is waited for, to say what ended it. torchrun looks every 0.1 s."""
_DISMISS_GRACE_S = 2.0
"""How long a worker may take to leave by itself once its stream was ended."""
_FOLDER_PARENT = "/tmp"  # noqa: S108  (the folder itself is made by mkdtemp)
_FOLDER_PREFIX = "gradwire-worker-"
"""Of the folder in /tmp with the worker's socket; behind it, the trainer's process id and when it started."""
_STOP_GRACE_S = 5.0
"""How long torchrun may take to leave after SIGTERM."""


@dataclass(frozen=True)
class WorkerSettings:
    """How to start a worker."""

    base_model: str
    checkpoint_dir: Path
    max_context_length: int
    max_message_bytes: int
    max_runs: int = 8
    loss_module: str = ""
    engine: EngineSettings = field(default_factory=EngineSettings)
    start_timeout_s: float = 300.0
    """How long it may say nothing before it is ready, 0 for ever. It says each thing it begins, and while it loads its
    model, that it gets on; one that hangs, at a driver or a file system that does not answer, is killed and started
    again."""

    def command(self, socket: str) -> list[str]:
        """The command line: torchrun, also for one rank."""
        return [
            # Run so that it ends with the trainer, however the trainer ends.
            *(sys.executable, "-m", "trainer_service.processes", "torch.distributed.run"),
            # A rendezvous of its own on a free port: several trainers share a machine.
            *("--nnodes=1", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"),
            # Its files beside the socket, to go with it; by default each start leaves a folder in /tmp.
            *("--log-dir", f"{os.path.dirname(socket)}/torchrun", "--max-restarts=0"),
            *("-m", "trainer_service.engine", "--socket", socket),
            # In one argument each, since either may begin with a dash.
            *(f"--base-model={self.base_model}", f"--checkpoint-dir={self.checkpoint_dir}"),
            *("--max-context-length", str(self.max_context_length)),
            *(("--loss-module", self.loss_module) if self.loss_module else ()),
            *self.engine.command_line(),
        ]


class WorkerSupervisor:
    """A Worker that outlives worker processes. All on one event loop, whose thread must outlive the workers.

    Args:
        settings: How to start a worker.
        command: Replaces the command line, for tests; gets the socket's path.
    """

    def __init__(self, settings: WorkerSettings, *, command: Callable[[str], list[str]] | None = None) -> None:
        self._settings = settings
        self._command = command or settings.command
        self._link: Link | None = None
        self._status_message = "starting the worker"
        self._stopping = False
        self._ready_callbacks: list[Callable[[], object]] = []
        self._death_callbacks: list[Callable[[GradwireError], object]] = []
        self._folder: str | None = None
        self._server: grpc.aio.Server | None = None
        self._task: asyncio.Task[None] | None = None
        self._restarts = 0
        self.gave_up: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Why no worker can be had, once that is certain: none ever got ready, and the reason is stated or came
        again."""

    @property
    def ready(self) -> WorkerReady | None:
        return self._link.ready if self._link is not None else None

    @property
    def status_message(self) -> str:
        return self._link.status_message if self._link is not None else self._status_message

    @property
    def counters(self) -> Mapping[str, float]:
        counted = self._link.counters if self._link is not None else {}
        return {
            **counted,
            "gradwire_worker_up": float(self.ready is not None),
            "gradwire_worker_restarts_total": self._restarts,
        }

    def on_ready(self, callback: Callable[[], object]) -> None:
        self._ready_callbacks.append(callback)

    def on_death(self, callback: Callable[[GradwireError], object]) -> None:
        self._death_callbacks.append(callback)

    def submit(self, command: WorkerCommand, deliver: Deliver, *, request: bytes = b"") -> None:
        if self._stopping:
            deliver(_stopped())
        elif self._link is None or self._link.ready is None:
            deliver(error("WORKER_NOT_READY", f"The worker is not ready: {self.status_message}.", retry_after_s=0.5))
        else:
            self._link.submit(command, deliver, request=request)

    async def start(self) -> None:
        """Opens the socket and starts the first worker; returns before the model is loaded."""
        own = process_key(os.getpid()) or ProcessKey(os.getpid(), 0)
        # Short, because a socket's path may have 107 bytes; private, because who opens it commands the worker.
        _remove_left_behind()
        self._folder = tempfile.mkdtemp(prefix=f"{_FOLDER_PREFIX}{own.pid}-{own.started}-", dir=_FOLDER_PARENT)
        # Twice the limit of one message: an operation travels inside a command, and a little larger.
        largest = 2 * self._settings.max_message_bytes
        options = [("grpc.max_receive_message_length", largest), ("grpc.max_send_message_length", largest)]
        self._server = grpc.aio.server(options=options)
        servicer = WorkerServicer(lambda: self._link, self._became_ready)
        self._server.add_generic_rpc_handlers((worker_service_handler(servicer),))
        self._server.add_insecure_port(f"unix:{self._socket}")
        await self._server.start()
        self._task = asyncio.create_task(self._supervise(), name="worker-supervisor")
        self._task.add_done_callback(self._supervision_ended)

    async def stop(self) -> None:
        """Ends the worker and removes the socket; commands still pending get DRAINING."""
        self._stopping = True
        self._status_message = "shutting down"
        link, self._link = self._link, None
        if link is not None:
            link.fail_pending(_stopped())
            link.dismissed.set()
        if self._task is not None:
            if link is not None and link.attached:
                # Its stream ended, the worker leaves by itself, and torchrun after it, without a word of complaint.
                await asyncio.wait({self._task}, timeout=_DISMISS_GRACE_S)
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

    def _supervision_ended(self, task: asyncio.Task[None]) -> None:
        """A fault of our own must not leave a trainer that seems alive and never gets a worker."""
        if not task.cancelled() and (exc := task.exception()) is not None:
            logger.critical("Starting workers failed.", exc_info=exc)
            if not self.gave_up.done():
                self.gave_up.set_result(f"starting the worker failed: {exc}")

    async def _supervise(self) -> None:
        """Worker after worker, with back-off between those that did not get ready."""
        backoff_s, ever_ready = 0.0, False
        status_message = self._status_message
        while not self._stopping:
            link = self._link = Link(secrets.token_urlsafe(32), status_message)
            died = await self._one_worker(link)
            if self._stopping:
                return
            was_ready = link.ready is not None
            ever_ready = ever_ready or was_ready
            if not ever_ready and (link.failure is not None or backoff_s >= _GIVE_UP_BACKOFF_S):
                # What failed from the start, and again or for a stated reason, will not come right by itself.
                self.gave_up.set_result(died.message)
                return
            backoff_s = 0.0 if was_ready else min(_MAX_BACKOFF_S, max(0.5, backoff_s * 2))
            await asyncio.sleep(backoff_s)
            self._restarts += 1
            status_message = f"restarting the worker; the one before: {died.message}"

    async def _one_worker(self, link: Link) -> GradwireError:
        """Starts a worker, waits for its end, tells everybody, and clears up after it."""
        process = await self._start_process(link)
        output = WorkerOutput(process)
        try:
            reason = await self._wait_for_end(process, link, output)
            died = link.failure or error("WORKER_DIED", reason)
            if not self._stopping:
                self._link = None
                self._status_message = died.message
                logger.error("Worker ended.", extra={"fields": {"reason": died.message}})
                for callback in self._death_callbacks:
                    callback(died)
            link.fail_pending(died, executing=executing_command(self._socket))
            return died
        finally:
            link.dismissed.set()
            await stop_child(process, grace_s=0.2 if link.closed.is_set() else _STOP_GRACE_S)
            if link.rank0 is not None:
                # torchrun may have been killed without taking it along.
                kill_all([link.rank0])
            await output.close()

    async def _start_process(self, link: Link) -> Process:
        env = {**os.environ, "GRADWIRE_WORKER_TOKEN": link.token, "PYTHONUNBUFFERED": "1"}
        # The worker needs no key, and what it does not have it cannot leak.
        env.pop("GRADWIRE_API_KEY", None)
        env[MAX_RUNS_VARIABLE] = str(self._settings.max_runs)
        # Threads that spin while they wait for one another take the cores from those they wait for as soon as anything
        # else runs here, as the trainer and the user's loop do: steps were five to ten times slower for it.
        env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        logger.info("Starting the worker.", extra={"fields": {"base_model": self._settings.base_model}})
        return await start_child(
            *self._command(self._socket), env=env, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )

    async def _wait_for_end(self, process: Process, link: Link, output: WorkerOutput) -> str:
        """Waits until the process or its stream ends, and says which in a sentence."""
        exited = asyncio.create_task(process.wait())
        closed = asyncio.create_task(link.closed.wait())
        told = asyncio.create_task(output.rank_failed.wait())
        try:
            if not await self._gets_ready(link, exited, closed):
                how = f"said nothing for {self._settings.start_timeout_s:g} s"
                how += f" after it began {link.status_message}" if link.attached else ""
                return output.explain(None, how=f"{how} and was killed")
            await asyncio.wait({exited, closed}, return_when=asyncio.FIRST_COMPLETED)
            # What ended it is known a moment later, and worth that moment to those who are told.
            await asyncio.wait({exited, told}, timeout=_EXIT_DETAIL_S, return_when=asyncio.FIRST_COMPLETED)
            if exited.done():
                await output.drain()
        finally:
            for task in (exited, closed, told):
                task.cancel()
        return output.explain(process.returncode)

    async def _gets_ready(self, link: Link, *ends: asyncio.Task[Any]) -> bool:
        """Waits until the worker is ready or at an end; False once it has said nothing for too long."""
        while link.ready is None and not any(end.done() for end in ends):
            link.spoke.clear()
            spoke = asyncio.create_task(link.spoke.wait())
            timeout_s = self._settings.start_timeout_s or None
            await asyncio.wait({spoke, *ends}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            spoke.cancel()
            if not link.spoke.is_set() and not any(end.done() for end in ends):
                return False
        return True


def _remove_left_behind() -> None:
    """Removes the folders of trainers that were killed."""
    for folder in Path(_FOLDER_PARENT).glob(f"{_FOLDER_PREFIX}*-*-*"):
        pid, started, _ = folder.name.removeprefix(_FOLDER_PREFIX).split("-", 2)
        if not (pid.isdigit() and started.isdigit()) or not Path("/proc/self").exists():
            continue
        if process_key(int(pid)) != ProcessKey(int(pid), int(started)):
            # Another user's cannot be removed, and need not be.
            shutil.rmtree(folder, ignore_errors=True)


def _stopped() -> GradwireError:
    return error("DRAINING", "The trainer stopped before this was done.", retry_after_s=5.0)
