"""Trainer jobs as child processes on this machine.

A trainer here never outlives the control plane, which stops it; if the control plane dies, the trainer's stdin reaches
EOF and it stops by itself. The job does outlive it: the next control plane on the same data folder lists it as failed,
for its owner to find and delete.
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
from typing import IO, Any

import grpc
import grpc.aio
from gradwire.errors import GradwireError, error, invalid_field
from gradwire.v1 import trainer_service_pb2
from gradwire.v1.trainer_service_pb2_grpc import TrainerServiceStub
from grpc_health.v1 import health_pb2, health_pb2_grpc

from trainer_service.addresses import split_address
from trainer_service.config import JobsConfig
from trainer_service.jobs.records import JobFolder, JobRecord, left_behind
from trainer_service.jobs.trainer_job import TrainerJob, TrainerJobSpec, TrainerJobState
from trainer_service.jobs.trainer_tls import TrainerTls
from trainer_service.processes import start_child, stop_child

logger = logging.getLogger(__name__)

TRAINER_COMMAND = (sys.executable, "-m", "trainer_service", "serve")
_SERVICE = trainer_service_pb2.DESCRIPTOR.services_by_name["TrainerService"].full_name
_DRAIN_TIMEOUT_S = 5.0
"""Time for the operation under way when a job is deleted; the rest is not waited for."""
_LISTEN_POLL_S = 0.05
_ROOT = Path(__file__).parents[2]
_KEPT_LOGS = 100
"""Logs of deleted jobs that are kept, since an error that names a log is often read after the job is deleted."""
_CONTROL_PLANE_ENDED = (
    "The control plane ended, and this trainer with it. Its checkpoints are still there; delete this job and "
    "start another."
)
_LOG_TAIL_LINES = 20
_LOG_TAIL_BYTES = 16_384


@dataclass
class _Job:
    """One trainer process, and what is known about it."""

    record: JobRecord
    held: JobFolder
    base_url: str = ""
    state: TrainerJobState = TrainerJobState.STARTING
    status_message: str = "starting the trainer"
    log_tail: str = ""
    tls: TrainerTls | None = None
    process: Process | None = None
    channel: grpc.aio.Channel | None = None
    watcher: asyncio.Task[None] | None = None
    follower: asyncio.Task[None] | None = None
    stopping: asyncio.Task[None] | None = None

    @property
    def job_id(self) -> str:
        return self.record.job_id

    @property
    def spec(self) -> TrainerJobSpec:
        return self.record.spec

    @property
    def folder(self) -> Path:
        return self.held.path

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
            created_at=self.record.created_at,
            log_path=str(self.log_path),
            owner=self.record.owner,
            request_id=self.record.request_id,
            ca_certificate=self.tls.certificate if self.tls is not None else "",
        )


class LocalJobs:
    """TrainerJobs on this machine. All on one event loop.

    Args:
        config: The control plane's settings; trainers listen on the same host and accept the same keys.
        trainer_command: Replaces the trainer's command line, for tests; options are appended.
        stop_grace_s: From SIGTERM to SIGKILL: a trainer drains, then stops its worker.
    """

    def __init__(
        self, config: JobsConfig, *, trainer_command: Sequence[str] = TRAINER_COMMAND, stop_grace_s: float = 20.0
    ) -> None:
        self._config = config
        self._guarded = bool(config.api_keys or config.api_key_file)
        # A key of its own: it may know the users' keys only by their digests.
        self._own_key = secrets.token_urlsafe(24)
        self._stop_grace_s = stop_grace_s
        self._trainer_command = tuple(trainer_command)
        self._jobs: dict[str, _Job] = {}
        self._stopped = False

    async def start(self) -> None:
        if self._config.embedded:
            # An embedded control plane starts without jobs, and takes over none of another script's.
            return
        for held, record in await asyncio.to_thread(lambda: list(left_behind(self._jobs_dir))):
            job = _Job(record=record, held=held, state=TrainerJobState.FAILED, status_message=_CONTROL_PLANE_ENDED)
            self._jobs[job.job_id] = job
        if self._jobs:
            logger.info("Took over trainer jobs.", extra={"fields": {"jobs": len(self._jobs)}})

    async def create(self, spec: TrainerJobSpec, *, owner: str, request_id: str) -> TrainerJob:
        _refuse_a_cluster(spec)
        if self._stopped:
            raise error("DRAINING", "The control plane is shutting down and starts no trainers.", retry_after_s=5.0)
        record = JobRecord(
            job_id=f"job-{secrets.token_hex(6)}",
            owner=owner,
            request_id=request_id,
            spec=spec,
            created_at=datetime.datetime.now(datetime.UTC),
        )
        job = await self._start(record)
        if self._stopped:
            # A shutdown began meanwhile and did not see this job.
            await self._stop(job)
        return job.describe()

    async def find(self, job_id: str) -> TrainerJob | None:
        job = self._jobs.get(job_id)
        return None if job is None else job.describe()

    async def get(self, job_id: str) -> TrainerJob:
        job = self._jobs[job_id]
        await self._ask_status(job)
        return job.describe()

    async def list(self) -> list[TrainerJob]:
        return [job.describe() for job in reversed(self._jobs.values())]

    async def delete(self, job_id: str) -> None:
        job = self._jobs[job_id]
        if job.stopping is None:
            job.stopping = asyncio.create_task(self._stop(job))
        await asyncio.shield(job.stopping)
        # The job's runs end with it; their checkpoints are elsewhere and stay, as does its log for a while.
        await asyncio.to_thread(_remove_all_but_the_log, job.held)
        if self._jobs.pop(job_id, None) is not None:
            job.held.release()
            await asyncio.to_thread(_let_old_logs_go, self._jobs_dir)

    async def stop(self) -> None:
        self._stopped = True
        jobs = list(self._jobs.values())
        if self._config.embedded:
            await asyncio.gather(*(self.delete(job.job_id) for job in jobs))
            return
        for job in jobs:
            if job.stopping is None:
                job.stopping = asyncio.create_task(self._stop(job))
        await asyncio.gather(*(job.stopping for job in jobs if job.stopping is not None))

    @property
    def _jobs_dir(self) -> Path:
        return self._config.data_dir / "jobs"

    async def _start(self, record: JobRecord) -> _Job:
        try:
            held = JobFolder.make(self._jobs_dir / record.job_id)
        except OSError as exc:
            raise _not_started(record, exc) from exc
        job = _Job(record=record, held=held)
        try:
            held.write(record)
            job.tls = self._tls(job)
            with _open_log(job.log_path) as log:
                job.process = await start_child(
                    *self._command(job), env=self._environment(job), stdout=log, stderr=log, cwd=self._cwd(job)
                )
        except OSError as exc:
            shutil.rmtree(held.path, ignore_errors=True)
            held.release()
            raise _not_started(record, exc) from exc
        self._jobs[job.job_id] = job
        job.watcher = asyncio.create_task(self._watch(job, job.process), name=f"watch-{job.job_id}")
        fields = {"job_id": job.job_id, "base_model": record.spec.base_model, "pid": job.process.pid}
        logger.info("Trainer started.", extra={"fields": fields | {"log": str(job.log_path)}})
        return job

    def _tls(self, job: _Job) -> TrainerTls | None:
        if self._config.make_certificates:
            return TrainerTls.make(job.folder, split_address(self._config.listen)[0])
        given = self._config.tls
        return None if given is None else TrainerTls(given.cert_file.resolve(), given.key_file.resolve())

    def _cwd(self, job: _Job) -> Path | None:
        """The folder for a base_model that is a relative path."""
        if job.spec.any_folder and self._config.model_dir is None:
            return None
        folder = self._config.model_dir or self._config.data_dir / "models"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder

    def _command(self, job: _Job) -> Sequence[str]:
        host, _ = split_address(self._config.listen)
        command = [*self._trainer_command, f"--base-model={job.spec.base_model}"]
        command += ["--listen", f"[{host}]:0" if ":" in host else f"{host}:0"]
        command += ["--data-dir", str(self._config.data_dir), "--runs-dir", str(job.folder / "runs")]
        command += ["--ready-file", str(job.folder / "ready.json")]
        command += ["--drain-timeout-s", str(_DRAIN_TIMEOUT_S), "--exit-with-parent"]
        if job.tls is not None:
            command += job.tls.arguments
        if self._config.storage_url:
            command += ["--storage-url", self._config.storage_url]
        if job.spec.accelerator_count:
            command += ["--nproc-per-node", str(job.spec.accelerator_count)]
        if job.spec.max_context_length:
            command += ["--max-context-length", str(job.spec.max_context_length)]
        if self._config.api_key_file is not None:
            command += ["--api-key-file", str(self._config.api_key_file.resolve())]
        if self._config.allow_no_api_key:
            command.append("--allow-no-api-key")
        return command

    def _environment(self, job: _Job) -> dict[str, str]:
        env = {name: value for name, value in os.environ.items() if name != "GRADWIRE_API_KEY"}
        if self._cwd(job) is not None:
            # Modules come from where ours do, never from the folder of models.
            paths = [str(Path(path).absolute()) for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
            if _ROOT.name not in ("site-packages", "dist-packages"):
                paths.append(str(_ROOT))
            env |= {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "PYTHONSAFEPATH": "1"}
        if self._guarded:
            # Not on the command line, which anyone on the machine can read.
            env["GRADWIRE_API_KEY"] = ",".join([*self._config.api_keys, f"control-plane {self._own_key}"])
        return env

    async def _watch(self, job: _Job, process: Process) -> None:
        """Keeps the job's state up to date until its trainer ends."""
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
        """Waits until the trainer listens, then follows its readiness."""
        ready_file = job.folder / "ready.json"
        while not ready_file.exists():  # noqa: ASYNC110  (there is no event for a file of another process)
            await asyncio.sleep(_LISTEN_POLL_S)
        address = json.loads(ready_file.read_text())["address"]
        host, port = split_address(address)
        # A trainer on every interface is reached here over loopback.
        reached = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, address.rpartition(":")[0])  # noqa: S104
        options = [("grpc.max_reconnect_backoff_ms", 500), ("grpc.enable_http_proxy", 0)]
        connect = grpc.aio.insecure_channel if job.tls is None else job.tls.channel
        job.channel = connect(f"{reached}:{port}", options)
        job.base_url = f"{'http' if job.tls is None else 'https'}://{address}"
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
        job.status_message = "ready" if ready else "restarting the worker"
        logger.info("Trainer's state changed.", extra={"fields": {"job_id": job.job_id, "state": state.value}})

    async def _ask_status(self, job: _Job) -> None:
        """Asks the trainer what it is doing while it gets ready."""
        if job.state is not TrainerJobState.STARTING or job.channel is None:
            return
        metadata = [("authorization", f"Bearer {self._own_key}")] if self._guarded else []
        with contextlib.suppress(grpc.aio.AioRpcError):
            request = trainer_service_pb2.GetServerInfoRequest()
            info = await TrainerServiceStub(job.channel).GetServerInfo(request, metadata=metadata, timeout=1.0)
            if job.state is TrainerJobState.STARTING and info.status_message:
                job.status_message = info.status_message

    async def _stop(self, job: _Job) -> None:
        if job.process is None:
            # Left from an earlier control plane, with which it ended.
            return
        if job.follower is not None:
            # The trainer waits a moment for calls under way, including ours.
            job.follower.cancel()
        returncode = await stop_child(job.process, grace_s=self._stop_grace_s)
        if job.watcher is not None:
            await asyncio.gather(job.watcher, return_exceptions=True)
        if job.channel is not None:
            await job.channel.close()
        logger.info("Trainer stopped.", extra={"fields": {"job_id": job.job_id, "returncode": returncode}})


