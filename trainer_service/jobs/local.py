"""Trainer jobs as child processes on this machine.

A trainer here never outlives the control plane: it is stopped when the control plane stops, and stops by itself when
its stdin reaches EOF, which comes however the control plane dies.
"""

import asyncio
import contextlib
import datetime
import json
import logging
import os
import secrets
import shutil
import sys
from asyncio.subprocess import Process
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from gradwire.errors import error
from gradwire.v1 import trainer_service_pb2
from gradwire.v1.trainer_service_pb2_grpc import TrainerServiceStub
from grpc_health.v1 import health_pb2, health_pb2_grpc

from trainer_service.config import JobsConfig, split_address
from trainer_service.jobs.trainer_job import TrainerJob, TrainerJobSpec, TrainerJobState
from trainer_service.processes import start_child, stop_child

logger = logging.getLogger(__name__)

TRAINER_COMMAND = (sys.executable, "-m", "trainer_service", "serve")
_SERVICE = trainer_service_pb2.DESCRIPTOR.services_by_name["TrainerService"].full_name
_DRAIN_TIMEOUT_S = 5.0
"""For the operation that runs when a job is deleted; whoever deletes it no longer waits for the rest."""
_LISTEN_POLL_S = 0.05
_LOG_TAIL_LINES = 20
_LOG_TAIL_BYTES = 16_384


@dataclass
class _Job:
    """One trainer process and what is known about it."""

    job_id: str
    spec: TrainerJobSpec
    folder: Path
    created_at: datetime.datetime
    base_url: str = ""
    state: TrainerJobState = TrainerJobState.STARTING
    status_message: str = "starting the trainer"
    log_tail: str = ""
    process: Process | None = None
    channel: grpc.aio.Channel | None = None
    watcher: asyncio.Task[None] | None = None
    follower: asyncio.Task[None] | None = None
    stopping: asyncio.Task[None] | None = None

    @property
    def log_path(self) -> Path:
        return self.folder / "trainer.log"

    def describe(self) -> TrainerJob:
        return TrainerJob(
            job_id=self.job_id,
            job_name=f"{self.spec.display_name or 'trainer'}-{self.job_id.removeprefix('job-')[:4]}",
            base_url=self.base_url,
            base_model=self.spec.base_model,
            state=self.state,
            status_message=self.status_message,
            log_tail=self.log_tail,
            created_at=self.created_at,
            log_path=str(self.log_path),
        )


