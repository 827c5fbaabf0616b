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


class TrainerJobs(Protocol):
    """A place where trainers run: this machine (`local.py`); a cluster would be another."""

    async def create(self, spec: TrainerJobSpec, *, request_id: str = "") -> TrainerJob:
        """Starts a trainer and returns before it is ready; the same request_id gets the same job."""
        ...

    async def get(self, job_id: str) -> TrainerJob:
        """The job as it stands. Raises TRAINER_JOB_NOT_FOUND."""
        ...

    async def list(self) -> list[TrainerJob]:
        """All jobs, newest first."""
        ...

    async def delete(self, job_id: str) -> None:
        """Stops the trainer and forgets the job; returns once its processes are gone. Twice is not an error.

        Raises TRAINER_JOB_NOT_FOUND for a job there never was.
        """
        ...

    async def stop(self) -> None:
        """Stops all trainers and takes no new ones."""
        ...
