"""Who owns which trainer job, how many there may be, and which call created which; above any place they run."""

import asyncio
from collections import OrderedDict

from gradwire.errors import GradwireError, error

from trainer_service.access import current_caller
from trainer_service.jobs.trainer_job import TrainerJob, TrainerJobs, TrainerJobSpec

_REMEMBERED_DELETIONS = 1000
"""How many deleted jobs are remembered, so that deleting them again is not an error."""
_SHOWN_CHARS = 100


class OwnedJobs:
    """Trainer jobs that the current caller may see and create. For anyone but admins, jobs of others do not exist. All
    on one event loop.

    Args:
        jobs: Where they run; it keeps each job's owner and request_id with the job, so that both outlive this process.
        max_jobs: The most jobs, including failed ones that were not deleted.
        max_jobs_per_key: The most jobs of one API key; 0 for no separate limit.
    """

    def __init__(self, jobs: TrainerJobs, *, max_jobs: int, max_jobs_per_key: int = 0) -> None:
        self._jobs = jobs
        self._max_jobs = max_jobs
        self._max_jobs_per_key = max_jobs_per_key
        self._one_by_one = asyncio.Lock()
        self._creating: dict[tuple[str, str], asyncio.Task[TrainerJob]] = {}
        self._deleting: dict[str, asyncio.Task[None]] = {}
        self._deleted: OrderedDict[str, str] = OrderedDict()  # Owners of deleted jobs.

    async def create(self, spec: TrainerJobSpec, *, request_id: str = "") -> TrainerJob:
        """Starts a trainer and returns before it is ready. The same request_id of the same owner gets the same job, or
        a new one if that was deleted.

        Raises:
            GradwireError: LIMIT_EXCEEDED, DRAINING, TRAINER_JOB_FAILED.
        """
        key = (current_caller.get().owner, request_id)
        creating = self._creating.get(key) if request_id else None
        if creating is None:
            creating = asyncio.create_task(self._create(spec, *key))
            if request_id:
                self._creating[key] = creating
                creating.add_done_callback(lambda done: self._created(key, done))
        # A client that disconnects while its trainer starts may repeat the call with the same request_id.
        return await asyncio.shield(creating)

    async def get(self, job_id: str) -> TrainerJob:
        """The job as it stands.

        Raises:
            GradwireError: TRAINER_JOB_NOT_FOUND: there is none, or it belongs to someone else.
        """
        await self._find(job_id)
        # Only now: asking the trainer takes time, which would reveal that the job exists.
        return await self._jobs.get(job_id)

    async def list(self) -> list[TrainerJob]:
        """All jobs the current caller may see, newest first."""
        caller = current_caller.get()
        return [job for job in await self._jobs.list() if caller.may_see(job.owner)]

    async def delete(self, job_id: str) -> None:
        """Stops the trainer and forgets the job; returns once its processes are gone. Deleting twice is not an error.

        Raises:
            GradwireError: TRAINER_JOB_NOT_FOUND, like get.
        """
        owner = self._deleted.get(job_id)
        if owner is not None and current_caller.get().may_see(owner):
            return
        job = await self._find(job_id)
        deleting = self._deleting.get(job_id)
        if deleting is None:
            deleting = self._deleting[job_id] = asyncio.create_task(self._delete(job))
            deleting.add_done_callback(lambda _: self._deleting.pop(job_id))
        await asyncio.shield(deleting)

    def _created(self, key: tuple[str, str], done: "asyncio.Task[TrainerJob]") -> None:
        """From here on, the job itself records which call created it."""
        del self._creating[key]
        if not done.cancelled():
            # Retrieved, in case nobody waits any more.
            done.exception()

    async def _create(self, spec: TrainerJobSpec, owner: str, request_id: str) -> TrainerJob:
        async with self._one_by_one:
            jobs = await self._jobs.list()
            for job in jobs:
                same = request_id and (job.owner, job.request_id) == (owner, request_id)
                if same and job.job_id not in self._deleting:
                    return job
            own = sum(job.owner == owner for job in jobs)
            if self._max_jobs_per_key and own >= self._max_jobs_per_key:
                raise _too_many(f"This API key has {own} trainer jobs", self._max_jobs_per_key, own)
            if len(jobs) >= self._max_jobs:
                raise _too_many(f"This control plane has {len(jobs)} trainer jobs", self._max_jobs, len(jobs))
            return await self._jobs.create(spec, owner=owner, request_id=request_id)

    async def _delete(self, job: TrainerJob) -> None:
        await self._jobs.delete(job.job_id)
        self._deleted[job.job_id] = job.owner
        if len(self._deleted) > _REMEMBERED_DELETIONS:
            self._deleted.popitem(last=False)

    async def _find(self, job_id: str) -> TrainerJob:
        job = await self._jobs.find(job_id)
        if job is None or not current_caller.get().may_see(job.owner):
            raise not_found(job_id)
        return job


def not_found(job_id: str) -> GradwireError:
    """TRAINER_JOB_NOT_FOUND, in the same words whether there is none or it belongs to someone else."""
    shown = job_id if len(job_id) <= _SHOWN_CHARS and job_id.isprintable() else f"{job_id[:_SHOWN_CHARS]!r}…"
    text = f'There is no trainer job "{shown}"; it was deleted, or belongs to another control plane.'
    return error("TRAINER_JOB_NOT_FOUND", text, job_id=shown)


def _too_many(what: str, limit: int, got: int) -> GradwireError:
    text = f"{what} and may have at most {limit}, failed ones included; delete one with DeleteTrainerJob."
    return error("LIMIT_EXCEEDED", text, limit=limit, got=got + 1)
