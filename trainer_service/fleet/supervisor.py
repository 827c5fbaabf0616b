"""Keeps one worker alive: starts its processes, notices its death or its silence, starts the next."""

import asyncio
import errno
import logging
import secrets
import sys
from collections.abc import Callable, Mapping
from typing import Any

from gradwire.errors import GradwireError, error
from gradwire.v1.worker_service_pb2 import WorkerCommand, WorkerReady

from trainer_service.command_lines import command_line
from trainer_service.config import Limits
from trainer_service.executing import executing_command, leave_reason, take_reason
from trainer_service.fleet.link import Link, WorkerLine
from trainer_service.fleet.node_ranks import NodeRanks
from trainer_service.fleet.nodes import Nodes
from trainer_service.fleet.rank_processes import Place, RankProcesses, WorkerRanks, worker_environment
from trainer_service.fleet.rank_store import rank_store_handler
from trainer_service.fleet.silence import silence
from trainer_service.fleet.spare import Spare
from trainer_service.fleet.worker import Deliver, Died
from trainer_service.fleet.worker_socket import WorkerSocket
from trainer_service.worker_config import SPARE_VARIABLE, WorkerConfig, WorkerTimeouts

logger = logging.getLogger(__name__)

_MAX_BACKOFF_S = 30.0
_GIVE_UP_BACKOFF_S = 2.0
"""No more workers are started if none was ever ready by this back-off (the fourth start)."""
_EXIT_DETAIL_S = 1.0
"""How long to wait for the process of a broken stream to end, to learn why it ended."""
_DISMISS_GRACE_S = 2.0
"""How long a worker may take to exit by itself once its stream has ended."""
_STOP_GRACE_S = 5.0
"""How long a worker may take to exit after SIGTERM."""
_PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)
"""Passing reasons why a process cannot be started: no descriptors, no memory, too many processes."""


