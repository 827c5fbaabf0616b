"""Several keys on one control plane: what each is told of the others and of the host, and what a restart keeps."""

import contextlib
import os
import shutil
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from gradwire import TrainerJob, TrainerJobConfig, TrainerJobManager
from gradwire._client.transport import Connection
from gradwire.errors import FailedPreconditionError, GradwireError, InvalidArgumentError, NotFoundError
from gradwire.v1 import trainer_job_service_pb2 as pb
from gradwire.v1.trainer_job_service_pb2_grpc import TrainerJobServiceStub

from benchmarks.fuzz_jobs import fuzz_jobs
from tests.jobs_process import running_jobs
from tests.trainer_process import descendants
from tests.waiting import wait_until

KEYS = "alice alices-key,bob bobs-key,ops ops-key admin"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def base_url(folder: Path) -> Iterator[str]:
    with running_jobs(folder, api_keys=KEYS, max_jobs=3, max_jobs_per_key=2) as (_, base_url):
        yield base_url


@pytest.fixture(autouse=True)
def none_left(base_url: str) -> Iterator[None]:
    yield
    with manager("ops", base_url) as ops:
        for job in ops.list():
            ops.delete(job.job_id)


def manager(who: str, base_url: str) -> TrainerJobManager:
    key = {"alice": "alices-key", "bob": "bobs-key", "ops": "ops-key"}[who]
    return TrainerJobManager(key, base_url=base_url, quiet=True)


def failed(jobs: TrainerJobManager, job_id: str) -> TrainerJob:
    wait_until(lambda: jobs.get(job_id).state == "failed", lambda: jobs.get(job_id))
    return jobs.get(job_id)


def outcome(call: object, job_id: str) -> tuple[object, ...]:
    with pytest.raises(GradwireError) as caught:
        call(job_id)  # pyright: ignore[reportCallIssue]
    exc = caught.value
    return (
        type(exc),
        exc.reason,
        str(exc).replace(job_id, "JOB"),
        {k: v.replace(job_id, "JOB") for k, v in exc.metadata.items()},
    )


def test_a_key_sees_and_deletes_its_own_jobs_alone(base_url: str):
    with manager("alice", base_url) as alice, manager("bob", base_url) as bob, manager("ops", base_url) as ops:
        job = alice.create_and_wait(TrainerJobConfig("quick"))
        assert bob.list() == []
        for call in (bob.get, bob.delete):
            assert outcome(call, job.job_id) == outcome(call, "job-000000000000")
            assert outcome(call, job.job_id)[0] is NotFoundError
        assert alice.get(job.job_id).state == "ready"
        assert [each.job_id for each in ops.list()] == [job.job_id]


def test_limits_are_told_with_their_numbers(base_url: str):
    with manager("alice", base_url) as alice, manager("bob", base_url) as bob:
        for _ in range(2):
            alice.create(TrainerJobConfig("loading"))
        with pytest.raises(GradwireError, match="This API key has 2 trainer jobs and may have at most 2") as caught:
            alice.create(TrainerJobConfig("loading"))
        assert caught.value.reason == "LIMIT_EXCEEDED"
        bob.create(TrainerJobConfig("loading"))
        with pytest.raises(GradwireError, match="This control plane has 3 trainer jobs and may have at most 3"):
            bob.create(TrainerJobConfig("loading"))


def test_a_request_id_is_its_owners_and_ends_with_its_job(base_url: str):
    request = pb.CreateTrainerJobRequest(request_id="once", base_model="loading")
    made: list[str] = []
    for key, deletes in (("alices-key", False), ("bobs-key", False), ("alices-key", True), ("alices-key", False)):
        connection = Connection(base_url, key)
        answer = connection.call(TrainerJobServiceStub, "CreateTrainerJob", request, timeout_s=30).trainer_job
        made.append(answer.job_id)
        if deletes:
            delete = pb.DeleteTrainerJobRequest(job_id=answer.job_id)
            connection.call(TrainerJobServiceStub, "DeleteTrainerJob", delete, timeout_s=30)
        connection.close()
    assert made[0] == made[2]
    assert len(set(made)) == 3


def test_who_is_no_admin_is_told_why_a_trainer_failed_and_nothing_of_the_host(base_url: str, folder: Path):
    with manager("alice", base_url) as alice, manager("ops", base_url) as ops:
        with pytest.raises(FailedPreconditionError, match=r"failed: There is no model at broken\.$"):
            alice.create_and_wait(TrainerJobConfig("broken"))
        job_id = alice.create(TrainerJobConfig("tells")).job_id
        told = failed(alice, job_id)
        assert str(folder) not in repr(told)
        assert (told.log_path, told.log_tail) == ("", "")
        assert f"names folders of the host. Whoever runs the control plane finds it in the log of {job_id}" in repr(
            told
        )
        shown = ops.get(job_id)
        assert shown.log_path == str(folder / "data" / "jobs" / job_id / "trainer.log")
        assert f"{folder}/data/jobs/{job_id}/ready.json is not what it should be" in shown.status_message
        assert shown.log_tail
        assert str(folder) not in repr(alice.list())


