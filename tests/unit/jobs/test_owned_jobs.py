"""Owners, limits and request ids of trainer jobs, above a place that runs none."""

import asyncio
import contextlib
import dataclasses
import datetime
from collections.abc import Iterator

import pytest
from gradwire.errors import GradwireError, error

from trainer_service.access import ANYBODY, Caller, current_caller
from trainer_service.jobs.owned import OwnedJobs
from trainer_service.jobs.trainer_job import TrainerJob, TrainerJobSpec, TrainerJobState

ALICE, BOB = (Caller(name=name, owner=name) for name in ("alice", "bob"))
OPS = Caller(name="ops", owner="ops", admin=True)
SPEC = TrainerJobSpec(base_model="m")


class FakeJobs:
    """Implements trainer_service.jobs.trainer_job.TrainerJobs without a trainer."""

    def __init__(self) -> None:
        self.jobs: dict[str, TrainerJob] = {}
        self.asked: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.failures: list[GradwireError] = []
        self._made = 0

    async def start(self) -> None: ...

    async def create(self, spec: TrainerJobSpec, *, owner: str, request_id: str) -> TrainerJob:
        await self.gate.wait()
        if self.failures:
            raise self.failures.pop()
        self._made += 1
        job = TrainerJob(
            job_id=f"job-{self._made}",
            job_name="",
            base_url="",
            base_model=spec.base_model,
            state=TrainerJobState.STARTING,
            status_message="",
            log_tail="",
            created_at=datetime.datetime.now(datetime.UTC),
            log_path="",
            owner=owner,
            request_id=request_id,
        )
        self.jobs[job.job_id] = job
        return job

    async def find(self, job_id: str) -> TrainerJob | None:
        return self.jobs.get(job_id)

    async def get(self, job_id: str) -> TrainerJob:
        self.asked.append(job_id)
        return self.jobs[job_id]

    async def list(self) -> list[TrainerJob]:
        await asyncio.sleep(0)
        return list(reversed(self.jobs.values()))

    async def delete(self, job_id: str) -> None:
        await self.gate.wait()
        del self.jobs[job_id]

    async def stop(self) -> None: ...


@contextlib.contextmanager
def calling(caller: Caller) -> Iterator[None]:
    token = current_caller.set(caller)
    try:
        yield
    finally:
        current_caller.reset(token)


async def refused(call: object) -> GradwireError:
    with pytest.raises(GradwireError) as caught:
        await call  # pyright: ignore[reportGeneralTypeIssues]
    return caught.value


def said(exc: GradwireError, job_id: str) -> tuple[object, ...]:
    metadata = {name: value.replace(job_id, "JOB") for name, value in exc.metadata.items()}
    return exc.reason, exc.code, exc.message.replace(job_id, "JOB"), metadata


async def test_somebody_elses_job_answers_as_one_that_does_not_exist():
    backend = FakeJobs()
    jobs = OwnedJobs(backend, max_jobs=8)
    with calling(ALICE):
        job = await jobs.create(SPEC, request_id="once")
    with calling(BOB):
        for call in (jobs.get, jobs.delete):
            theirs, nobodys = await refused(call(job.job_id)), await refused(call("job-0"))
            assert theirs.reason == "TRAINER_JOB_NOT_FOUND"
            assert said(theirs, job.job_id) == said(nobodys, "job-0")
        assert backend.asked == [], "a trainer was asked, which takes time and so tells that there is one"
        assert await jobs.list() == []
        assert (await jobs.create(SPEC, request_id="once")).job_id != job.job_id
    assert job.job_id in backend.jobs


async def test_an_admin_sees_and_deletes_everybodys_jobs():
    jobs = OwnedJobs(FakeJobs(), max_jobs=8)
    made = []
    for caller in (ALICE, BOB):
        with calling(caller):
            made.append((await jobs.create(SPEC)).job_id)
    with calling(OPS):
        assert [job.job_id for job in await jobs.list()] == made[::-1]
        assert (await jobs.get(made[0])).owner == "alice"
        await jobs.delete(made[0])
    with calling(ALICE):
        assert await jobs.list() == []


async def test_deleting_twice_is_no_error_for_the_owner_and_tells_others_nothing():
    jobs = OwnedJobs(FakeJobs(), max_jobs=8)
    with calling(ALICE):
        job_id = (await jobs.create(SPEC)).job_id
        await jobs.delete(job_id)
        await jobs.delete(job_id)
        assert (await refused(jobs.get(job_id))).reason == "TRAINER_JOB_NOT_FOUND"
    with calling(BOB):
        assert said(await refused(jobs.delete(job_id)), job_id) == said(await refused(jobs.delete("job-0")), "job-0")


