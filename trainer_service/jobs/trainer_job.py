"""What a trainer job is, and what starts one."""

import datetime
import enum
from dataclasses import dataclass
from typing import Protocol


class TrainerJobState(enum.Enum):
    """Where a trainer job is in its life; values are those of the proto enum, less its prefix."""

    STARTING = "STARTING"
    READY = "READY"
    FAILED = "FAILED"


@dataclass(frozen=True)
class TrainerJobSpec:
    """The trainer wanted."""

    base_model: str
    """Hub id, or folder on the host the trainer will run on."""
    display_name: str = ""
    """The user's name for it."""
    max_context_length: int = 0
    """Longest sequence taken, tokens; 0 takes the model's own limit."""
    accelerator_type: str = ""
    """As nodes of a cluster are labelled; "" takes any."""
    accelerator_count: int = 0
    """0 takes what the control plane's trainers have."""
    any_folder: bool = True
    """Whether base_model may be any folder of the host; else it is a hub id or lies in the folder of models."""


@dataclass(frozen=True)
class TrainerJob:
    """A trainer and the processes behind it, as they stand."""

    job_id: str
    job_name: str
    base_url: str
    """Where clients connect; "" until the trainer listens."""
    base_model: str
    state: TrainerJobState
    status_message: str
    """What it is doing, or why it failed, in a sentence."""
    log_tail: str
    """Last lines of its log when it failed, else ""."""
    created_at: datetime.datetime
    log_path: str
    owner: str
    """See access.Caller."""
    request_id: str
    """Of the call that made it, or ""."""
    ca_certificate: str = ""
    """PEM of the certificate its server shows, for clients to trust; "" in plaintext, or where they know its root."""


class TrainerJobs(Protocol):
    """A place where trainers run: this machine (`local.py`), or a cluster (`kubernetes.py`).

    It keeps owner and request_id with each job, so that a control plane that is started again finds them, and gives
    them no meaning: `owned.py` decides above it who may do what.
    """

    async def start(self) -> None:
        """Takes up the jobs of the control plane before this one."""
        ...

    async def create(self, spec: TrainerJobSpec, *, owner: str, request_id: str) -> TrainerJob:
        """Starts a trainer and returns before it is ready; always a new one."""
        ...

    async def find(self, job_id: str) -> TrainerJob | None:
        """The job as it was last known, at once; None where there is none."""
        ...

    async def get(self, job_id: str) -> TrainerJob:
        """The job, which is there, as it stands; its trainer may be asked."""
        ...

    async def list(self) -> list[TrainerJob]:
        """All jobs as they were last known, newest first."""
        ...

    async def delete(self, job_id: str) -> None:
        """Stops the trainer of a job, which is there, and forgets the job; returns once its processes are gone."""
        ...

    async def stop(self) -> None:
        """Takes no new jobs, and stops trainers that cannot outlive the control plane."""
        ...
