"""Keeps one worker alive: starts its processes, notices its death or its silence, starts the next."""

import asyncio
import errno
import logging
import os
import secrets
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradwire.errors import GradwireError, error
from gradwire.v1.worker_service_pb2 import WorkerCommand, WorkerReady

from trainer_service.config import MAX_RUNS_VARIABLE, EngineSettings
from trainer_service.executing import executing_command, take_reason
from trainer_service.fleet import heartbeat
from trainer_service.fleet.link import Link, WorkerServicer, worker_service_handler
from trainer_service.fleet.rank_processes import RankProcesses
from trainer_service.fleet.worker import Deliver, Died
from trainer_service.fleet.worker_socket import WorkerSocket

logger = logging.getLogger(__name__)

_MAX_BACKOFF_S = 30.0
_GIVE_UP_BACKOFF_S = 2.0
"""A worker that never got ready and has come to this much back-off (the fourth start) is given up."""
_EXIT_DETAIL_S = 1.0
"""How long the end of a broken stream's process is waited for, to say what ended it."""
_DISMISS_GRACE_S = 2.0
"""How long a worker may take to leave by itself once its stream was ended."""
_STOP_GRACE_S = 5.0
"""How long a worker may take to leave after SIGTERM."""
_PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)
"""Why a process cannot be started for now: no descriptors, no memory, too many processes."""


