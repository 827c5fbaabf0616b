"""Trainer jobs as Fireworks' SDK asks for them. The trainers are there already, so a job is a claim on one of them: it
runs at once, and its end ends the sessions that were begun in it."""

import json
import sqlite3
import time
import uuid
from typing import Any

from trainer_service.gateway.outcomes import Refusal
from trainer_service.gateway.sessions import Caller
from trainer_service.gateway.store import Store
from trainer_service.gateway.trainers import TrainerModel

ACCOUNT = "gradwire"
"""The one account there is; whose a job is, its key says."""


class Jobs:
    """All jobs.

    Args:
        store: Where they are kept.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def create(self, caller: Caller, job_id: str, *, display_name: str, lora_rank: int, served: TrainerModel) -> str:
        """Creates a job; returns its id.

        Args:
            caller: Its owner.
            job_id: The id it asked for; "" for any.
            display_name: For people.
            lora_rank: For the record; each model says its own.
            served: The model.

        Raises:
            Refusal: 409: the caller has a job of that id.
        """
        job_id = job_id or uuid.uuid4().hex[:16]
        about = {"display_name": display_name, "lora_rank": lora_rank, "base_model": served.name}
        try:
            self._store.add_job(job_id, caller.owner, json.dumps(about))
        except sqlite3.IntegrityError:
            raise Refusal(409, f"There is a job {job_id[:100]!r} already.", reason="ALREADY_EXISTS") from None
        return job_id

    def find(self, job_id: str, caller: Caller) -> sqlite3.Row:
        """One of the caller's jobs.

        Raises:
            Refusal: 404: there is none, or it is somebody else's.
        """
        row = self._store.job(job_id, caller.owner)
        if row is None:
            raise Refusal(404, f"There is no trainer job {job_id[:100]!r}.", reason="JOB_NOT_FOUND")
        return row

    def of(self, caller: Caller) -> list[sqlite3.Row]:
        """A caller's jobs, newest first."""
        return self._store.jobs(caller.owner)

    def add_session(self, row: sqlite3.Row, session_id: str) -> None:
        """Notes that a session was begun in a job."""
        self._store.set_job_sessions(row["job_id"], row["owner"], json.dumps([*self.sessions(row), session_id]))

    @staticmethod
    def sessions(row: sqlite3.Row) -> list[str]:
        """Ids of the sessions begun in a job."""
        return json.loads(row["sessions"])

    def delete(self, row: sqlite3.Row) -> None:
        """Ends a job; the caller of this ends its sessions."""
        self._store.delete_job(row["job_id"], row["owner"])


def base_model_of(row: sqlite3.Row) -> str:
    """The name of a job's model."""
    return json.loads(row["about"])["base_model"]


def describe(row: sqlite3.Row, *, max_context_length: int) -> dict[str, Any]:
    """A job as Fireworks' API describes it."""
    about = json.loads(row["about"])
    return {
        "name": f"accounts/{ACCOUNT}/rlorTrainerJobs/{row['job_id']}",
        "displayName": about["display_name"],
        "createTime": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(row["created_s"])),
        "state": "JOB_STATE_RUNNING",
        "serviceMode": True,
        "trainingConfig": {
            "baseModel": about["base_model"],
            "loraRank": about["lora_rank"],
            "maxContextLength": max_context_length,
        },
    }
