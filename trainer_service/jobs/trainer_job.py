"""What a trainer job is, and the interface of what starts one."""

import datetime
import enum
from dataclasses import dataclass
from typing import Protocol


class TrainerJobState(enum.Enum):
    """State of a trainer job; values are those of the proto enum without its prefix."""

    STARTING = "STARTING"
    READY = "READY"
    FAILED = "FAILED"


@dataclass(frozen=True)
class TrainerJobSpec:
    """The trainer to run."""

    base_model: str
    """Hub id, or folder on the host where the trainer runs."""
    display_name: str = ""
    """The user's name for it."""
    max_context_length: int = 0
    """Longest sequence accepted, tokens; 0 means the model's own limit."""
    accelerator_type: str = ""
    """Label of the cluster's nodes to run on; "" allows any."""
    accelerator_count: int = 0
    """0 means what the control plane gives its trainers."""
    any_folder: bool = True
    """Whether base_model may be any folder of the host; otherwise it is a hub id or inside the folder of models."""


@dataclass(frozen=True)
class TrainerJob:
    """A trainer and its processes, in their current state."""

    job_id: str
    job_name: str
    base_url: str
    """Where clients connect; "" until the trainer listens."""
    base_model: str
    state: TrainerJobState
    status_message: str
    """What it is doing, or why it failed, as a sentence."""
    log_tail: str
    """Last lines of its log if it failed, else ""."""
    created_at: datetime.datetime
    log_path: str
    owner: str
    """See access.Caller."""
    request_id: str
    """Of the call that created it, or ""."""
    ca_certificate: str = ""
    """PEM of its server's certificate, for clients to trust; "" in plaintext, or if clients know its root."""


class TrainerJobs(Protocol):
    """A place where trainers run: this machine (`local.py`), or a cluster (`kubernetes.py`).

    It keeps owner and request_id with each job, so that a restarted control plane finds them, but does not interpret
    them: `owned.py`, above it, decides who may do what.
    """

    async def start(self) -> None:
        """Takes over the jobs of the previous control plane."""
        ...

    async def create(self, spec: TrainerJobSpec, *, owner: str, request_id: str) -> TrainerJob:
        """Starts a new trainer and returns before it is ready."""
        ...

    async def find(self, job_id: str) -> TrainerJob | None:
        """The job as last known, at once; None if there is none."""
        ...

    async def get(self, job_id: str) -> TrainerJob:
        """The current state of an existing job; may ask its trainer."""
        ...

    async def list(self) -> list[TrainerJob]:
        """All jobs as last known, newest first."""
        ...

    async def delete(self, job_id: str) -> None:
        """Stops the trainer of an existing job and forgets the job; returns once its processes are gone."""
        ...

    async def stop(self) -> None:
        """Accepts no new jobs, and stops trainers that cannot outlive the control plane."""
        ...