class LocalJobs:
    """TrainerJobs on this machine. All on one event loop.

    Args:
        config: The control plane's; trainers listen on the same host, and take the same keys.
        trainer_command: Replaces the trainer's command line, for tests; the options follow it.
        stop_grace_s: From SIGTERM to SIGKILL: a trainer drains, then stops its worker.
    """

    def __init__(
        self, config: JobsConfig, *, trainer_command: Sequence[str] = TRAINER_COMMAND, stop_grace_s: float = 20.0
    ) -> None:
        self._config = config
        self._guarded = bool(config.api_keys or config.api_key_file)
        # A key of its own: those of the users it may know by their digest only.
        self._own_key = secrets.token_urlsafe(24)
        self._stop_grace_s = stop_grace_s
        self._trainer_command = tuple(trainer_command)
        self._jobs: dict[str, _Job] = {}
        self._deleted: set[str] = set()
        self._requests: dict[str, asyncio.Task[_Job]] = {}
        self._stopped = False

    async def create(self, spec: TrainerJobSpec, *, request_id: str = "") -> TrainerJob:
        creating = self._requests.get(request_id) if request_id else None
        if creating is None:
            if self._stopped:
                raise error("DRAINING", "The control plane is shutting down and starts no trainers.", retry_after_s=5.0)
            creating = asyncio.create_task(self._start(spec))
            if request_id:
                self._requests[request_id] = creating
        # A client that leaves while its trainer starts may come back with the same request_id.
        return (await asyncio.shield(creating)).describe()

    async def get(self, job_id: str) -> TrainerJob:
        job = self._find(job_id)
        await self._ask_status(job)
        return job.describe()

    async def list(self) -> list[TrainerJob]:
        return [job.describe() for job in reversed(self._jobs.values())]

    async def delete(self, job_id: str) -> None:
        if job_id in self._deleted:
            return
        job = self._find(job_id)
        if job.stopping is None:
            job.stopping = asyncio.create_task(self._stop(job))
        await asyncio.shield(job.stopping)

    async def stop(self) -> None:
        self._stopped = True
        # Those being started have no process yet to stop.
        await asyncio.gather(*self._requests.values(), return_exceptions=True)
        await asyncio.gather(*(self.delete(job_id) for job_id in list(self._jobs)))

    def _find(self, job_id: str) -> _Job:
        job = self._jobs.get(job_id)
        if job is None:
            raise error(
                "TRAINER_JOB_NOT_FOUND",
                f'There is no trainer job "{job_id}"; it was deleted, or another control plane holds it.',
                job_id=job_id,
            )
        return job

    async def _start(self, spec: TrainerJobSpec) -> _Job:
        job_id = f"job-{secrets.token_hex(6)}"
        folder = self._config.data_dir / "jobs" / job_id
        job = _Job(job_id=job_id, spec=spec, folder=folder, created_at=datetime.datetime.now(datetime.UTC))
        try:
            folder.mkdir(parents=True)
            with job.log_path.open("wb") as log:
                job.process = await start_child(*self._command(job), env=self._environment(), stdout=log, stderr=log)
        except OSError as exc:
            text = f"The trainer's process could not be started: {exc}."
            raise error("TRAINER_JOB_FAILED", text, job_id=job_id) from exc
        self._jobs[job_id] = job
        job.watcher = asyncio.create_task(self._watch(job, job.process), name=f"watch-{job_id}")
        fields = {"job_id": job_id, "base_model": spec.base_model, "pid": job.process.pid, "log": str(job.log_path)}
        logger.info("Trainer started.", extra={"fields": fields})
        return job

    def _command(self, job: _Job) -> Sequence[str]:
        host, _ = split_address(self._config.listen)
        command = [*self._trainer_command, f"--base-model={job.spec.base_model}"]
        command += ["--listen", f"[{host}]:0" if ":" in host else f"{host}:0"]
        command += ["--data-dir", str(self._config.data_dir), "--runs-dir", str(job.folder / "runs")]
        command += ["--ready-file", str(job.folder / "ready.json")]
        command += ["--drain-timeout-s", str(_DRAIN_TIMEOUT_S), "--exit-with-parent"]
        if self._config.storage_url:
            command += ["--storage-url", self._config.storage_url]
        if job.spec.max_context_length:
            command += ["--max-context-length", str(job.spec.max_context_length)]
        if self._config.api_key_file is not None:
            command += ["--api-key-file", str(self._config.api_key_file.resolve())]
        if self._config.allow_no_api_key:
            command.append("--allow-no-api-key")
        return command

    def _environment(self) -> dict[str, str]:
        env = {name: value for name, value in os.environ.items() if name != "GRADWIRE_API_KEY"}
        if self._guarded:
            # Not on the command line, which everybody on the machine can read.
            env["GRADWIRE_API_KEY"] = ",".join([*self._config.api_keys, f"control-plane {self._own_key}"])
        return env

    async def _watch(self, job: _Job, process: Process) -> None:
        """Keeps the job's state what its trainer's is, until the trainer ends."""
        job.follower = asyncio.create_task(self._follow(job))
        try:
            returncode = await process.wait()
        finally:
            job.follower.cancel()
            await asyncio.gather(job.follower, return_exceptions=True)
        if job.stopping is not None:
            return
        job.state = TrainerJobState.FAILED
        job.log_tail = _tail(job.log_path)
        job.status_message = _why_ended(job.log_tail, returncode)
        fields = {"job_id": job.job_id, "reason": job.status_message}
        logger.error("Trainer ended by itself.", extra={"fields": fields})
        if job.channel is not None:
            await job.channel.close()

    async def _follow(self, job: _Job) -> None:
        """Waits until the trainer listens, then is told of every change of its readiness."""
        ready_file = job.folder / "ready.json"
        while not ready_file.exists():  # noqa: ASYNC110  (a file another process writes has no event)
            await asyncio.sleep(_LISTEN_POLL_S)
        address = json.loads(ready_file.read_text())["address"]
        host, port = split_address(address)
        # A trainer on every interface is reached here over loopback.
        reached = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, address.rpartition(":")[0])  # noqa: S104
        job.channel = grpc.aio.insecure_channel(f"{reached}:{port}", [("grpc.max_reconnect_backoff_ms", 500)])
        job.base_url = f"http://{address}"
        job.status_message = "starting the worker"
        health: Any = health_pb2_grpc.HealthStub(job.channel)
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                async for answer in health.Watch(health_pb2.HealthCheckRequest(service=_SERVICE)):
                    self._became(job, answer.status == health_pb2.HealthCheckResponse.SERVING)
            self._became(job, False)
            await asyncio.sleep(0.5)

    def _became(self, job: _Job, ready: bool) -> None:
        state = TrainerJobState.READY if ready else TrainerJobState.STARTING
        if state == job.state:
            return
        job.state = state
        job.status_message = "ready" if ready else "starting the worker again"
        logger.info("Trainer's state changed.", extra={"fields": {"job_id": job.job_id, "state": state.value}})

    async def _ask_status(self, job: _Job) -> None:
        """Lets the trainer itself say what it is doing while it gets ready."""
        if job.state is not TrainerJobState.STARTING or job.channel is None:
            return
        metadata = [("authorization", f"Bearer {self._own_key}")] if self._guarded else []
        with contextlib.suppress(grpc.aio.AioRpcError):
            request = trainer_service_pb2.GetServerInfoRequest()
            info = await TrainerServiceStub(job.channel).GetServerInfo(request, metadata=metadata, timeout=1.0)
            if job.state is TrainerJobState.STARTING and info.status_message:
                job.status_message = info.status_message

    async def _stop(self, job: _Job) -> None:
        assert job.process is not None
        if job.follower is not None:
            # The trainer waits a moment for calls under way, ours too.
            job.follower.cancel()
        returncode = await stop_child(job.process, grace_s=self._stop_grace_s)
        if job.watcher is not None:
            await asyncio.gather(job.watcher, return_exceptions=True)
        if job.channel is not None:
            await job.channel.close()
        # The job's runs end with it; what they saved as checkpoints is elsewhere, and stays.
        await asyncio.to_thread(shutil.rmtree, job.folder / "runs", ignore_errors=True)
        del self._jobs[job.job_id]
        self._deleted.add(job.job_id)
        logger.info("Trainer stopped.", extra={"fields": {"job_id": job.job_id, "returncode": returncode}})


def _tail(log_path: Path) -> str:
    """Last lines of a log."""
    with log_path.open("rb") as log:
        log.seek(0, os.SEEK_END)
        log.seek(max(0, log.tell() - _LOG_TAIL_BYTES))
        lines = log.read().decode(errors="replace").splitlines()
    return "\n".join(lines[-_LOG_TAIL_LINES:])


def _why_ended(log_tail: str, returncode: int) -> str:
    """The trainer's own last sentence where it said one, else how its process ended."""
    said = [line.removeprefix("gradwire: ") for line in log_tail.splitlines() if line.startswith("gradwire: ")]
    if said:
        return said[-1]
    return f"The trainer ended with {f'signal {-returncode}' if returncode < 0 else f'exit code {returncode}'}."