@pytest.mark.parametrize("while_being_deleted", [False, True])
async def test_a_request_id_whose_job_was_deleted_makes_a_new_one(while_being_deleted: bool):
    backend = FakeJobs()
    jobs = OwnedJobs(backend, max_jobs=8)
    with calling(ALICE):
        first = await jobs.create(SPEC, request_id="once")
        assert (await jobs.create(SPEC, request_id="once")).job_id == first.job_id
        if while_being_deleted:
            backend.gate.clear()
        deleting = asyncio.create_task(jobs.delete(first.job_id))
        if not while_being_deleted:
            await deleting
        await asyncio.sleep(0)
        again = asyncio.create_task(jobs.create(SPEC, request_id="once"))
        await asyncio.sleep(0)
        backend.gate.set()
        await deleting
        assert (await again).job_id != first.job_id
        assert list(backend.jobs) == [(await again).job_id]


async def test_one_request_id_sent_twice_at_once_makes_one_job():
    backend = FakeJobs()
    jobs = OwnedJobs(backend, max_jobs=8)
    with calling(ALICE):
        made = await asyncio.gather(*(jobs.create(SPEC, request_id="once") for _ in range(5)))
        unnamed = await asyncio.gather(*(jobs.create(SPEC) for _ in range(2)))
    assert len({job.job_id for job in made}) == 1
    assert len({job.job_id for job in unnamed}) == 2


async def test_a_request_id_outlives_the_control_plane_and_the_caller_who_left():
    backend = FakeJobs()
    backend.gate.clear()
    with calling(ALICE):
        leaves = asyncio.create_task(OwnedJobs(backend, max_jobs=8).create(SPEC, request_id="once"))
        await asyncio.sleep(0.01)
        leaves.cancel()
        backend.gate.set()
        while not backend.jobs:  # noqa: ASYNC110  (the fake has no event for it)
            await asyncio.sleep(0)
        after_a_restart = OwnedJobs(backend, max_jobs=8)
        assert (await after_a_restart.create(SPEC, request_id="once")).job_id == "job-1"


async def test_a_creation_that_failed_may_be_tried_again_under_its_request_id():
    backend = FakeJobs()
    backend.failures.append(error("TRAINER_JOB_FAILED", "No."))
    jobs = OwnedJobs(backend, max_jobs=8)
    with calling(ALICE):
        assert (await refused(jobs.create(SPEC, request_id="once"))).message == "No."
        assert (await jobs.create(SPEC, request_id="once")).job_id == "job-1"


async def test_limits_hold_with_their_numbers_also_for_calls_at_once():
    backend = FakeJobs()
    jobs = OwnedJobs(backend, max_jobs=3, max_jobs_per_key=2)
    with calling(ALICE):
        made = await asyncio.gather(*(jobs.create(SPEC) for _ in range(5)), return_exceptions=True)
        failed = [each for each in made if isinstance(each, GradwireError)]
        assert len(failed) == 3
        assert {exc.reason for exc in failed} == {"LIMIT_EXCEEDED"}
        assert failed[0].metadata == {"limit": "2", "got": "3"}
        assert "This API key has 2 trainer jobs and may have at most 2" in failed[0].message
    with calling(BOB):
        await jobs.create(SPEC)
        whole = await refused(jobs.create(SPEC))
        assert "This control plane has 3 trainer jobs and may have at most 3" in whole.message
    # A failed job holds its place until it is deleted: it holds a folder.
    backend.jobs["job-1"] = dataclasses.replace(backend.jobs["job-1"], state=TrainerJobState.FAILED)
    with calling(ALICE):
        assert (await refused(jobs.create(SPEC))).reason == "LIMIT_EXCEEDED"
        await jobs.delete("job-1")
        assert (await jobs.create(SPEC)).job_id == "job-4"


async def test_without_keys_everybody_shares_what_there_is():
    jobs = OwnedJobs(FakeJobs(), max_jobs=1)
    with calling(ANYBODY):
        job = await jobs.create(SPEC)
        assert [job] == await jobs.list()


@pytest.mark.parametrize("job_id", ["x" * 100_000, "a\nb", ""])
async def test_a_job_id_that_is_none_is_quoted_in_bounds(job_id: str):
    exc = await refused(OwnedJobs(FakeJobs(), max_jobs=1).get(job_id))
    assert exc.reason == "TRAINER_JOB_NOT_FOUND"
    assert len(exc.message) < 300
    assert exc.message.isprintable()