def _refuse_a_cluster(spec: TrainerJobSpec) -> None:
    """Refuses choices that only a cluster offers."""
    if spec.accelerator_type:
        raise invalid_field(
            "accelerator_type",
            f'is "{spec.accelerator_type}", but this control plane starts trainers on its own machine and uses what '
            "it has; leave it empty.",
        )
    if spec.accelerator_count > 1:
        raise invalid_field(
            "accelerator_count",
            f"is {spec.accelerator_count}, but this control plane starts trainers on its own machine and does not "
            "share its accelerators out among them; it must be 1, or 0 for all that the machine has.",
        )


def _not_started(record: JobRecord, exc: OSError) -> GradwireError:
    # Only the log names the file.
    logger.error("A trainer could not be started.", extra={"fields": {"job_id": record.job_id, "error": str(exc)}})
    text = (
        f"The trainer's process could not be started on the control plane's host: {exc.strerror or 'no reason given'}."
    )
    return error("TRAINER_JOB_FAILED", text, job_id=record.job_id)


def _open_log(path: Path) -> IO[bytes]:
    return open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600))


def _remove_all_but_the_log(held: JobFolder) -> None:
    held.forget()
    shutil.rmtree(held.path / "runs", ignore_errors=True)
    for name in ("ready.json", "tls.crt", "tls.key"):
        (held.path / name).unlink(missing_ok=True)


def _let_old_logs_go(jobs_dir: Path) -> None:
    """Removes the folders of jobs deleted long ago, which contain only a log."""
    left = [path for path in jobs_dir.glob("job-*/trainer.log") if not (path.parent / "job.json").exists()]
    left.sort(key=lambda path: path.stat().st_mtime)
    for path in left[:-_KEPT_LOGS]:
        shutil.rmtree(path.parent, ignore_errors=True)


def _tail(log_path: Path) -> str:
    """The last lines of a log; none if it is gone."""
    try:
        with log_path.open("rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(0, log.tell() - _LOG_TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
    except OSError as exc:
        logger.warning("A trainer's log cannot be read.", extra={"fields": {"log": log_path, "why": exc}})
        return ""
    return "\n".join(lines[-_LOG_TAIL_LINES:])


def _why_ended(log_tail: str, returncode: int) -> str:
    """The trainer's own last message if there is one, else how its process ended."""
    said = [line.removeprefix("gradwire: ") for line in log_tail.splitlines() if line.startswith("gradwire: ")]
    if said:
        return said[-1]
    return f"The trainer ended with {f'signal {-returncode}' if returncode < 0 else f'exit code {returncode}'}."