@dataclass(frozen=True)
class WorkerSettings:
    """How to start a worker."""

    base_model: str
    checkpoint_dir: Path
    max_context_length: int
    max_message_bytes: int
    served_model_name: str = ""
    """What callers are told the model is called; "" for base_model."""
    max_runs: int = 8
    loss_module: str = ""
    engine: EngineSettings = field(default_factory=EngineSettings)
    start_timeout_s: float = 300.0
    """How long it may say nothing before it is ready, 0 for ever. It says each thing it begins, and while it loads its
    model, that it gets on; one that hangs, at a driver or a file system that does not answer, is killed and started
    again."""
    heartbeat_timeout_s: float = 60.0
    """How long it may send nothing once it is ready, 0 for ever. It says every second that it runs, whatever it
    executes; one that is stopped or hangs as a whole is killed and replaced."""
    local_world_size: int = 1
    """Ranks on this machine."""
    collective_timeout_s: float = 600.0
    """How long ranks wait for one another within an operation; if one does not come, all are started again."""

    def command(self, socket: str) -> list[str]:
        """The command line of every rank."""
        return [
            *(sys.executable, "-m", "trainer_service.engine", "--socket", socket),
            # In one argument each, since either may begin with a dash.
            *(f"--base-model={self.base_model}", f"--checkpoint-dir={self.checkpoint_dir}"),
            *("--max-context-length", str(self.max_context_length)),
            *(("--served-model-name", self.served_model_name) if self.served_model_name else ()),
            *(("--loss-module", self.loss_module) if self.loss_module else ()),
            *("--collective-timeout-s", str(self.collective_timeout_s)),
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
        handler = worker_service_handler(WorkerServicer(lambda: self._link, self._became_ready))
        self._socket = WorkerSocket(handler, max_message_bytes=settings.max_message_bytes)
        self._status_message = "starting the worker"
        self._stopping = False
        self._ready_callbacks: list[Callable[[], object]] = []
        self._death_callbacks: list[Callable[[GradwireError], object]] = []
        self._responding_callbacks: list[Callable[[], object]] = []
        self._task: asyncio.Task[None] | None = None
        self._restarts = 0
        self.gave_up: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Why no worker can be had, once that is certain: none ever got ready, and the reason is stated or came
        again."""

    @property
    def ready(self) -> WorkerReady | None:
        return self._link.ready if self._link is not None else None

    @property
    def responding(self) -> bool:
        return self._link is not None and self._link.responding

    @property
    def status_message(self) -> str:
        if self._link is None:
            return self._status_message
        if self._link.responding:
            return self._link.status_message
        text = f"the worker has sent nothing for {self._link.silent_s:.0f} s"
        timeout_s = self._settings.heartbeat_timeout_s
        return f"{text}; after {timeout_s:g} s it is replaced" if timeout_s else text

    @property
    def counters(self) -> Mapping[str, float]:
        counted = self._link.counters if self._link is not None else {}
        return {
            **counted,
            "gradwire_worker_up": float(self.ready is not None and self.responding),
            "gradwire_worker_silent_seconds": self._link.silent_s if self._link is not None else 0.0,
            "gradwire_worker_restarts_total": self._restarts,
        }

    def on_ready(self, callback: Callable[[], object]) -> None:
        self._ready_callbacks.append(callback)

    def on_death(self, callback: Callable[[GradwireError], object]) -> None:
        self._death_callbacks.append(callback)

    def on_responding(self, callback: Callable[[], object]) -> None:
        self._responding_callbacks.append(callback)

    def submit(self, command: WorkerCommand, deliver: Deliver, *, request: bytes = b"") -> None:
        if self._stopping:
            deliver(Died(_stopped()))
        elif self._link is None or self._link.ready is None:
            text = f"The worker is not ready: {self.status_message}."
            deliver(Died(error("WORKER_NOT_READY", text, retry_after_s=0.5)))
        else:
            self._link.submit(command, deliver, request=request)

    async def start(self) -> None:
        """Opens the socket and starts the first worker; returns before the model is loaded."""
        await self._socket.open()
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
                # Its stream ended, the worker leaves by itself, without a word of complaint.
                await asyncio.wait({self._task}, timeout=_DISMISS_GRACE_S)
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._socket.close()

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
            passing = False
            try:
                ranks = await self._start_ranks(link)
            except OSError as exc:
                # A trainer outlives a time without descriptors or memory; its clients wait.
                passing = exc.errno in _PASSING
                died = error("WORKER_DIED", f"The worker could not be started: {exc}.")
                self._ended(link, died)
            else:
                died = await self._one_worker(link, ranks)
            if self._stopping:
                return
            was_ready = link.ready is not None
            ever_ready = ever_ready or was_ready
            if not (ever_ready or passing) and (link.failure is not None or backoff_s >= _GIVE_UP_BACKOFF_S):
                # What failed from the start, and again or for a stated reason, will not come right by itself.
                self.gave_up.set_result(died.message)
                return
            backoff_s = 0.0 if was_ready else min(_MAX_BACKOFF_S, max(0.5, backoff_s * 2))
            await asyncio.sleep(backoff_s)
            self._restarts += 1
            status_message = f"restarting the worker; the one before: {died.message}"

    async def _one_worker(self, link: Link, ranks: RankProcesses) -> GradwireError:
        """Waits for a worker's end, tells everybody, and clears up after it."""
        grace_s = _STOP_GRACE_S
        try:
            reason = await self._wait_for_end(link, ranks)
            # A process that is stopped hears no SIGTERM.
            grace_s = 0.2 if link.closed.is_set() else 0.0
            died = link.failure or error("WORKER_DIED", reason)
            self._ended(link, died)
            return died
        finally:
            link.dismissed.set()
            await ranks.stop(grace_s=grace_s)

    def _ended(self, link: Link, died: GradwireError) -> None:
        if not self._stopping:
            self._link = None
            self._status_message = died.message
            logger.error("Worker ended.", extra={"fields": {"reason": died.message}})
            for callback in self._death_callbacks:
                callback(died)
        path = self._socket.path
        link.fail_pending(died, executing=executing_command(path), because=take_reason(path))

    async def _start_ranks(self, link: Link) -> RankProcesses:
        await self._socket.open()
        env = {**os.environ, "GRADWIRE_WORKER_TOKEN": link.token, "PYTHONUNBUFFERED": "1"}
        # The worker needs no key, and what it does not have it cannot leak.
        env.pop("GRADWIRE_API_KEY", None)
        env[MAX_RUNS_VARIABLE] = str(self._settings.max_runs)
        # Threads that spin while they wait for one another take the cores from those they wait for as soon as anything
        # else runs here, as the trainer and the user's loop do: steps were five to ten times slower for it.
        env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        logger.info("Starting the worker.", extra={"fields": {"base_model": self._settings.base_model}})
        return await RankProcesses.start(
            self._command(self._socket.path),
            env=env,
            folder=self._socket.folder,
            local_world_size=self._settings.local_world_size,
        )

    async def _wait_for_end(self, link: Link, ranks: RankProcesses) -> str:
        """Waits until a process or the stream ends, or nothing comes any more, and says which in a sentence."""
        exited = asyncio.create_task(ranks.one_ended())
        closed = asyncio.create_task(link.closed.wait())
        tasks = [exited, closed]
        try:
            if not await self._gets_ready(link, exited, closed):
                how = f"said nothing for {self._settings.start_timeout_s:g} s"
                how += f" after it began {link.status_message}" if link.attached else ""
                return await ranks.explain(how=f"{how} and was killed")
            timeout_s = self._settings.heartbeat_timeout_s
            silence = heartbeat.silence(link, timeout_s=timeout_s, changed=self._responding_changed)
            silent = asyncio.create_task(silence)
            tasks.append(silent)
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not exited.done() and not closed.done():
                return await ranks.explain(how=f"sent nothing for {timeout_s:g} s (stopped, or hanging) and was killed")
            # What ended it is known a moment later, and worth that moment to those who are told.
            await asyncio.wait({exited}, timeout=_EXIT_DETAIL_S)
        finally:
            for task in tasks:
                task.cancel()
        return await ranks.explain()

    def _responding_changed(self) -> None:
        logger.warning("The worker's heartbeat changed.", extra={"fields": {"responding": self.responding}})
        for callback in self._responding_callbacks:
            callback()

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


def _stopped() -> GradwireError:
    return error("DRAINING", "The trainer stopped before this was done.", retry_after_s=5.0)