def test_which_folders_the_host_has_cannot_be_asked(base_url: str, folder: Path):
    there, nowhere = str(folder), "/no/such/folder"
    said = []
    with manager("alice", base_url) as alice:
        for path in (there, nowhere, "../data", "a/../../b", "~/models", "~root"):
            with pytest.raises(InvalidArgumentError, match="only an admin's key may name") as caught:
                alice.create(TrainerJobConfig(path))
            said.append(str(caught.value))
        assert len(set(said)) == 1
        assert alice.list() == []
    with manager("ops", base_url) as ops:
        assert ops.create(TrainerJobConfig(nowhere)).base_model == nowhere


def test_a_relative_path_is_one_below_the_folder_of_models_for_who_is_no_admin(base_url: str, folder: Path):
    with manager("alice", base_url) as alice, manager("ops", base_url) as ops:
        for who, where in ((alice, folder / "data" / "models"), (ops, Path.cwd())):
            who.create_and_wait(TrainerJobConfig("quick"))
            trainers = [pid for pid in descendants(os.getpid()) if "--base-model=quick" in _command(pid)]
            assert where in {Path(os.readlink(f"/proc/{pid}/cwd")) for pid in trainers}


def _command(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


@pytest.mark.parametrize("name", ["x" * 1_000_000, "a\nb"])
@pytest.mark.parametrize("field", ["base_model", "display_name", "request_id"])
def test_strings_have_limits_and_are_not_quoted(base_url: str, field: str, name: str):
    connection = Connection(base_url, "alices-key")
    request = pb.CreateTrainerJobRequest(base_model="m")
    setattr(request, field, name)
    with pytest.raises(InvalidArgumentError, match=f"{field} has {len(name)} characters") as caught:
        connection.call(TrainerJobServiceStub, "CreateTrainerJob", request, timeout_s=30)
    assert len(str(caught.value)) < 300
    connection.close()


@pytest.mark.parametrize("how", ["sigterm", "sigkill"])
def test_owners_and_request_ids_survive_a_restart_of_the_control_plane(tmp_path: Path, how: str):
    request = pb.CreateTrainerJobRequest(request_id="once", base_model="loading", display_name="mine")
    with running_jobs(tmp_path, api_keys=KEYS) as (process, base_url):
        connection = Connection(base_url, "alices-key")
        job_id = connection.call(TrainerJobServiceStub, "CreateTrainerJob", request, timeout_s=30).trainer_job.job_id
        connection.close()
        runs = tmp_path / "data" / "jobs" / job_id / "runs"
        runs.mkdir()
        process.send_signal(signal.SIGTERM if how == "sigterm" else signal.SIGKILL)
        process.wait(30)
    record = runs.parent / "job.json"
    assert [stat.S_IMODE(path.stat().st_mode) for path in (record, runs.parent / "trainer.log")] == [0o600, 0o600]
    assert stat.S_IMODE(runs.parent.stat().st_mode) == 0o700
    # A damaged record hides nothing but itself.
    shutil.copytree(runs.parent, runs.parent.with_name("job-damaged"))
    (runs.parent.with_name("job-damaged") / "job.json").write_text("[" * 100_000)
    with running_jobs(tmp_path, api_keys=KEYS) as (_, base_url), contextlib.ExitStack() as stack:
        alice, bob, ops = (stack.enter_context(manager(who, base_url)) for who in ("alice", "bob", "ops"))
        assert bob.list() == []
        assert outcome(bob.get, job_id) == outcome(bob.get, "job-000000000000")
        assert [job.job_id for job in ops.list()] == [job_id]
        (job,) = alice.list()
        assert (job.job_id, job.state, job.job_name[:5]) == (job_id, "failed", "mine-")
        assert "The control plane ended, and this trainer with it" in job.status_message
        connection = Connection(base_url, "alices-key")
        again = connection.call(TrainerJobServiceStub, "CreateTrainerJob", request, timeout_s=30).trainer_job
        connection.close()
        assert again.job_id == job_id
        alice.delete(job_id)
        assert not runs.exists()
        assert alice.list() == []
    with running_jobs(tmp_path, api_keys=KEYS) as (_, base_url), manager("ops", base_url) as ops:
        assert ops.list() == [], "a deleted job came back"


def test_every_long_field_is_refused_shortly_and_another_keys_job_stays_as_it_was(tmp_path: Path):
    fuzz_jobs(tmp_path, frames=40, seed=3)