class WorkerSupervisor:
    """A Worker that outlives worker processes. For one event loop, whose thread must outlive the workers.

    Args:
        config: What every rank is told.
        timeouts: How long a silent worker is waited for.
        max_message_bytes: The largest message between trainer and worker.
        command: Replaces the command line of a rank, for tests; gets the socket's path.
        local_world_size: Ranks on this machine.
        nodes: Other machines that take part; None for this one alone.
    """

    def __init__(
        self,
        config: WorkerConfig,
        *,
        timeouts: WorkerTimeouts | None = None,
        max_message_bytes: int = Limits.max_message_bytes,
        command: Callable[[str], list[str]] | None = None,
        local_world_size: int = 1,
        nodes: Nodes | None = None,
    ) -> None:
        self._config = config
        self._timeouts = timeouts or WorkerTimeouts()
        self._command = command or self._rank_command
        self._link: Link | None = None
        self._local_world_size = local_world_size
        self._nodes = nodes
        # Twice the limit of one message: an operation travels inside a command, which is a little larger.
        largest = 2 * max_message_bytes
        self._socket = WorkerSocket(
            lambda: WorkerLine(lambda: self._link, self._became_ready, max_message_bytes=largest),
            store=None if nodes is None else rank_store_handler(nodes.stores.access),
        )
        self._spare = Spare(self._start_spare, lambda: self._socket.path, after_s=self._timeouts.spare_after_s)
        self._status_message = "starting the worker"
        self._stopping = False
        self._ready_callbacks: list[Callable[[], object]] = []
        self._death_callbacks: list[Callable[[GradwireError], object]] = []
        self._responding_callbacks: list[Callable[[], object]] = []
        self._task: asyncio.Task[None] | None = None
        self._restarts = 0
        self.gave_up: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Why no worker can be started, once that is certain: none was ever ready, and the reason is stated or came
        repeatedly."""

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
        timeout_s = self._timeouts.heartbeat_timeout_s
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
        if self._nodes is not None:
            await self._nodes.open()
        self._task = asyncio.create_task(self._supervise(), name="worker-supervisor")
        self._task.add_done_callback(self._supervision_ended)

    async def stop(self) -> None:
        """Ends the worker and removes the socket; commands still pending get DRAINING."""
        self._stopping = True
        self._status_message = "shutting down"
        link, self._link = self._link, None
        if link is not None:
            link.fail_pending(_stopped())
            link.dismiss()
        if self._task is not None:
            if link is not None and link.attached:
                # Once its stream has ended, the worker exits by itself and logs no error.
                await asyncio.wait({self._task}, timeout=_DISMISS_GRACE_S)
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._spare.stop()
        if self._nodes is not None:
            await self._nodes.close()
        await self._socket.close()

    def _became_ready(self) -> None:
        logger.info("The worker is ready.")
        self._spare.prepare()
        for callback in self._ready_callbacks:
            callback()

    def _supervision_ended(self, task: asyncio.Task[None]) -> None:
        """Gives up if supervision itself fails: the trainer must not seem alive and never get a worker."""
        if not task.cancelled() and (exc := task.exception()) is not None:
            logger.critical("Starting workers failed.", exc_info=exc)
            if not self.gave_up.done():
                self.gave_up.set_result(f"starting the worker failed: {exc}")

    async def _supervise(self) -> None:
        """Starts worker after worker, with back-off after those that were never ready."""
        backoff_s, ever_ready = 0.0, False
        status_message = self._status_message
        while not self._stopping:
            link = self._link = Link(secrets.token_urlsafe(32), status_message)
            passing = False
            try:
                ranks = await self._start_next(link)
            except OSError as exc:
                # The trainer survives a shortage of descriptors or memory; its clients wait.
                passing = exc.errno in _PASSING
                died = error("WORKER_DIED", f"The worker could not be started: {exc}.")
                self._ended(link, died)
            except GradwireError as exc:
                died = link.failure = exc
                self._ended(link, died)
            else:
                died = await self._one_worker(link, ranks)
            if self._stopping:
                return
            was_ready = link.ready is not None
            ever_ready = ever_ready or was_ready
            if not (ever_ready or passing) and (link.failure is not None or backoff_s >= _GIVE_UP_BACKOFF_S):
                # If no worker was ever ready, a stated or repeated failure will not go away by itself.
                self.gave_up.set_result(died.message)
                return
            backoff_s = 0.0 if was_ready else min(_MAX_BACKOFF_S, max(0.5, backoff_s * 2))
            await asyncio.sleep(backoff_s)
            self._restarts += 1
            status_message = f"restarting the worker; the one before: {died.message}"

    async def _one_worker(self, link: Link, ranks: WorkerRanks) -> GradwireError:
        """Waits for a worker's end, tells all who wait, and cleans up after it."""
        grace_s = _STOP_GRACE_S
        try:
            reason = await self._wait_for_end(link, ranks)
            # A stopped process does not react to SIGTERM.
            grace_s = 0.2 if link.closed.is_set() else 0.0
            died = link.failure or error("WORKER_DIED", reason)
            self._ended(link, died)
            return died
        finally:
            link.dismiss()
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

    def _rank_command(self, socket: str) -> list[str]:
        return [sys.executable, "-m", "trainer_service.engine", f"--socket={socket}", *command_line(self._config)]

    async def _start_next(self, link: Link) -> WorkerRanks:
        """The spare, which its own token makes the link's worker, or a worker started now."""
        await self._socket.open()
        if self._nodes is not None:
            await self._nodes.complete(lambda text: setattr(link, "status_message", text))
        if (spare := await self._spare.take(self._socket.path)) is not None:
            link.token, ranks = spare
            return ranks
        return await self._start_ranks(link.token)

    async def _start_spare(self, token: str) -> WorkerRanks:
        return await self._start_ranks(token, **{SPARE_VARIABLE: "1"})

    async def _start_ranks(self, token: str, **variables: str) -> WorkerRanks:
        env = worker_environment(GRADWIRE_WORKER_TOKEN=token, **variables)
        kind = "a spare worker" if variables else "the worker"
        logger.info(f"Starting {kind}.", extra={"fields": {"base_model": self._config.base_model}})
        command, folder = self._command(self._socket.path), self._socket.folder
        if self._nodes is None:
            place = Place(self._local_world_size)
            return await RankProcesses.start(command, env=env, folder=folder, place=place)
        return await NodeRanks.start(
            self._nodes,
            command,
            options=command_line(self._config),
            env=env,
            folder=folder,
            spare=bool(variables),
            leave_reason=lambda failure: leave_reason(self._socket.path, failure),
        )

    async def _wait_for_end(self, link: Link, ranks: WorkerRanks) -> str:
        """Waits until a process or the stream ends, or the worker falls silent; returns which, in a sentence."""
        exited = asyncio.create_task(ranks.one_ended())
        closed = asyncio.create_task(link.closed.wait())
        tasks = [exited, closed]
        try:
            if not await self._gets_ready(link, exited, closed):
                how = f"said nothing for {self._timeouts.start_timeout_s:g} s"
                how += f" after it began {link.status_message}" if link.attached else ""
                return await ranks.explain(how=f"{how} and was killed")
            timeout_s = self._timeouts.heartbeat_timeout_s
            silent = asyncio.create_task(silence(link, timeout_s=timeout_s, changed=self._responding_changed))
            tasks.append(silent)
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not exited.done() and not closed.done():
                return await ranks.explain(how=f"sent nothing for {timeout_s:g} s (stopped, or hanging) and was killed")
            # The reason is known a moment later, and worth that wait.
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
        """Waits until the worker is ready or has ended; False once it has been silent for too long."""
        while link.ready is None and not any(end.done() for end in ends):
            link.spoke.clear()
            spoke = asyncio.create_task(link.spoke.wait())
            timeout_s = self._timeouts.start_timeout_s or None
            await asyncio.wait({spoke, *ends}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            spoke.cancel()
            if not link.spoke.is_set() and not any(end.done() for end in ends):
                return False
        return True


def _stopped() -> GradwireError:
    return error("DRAINING", "The trainer stopped before this was done.", retry_after_s=5.0)
