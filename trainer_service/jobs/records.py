"""The record on disk of a trainer job on this machine, for the next control plane: its owner, and its settings."""

import dataclasses
import datetime
import fcntl
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer_service.jobs.trainer_job import TrainerJobSpec

logger = logging.getLogger(__name__)

_FILE = "job.json"
_MAX_BYTES = 1 << 16


@dataclass(frozen=True)
class JobRecord:
    """The part of a job that does not change."""

    job_id: str
    owner: str
    request_id: str
    spec: TrainerJobSpec
    created_at: datetime.datetime


class JobFolder:
    """A job's folder, locked against other control planes on the same data folder until `release` or our death.

    Args:
        path: The folder, which exists.

    Raises:
        BlockingIOError: Another control plane holds it.
        OSError: It cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            # Children do not inherit the handle, so it is released when we die.
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._handle)
            raise

    @classmethod
    def make(cls, path: Path) -> "JobFolder":
        """A new folder that only this user may access."""
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.mkdir(mode=0o700)
        return cls(path)

    def write(self, record: JobRecord) -> None:
        """Writes the record, whole or not at all."""
        about = dataclasses.asdict(record) | {"created_at": record.created_at.isoformat()}
        partial = self.path / f".{_FILE}"
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "w") as file:
            json.dump(about, file)
            file.flush()
            os.fsync(handle)
        partial.rename(self.path / _FILE)

    def read(self) -> JobRecord:
        """What `write` wrote.

        Raises:
            ValueError: It is not a record, or belongs to another job.
            OSError: It cannot be read.
        """
        with (self.path / _FILE).open("rb") as file:
            try:
                about = json.loads(file.read(_MAX_BYTES))
                record = JobRecord(
                    job_id=about["job_id"],
                    owner=about["owner"],
                    request_id=about["request_id"],
                    spec=TrainerJobSpec(**about["spec"]),
                    created_at=datetime.datetime.fromisoformat(about["created_at"]),
                )
            except (KeyError, TypeError, RecursionError) as exc:
                raise ValueError(f"it is not the record of a job: {exc!r}") from exc
        texts = (record.owner, record.request_id, record.spec.base_model, record.spec.display_name)
        whole = all(isinstance(text, str) for text in texts) and record.created_at.tzinfo is not None
        if record.job_id != self.path.name or not whole:
            raise ValueError("it is not the record of this job")
        return record

    def forget(self) -> None:
        """Removes the record: the job no longer exists, though its log may stay."""
        (self.path / _FILE).unlink(missing_ok=True)

    def release(self) -> None:
        """Unlocks it for other control planes."""
        os.close(self._handle)


def left_behind(jobs_dir: Path) -> Iterator[tuple[JobFolder, JobRecord]]:
    """Jobs of control planes that have ended, oldest first, each locked from now on."""
    found: list[tuple[JobFolder, JobRecord]] = []
    for path in jobs_dir.glob(f"job-*/{_FILE}"):
        try:
            folder = JobFolder(path.parent)
        except OSError:
            continue  # Locked by another control plane, or gone meanwhile.
        try:
            found.append((folder, folder.read()))
        except (OSError, ValueError) as exc:
            folder.release()
            fields = {"job_id": path.parent.name, "error": str(exc)}
            logger.error("A trainer job's record cannot be used; the job is ignored.", extra={"fields": fields})
    yield from sorted(found, key=lambda pair: pair[1].created_at)
