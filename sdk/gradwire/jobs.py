"""Creates, awaits and deletes trainers through a control plane, on this machine or elsewhere."""

import contextlib
import datetime
import shutil
import sys
import time
import uuid
import warnings
from dataclasses import KW_ONLY, dataclass
from typing import Any, TextIO
from urllib.parse import urlsplit

from gradwire._client.embedded import EmbeddedControlPlane
from gradwire._client.loop import LOOP
from gradwire._client.tls import ClientTls
from gradwire._client.transport import Connection
from gradwire.errors import GradwireError, OperationTimeoutError, UnavailableError, error
from gradwire.v1 import trainer_job_service_pb2 as pb
from gradwire.v1.trainer_job_service_pb2_grpc import TrainerJobServiceStub

_CALL_TIMEOUT_S = 30.0
_DELETE_TIMEOUT_S = 90.0
_LOCAL_TRY_S = 5.0
_WILDCARDS = {"0.0.0.0", "::"}  # noqa: S104  (recognised, not listened on)


@dataclass(frozen=True)
class TrainerJobConfig:
    """Settings of a trainer to start."""

    base_model: str
    """Hub id, or a folder on the control plane's host: with an admin's key any, else a path below its --model-dir."""
    _: KW_ONLY
    lora_rank: int = 0
    """For the record: each run sets its own lora_rank when it is made."""
    max_context_length: int | None = None
    """Longest sequence taken, tokens; None or 0 takes the model's own limit."""
    learning_rate: float | None = None
    """For the record: optim_step brings its own with every step."""
    gradient_accumulation_steps: int = 1
    """For the record: gradients add up until the loop calls optim_step. Any other value than 1 warns of that."""
    display_name: str = ""
    """Your name for it."""
    accelerator_type: str = ""
    """Kind of accelerator, as a cluster's nodes are labelled, such as "NVIDIA-H200"; "" takes any."""
    accelerator_count: int = 0
    """How many it has, each with a rank of the trainer's worker; 0 takes what the control plane gives its trainers. In
    a cluster any number that a node has; on the control plane's own machine 1, and 0 is all that it has."""
    node_count: int = 1
    """Machines; a trainer job runs on one."""


@dataclass(frozen=True)
class TrainerJob:
    """A trainer job as it stood when asked."""

    job_id: str
    """Identifier, unique on its control plane."""
    job_name: str
    """display_name and the first letters of job_id."""
    base_url: str
    """What ServiceClient takes; "" until the trainer listens."""
    base_model: str
    """The model it serves, as it was ordered."""
    state: str
    """"starting", "ready" or "failed"."""
    status_message: str
    """What it is doing, or why it failed."""
    log_tail: str
    """Last lines of its log when it failed, else ""; only for admins, and from the local control plane."""
    log_path: str
    """Path of its log on the control plane's host; given when log_tail is, else ""."""
    created_at: datetime.datetime
    """When it was created, UTC."""
    ca_certificate: str = ""
    """PEM of the certificate that the trainer shows, where one was made for it; else ""."""

    @property
    def tls(self) -> ClientTls | None:
        """What ServiceClient takes as `tls` to trust this very trainer; None where nothing needs to be said."""
        return ClientTls(ca_pem=self.ca_certificate) if self.ca_certificate else None


class TrainerJobManager:
    """Creates, lists and deletes trainers.

    Args:
        api_key: The control plane's key; the trainers it starts take the same one.
        account_id: Accepted since hosted services take one; it has no effect.
        base_url: The control plane, "http://host:port", or "https://host:port" where it speaks TLS. None or "" starts
            one on this machine on first use; it and its trainers end with `close`, with this process, and with Ctrl-C.
        quiet: Print nothing while waiting.
        tls: PEM files for an "https://" base_url, as in ServiceClient.
    """

    def __init__(
        self,
        api_key: str = "",
        account_id: str = "",
        base_url: str | None = None,
        *,
        quiet: bool = False,
        tls: ClientTls | None = None,
    ) -> None:
        self.account_id = account_id
        self._api_key = api_key
        self._quiet = quiet
        self._embedded = None if base_url else EmbeddedControlPlane(api_key)
        self._connection = Connection(base_url, api_key, tls=tls) if base_url else None

    def create_and_wait(
        self, config: TrainerJobConfig, *, timeout_s: float = 1800.0, poll_interval_s: float = 0.2
    ) -> TrainerJob:
        """Starts a trainer and returns once its model is loaded.

        A trainer that fails, is late, or is no longer wanted (Ctrl-C) is deleted before this call raises.

        Args:
            config: Settings of the trainer.
            timeout_s: Longest wait, seconds.
            poll_interval_s: How often to ask for its state, seconds.

        Raises:
            FailedPreconditionError: TRAINER_JOB_FAILED: the reason, and the last lines of the trainer's log.
            OperationTimeoutError: Not ready within timeout_s.
        """
        progress = _Progress(sys.stderr, quiet=self._quiet)
        progress.say(f"Starting a trainer for {config.base_model}", "starting the control plane")
        try:
            job = self.create(config)
            try:
                return self._wait(job, timeout_s, poll_interval_s, progress)
            except BaseException:
                progress.say(f"Stopping trainer {job.job_name}", "it is not used")
                # What went wrong before matters more than what goes wrong now.
                with contextlib.suppress(GradwireError):
                    self.delete(job.job_id)
                raise
        finally:
            progress.end()

    def create(self, config: TrainerJobConfig) -> TrainerJob:
        """Starts a trainer and returns before it is ready."""
        if config.gradient_accumulation_steps != 1:
            warnings.warn(
                f"gradient_accumulation_steps={config.gradient_accumulation_steps} has no effect: gradients add up "
                "over forward_backward calls until your loop calls optim_step.",
                stacklevel=2,
            )
        request = pb.CreateTrainerJobRequest(
            request_id=uuid.uuid4().hex,
            base_model=config.base_model,
            display_name=config.display_name,
            lora_rank=config.lora_rank,
            max_context_length=config.max_context_length or 0,
            accelerator_type=config.accelerator_type,
            accelerator_count=config.accelerator_count,
            node_count=config.node_count,
        )
        return self._decode(self._call("CreateTrainerJob", request).trainer_job)

    def wait(self, job_id: str, *, timeout_s: float = 1800.0, poll_interval_s: float = 0.2) -> TrainerJob:
        """Returns once the trainer is ready; raises as create_and_wait, and leaves the job as it is."""
        progress = _Progress(sys.stderr, quiet=self._quiet)
        try:
            return self._wait(self.get(job_id), timeout_s, poll_interval_s, progress)
        finally:
            progress.end()

    def get(self, job_id: str) -> TrainerJob:
        """The job as it stands. Raises NotFoundError."""
        self._refuse_unstarted(job_id)
        return self._decode(self._call("GetTrainerJob", pb.GetTrainerJobRequest(job_id=job_id)).trainer_job)

    def list(self) -> "list[TrainerJob]":
        """Your jobs, newest first; an admin's key lists everybody's."""
        if self._embedded is not None and not self._embedded.started:
            return []
        jobs = self._call("ListTrainerJobs", pb.ListTrainerJobsRequest()).trainer_jobs
        return [self._decode(job) for job in jobs]

    def delete(self, job_id: str) -> None:
        """Stops the trainer; returns once it is gone. Its saved checkpoints stay. Deleting twice is not an error."""
        self._refuse_unstarted(job_id)
        self._call("DeleteTrainerJob", pb.DeleteTrainerJobRequest(job_id=job_id), timeout_s=_DELETE_TIMEOUT_S)

    def close(self) -> None:
        """Closes the connection; a control plane started by this manager stops, with all its trainers."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        if self._embedded is not None:
            self._embedded.stop()

    def __reduce__(self) -> Any:
        raise TypeError(
            "A TrainerJobManager cannot be pickled or copied: a control plane it started ends with this process. Hand "
            "on the base_url of a job, or make another manager there."
        )

    def __enter__(self) -> "TrainerJobManager":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait(self, job: TrainerJob, timeout_s: float, poll_interval_s: float, progress: "_Progress") -> TrainerJob:
        deadline = time.monotonic() + timeout_s
        while job.state == "starting":
            progress.say(f"Starting trainer {job.job_name}", job.status_message)
            if time.monotonic() > deadline:
                text = f"Trainer job {job.job_name} was not ready within {timeout_s:g} s; it was at: "
                raise OperationTimeoutError(f"{text}{job.status_message}. {_where_log_is(job)}")
            time.sleep(poll_interval_s)
            job = self.get(job.job_id)
        if job.state == "failed":
            text = f"Trainer job {job.job_name} failed: {job.status_message}"
            if job.log_tail:
                text += f"\nThe last lines of its log{f', {job.log_path}' if job.log_path else ''}:\n{job.log_tail}"
            raise error("TRAINER_JOB_FAILED", text, job_id=job.job_id)
        progress.done(f"Trainer {job.job_name} is ready")
        return job

    def _call(self, method: str, request: Any, timeout_s: float = _CALL_TIMEOUT_S) -> Any:
        # Before a control plane is started that nobody could call.
        LOOP.refuse_if_lost()
        if self._embedded is None:
            if self._connection is None:
                raise ValueError("This TrainerJobManager is closed; make a new one.")
            return self._connection.call(TrainerJobServiceStub, method, request, timeout_s=timeout_s)
        deadline = time.monotonic() + timeout_s
        while True:
            base_url = self._embedded.start()
            if self._connection is None or self._connection.base_url != base_url:
                self._connection = Connection(base_url, self._api_key)
            remaining_s = max(0.1, deadline - time.monotonic())
            try:
                # In short tries, as `start` notices at once when its process has ended. Every call is safe to repeat.
                return self._connection.call(
                    TrainerJobServiceStub, method, request, timeout_s=min(_LOCAL_TRY_S, remaining_s)
                )
            except (UnavailableError, OperationTimeoutError):
                if time.monotonic() >= deadline:
                    raise

    def _refuse_unstarted(self, job_id: str) -> None:
        """Refuses a job of a control plane that was never started, and so has none."""
        if self._embedded is not None and not self._embedded.started:
            raise error("TRAINER_JOB_NOT_FOUND", f'There is no trainer job "{job_id}".', job_id=job_id)

    def _decode(self, job: pb.TrainerJob) -> TrainerJob:
        assert self._connection is not None
        base_url = job.base_url
        if base_url and urlsplit(base_url).hostname in _WILDCARDS:
            # It listens on all interfaces of the control plane's host, which we know how to reach.
            host = urlsplit(self._connection.base_url).hostname
            scheme = urlsplit(base_url).scheme
            base_url = f"{scheme}://{f'[{host}]' if ':' in (host or '') else host}:{urlsplit(base_url).port}"
        return TrainerJob(
            job_id=job.job_id,
            job_name=job.job_name,
            base_url=base_url,
            base_model=job.base_model,
            state=pb.TrainerJobState.Name(job.state).removeprefix("TRAINER_JOB_STATE_").lower(),
            status_message=job.status_message,
            log_tail=job.log_tail,
            log_path=job.log_path,
            created_at=job.created_at.ToDatetime(datetime.UTC),
            ca_certificate=job.ca_certificate,
        )


def _where_log_is(job: TrainerJob) -> str:
    return (
        f"Its log: {job.log_path}" if job.log_path else f"Whoever runs the control plane has the log of {job.job_id}."
    )


class _Progress:
    """Says what is being waited for: one line that updates itself on a terminal, elsewhere a line a change."""

    def __init__(self, out: TextIO, *, quiet: bool) -> None:
        self._out = out
        self._quiet = quiet
        self._terminal = out.isatty()
        self._start = time.monotonic()
        self._said = ""
        self._open = False

    def say(self, what: str, status_message: str) -> None:
        """Says that `what` is under way."""
        line = f"{what}: {status_message.partition(chr(10))[0]}"
        if self._quiet:
            return
        if self._terminal:
            passed = f" … {time.monotonic() - self._start:.0f} s"
            # A line that wraps could not be written over.
            room = shutil.get_terminal_size().columns - len(passed) - 1
            self._write(f"\r\033[K{line[: max(room, 20)]}{passed}")
            self._open = True
        elif line != self._said:
            self._write(f"{line}\n")
        self._said = line

    def done(self, what: str) -> None:
        """Says that `what` has succeeded."""
        if not self._quiet:
            self._write(f"{self._wipe()}{what} ({time.monotonic() - self._start:.1f} s).\n")

    def end(self) -> None:
        """Leaves the terminal's line free for what comes next."""
        self._write(self._wipe())

    def _wipe(self) -> str:
        wipe, self._open = ("\r\033[K" if self._open else ""), False
        return wipe

    def _write(self, text: str) -> None:
        if text:
            # A closed stderr is no reason to fail.
            with contextlib.suppress(OSError, ValueError):
                self._out.write(text)
                self._out.flush()
