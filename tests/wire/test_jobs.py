"""Trainer jobs over a real socket: a real control plane process, fake trainers."""

import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from gradwire import TrainerJob, TrainerJobConfig, TrainerJobManager
from gradwire._client.transport import Connection
from gradwire.errors import (
    FailedPreconditionError,
    GradwireError,
    InvalidArgumentError,
    NotFoundError,
    OperationTimeoutError,
    UnauthenticatedError,
    UnimplementedError,
)
from gradwire.v1.trainer_job_service_pb2 import CreateTrainerJobRequest
from gradwire.v1.trainer_job_service_pb2_grpc import TrainerJobServiceStub
from gradwire.v1.trainer_service_pb2 import DeleteRunRequest
from gradwire.v1.trainer_service_pb2_grpc import TrainerServiceStub
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.cli import sigint_heeded
from tests.frames import JOBS, Frames, send_frames
from tests.jobs_process import API_KEY, STOP_GRACE_S, running_jobs
from tests.trainer_process import descendants, wait_gone
from tests.waiting import DEADLINE_S, wait_until


@pytest.fixture(scope="module")
def base_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_jobs(tmp_path_factory.mktemp("jobs")) as (_, base_url):
        yield base_url


@pytest.fixture
def manager(base_url: str) -> Iterator[TrainerJobManager]:
    with TrainerJobManager(API_KEY, base_url=base_url) as manager:
        yield manager
        for job in manager.list():
            manager.delete(job.job_id)


def let_die(job: TrainerJob) -> None:
    """Has a fake trainer that "dies" do it."""
    with grpc.insecure_channel(job.base_url.removeprefix("http://")) as channel:
        trainer: Any = TrainerServiceStub(channel)
        with pytest.raises(grpc.RpcError):
            trainer.DeleteRun(DeleteRunRequest(), timeout=DEADLINE_S)


def failed(manager: TrainerJobManager, job_id: str) -> TrainerJob:
    """The job, once it has failed."""
    wait_until(lambda: manager.get(job_id).state == "failed", lambda: manager.get(job_id))
    return manager.get(job_id)


def test_create_and_wait_returns_a_ready_trainer_and_delete_stops_it(manager: TrainerJobManager):
    job = manager.create_and_wait(TrainerJobConfig("quick", display_name="first"))
    assert (job.state, job.base_model) == ("ready", "quick")
    assert job.job_name.startswith("first-")
    assert job.job_id.startswith("job-")
    host, port = job.base_url.removeprefix("http://").split(":")
    socket.create_connection((host, int(port)), 5).close()
    assert [listed.job_id for listed in manager.list()] == [job.job_id]
    manager.delete(job.job_id)
    with pytest.raises(ConnectionError):
        socket.create_connection((host, int(port)), 5)
    assert manager.list() == []


def test_trainers_keep_checkpoints_where_the_control_plane_was_told_to(tmp_path: Path):
    with (
        running_jobs(tmp_path, storage_url="s3://bucket/prefix") as (process, base_url),
        TrainerJobManager(API_KEY, base_url=base_url) as manager,
    ):
        manager.create_and_wait(TrainerJobConfig("quick"))
        lines = [Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in descendants(process.pid)]
        (trainer,) = (line for line in lines if b"tests.fake_trainer" in line)
        assert trainer[trainer.index(b"--storage-url") + 1] == b"s3://bucket/prefix"


def test_deleting_twice_is_no_error_and_an_unknown_job_is(manager: TrainerJobManager):
    job = manager.create(TrainerJobConfig("loading"))
    manager.delete(job.job_id)
    manager.delete(job.job_id)
    with pytest.raises(NotFoundError, match=job.job_id) as caught:
        manager.get(job.job_id)
    assert caught.value.reason == "TRAINER_JOB_NOT_FOUND"
    with pytest.raises(NotFoundError):
        manager.delete("job-never-was")


def test_deleting_from_two_threads_waits_for_one_stop(manager: TrainerJobManager):
    job = manager.create_and_wait(TrainerJobConfig("deaf"))
    threads = [threading.Thread(target=manager.delete, args=[job.job_id]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert manager.list() == []


def test_jobs_are_listed_newest_first(manager: TrainerJobManager):
    made = [manager.create(TrainerJobConfig("loading")).job_id for _ in range(3)]
    assert [job.job_id for job in manager.list()] == made[::-1]


def test_repeated_request_id_gets_the_same_job(base_url: str, manager: TrainerJobManager):
    connection = Connection(base_url, API_KEY)
    request = CreateTrainerJobRequest(request_id="once", base_model="loading")
    first, second = (
        connection.call(TrainerJobServiceStub, "CreateTrainerJob", request, timeout_s=DEADLINE_S).trainer_job.job_id
        for _ in range(2)
    )
    assert first == second
    assert len(manager.list()) == 1
    connection.close()


def test_trainer_says_itself_what_it_is_doing(manager: TrainerJobManager):
    job = manager.create(TrainerJobConfig("loading"))
    wait_until(lambda: manager.get(job.job_id).status_message == "loading the model", lambda: manager.get(job.job_id))
    assert manager.get(job.job_id).state == "starting"


def test_trainer_that_cannot_start_is_an_error_with_its_reason_and_log(manager: TrainerJobManager):
    with pytest.raises(FailedPreconditionError, match="There is no model at broken") as caught:
        manager.create_and_wait(TrainerJobConfig("broken"))
    assert caught.value.reason == "TRAINER_JOB_FAILED"
    assert "looking for it" in str(caught.value)
    assert "trainer.log" in str(caught.value)
    assert manager.list() == []


def test_trainer_that_ends_without_a_word_is_told_by_its_exit_code(manager: TrainerJobManager):
    with pytest.raises(FailedPreconditionError, match="ended with exit code 3"):
        manager.create_and_wait(TrainerJobConfig("silent"))


def test_ready_trainer_that_ends_by_itself_is_failed(manager: TrainerJobManager):
    job = manager.create_and_wait(TrainerJobConfig("dies"))
    let_die(job)
    assert "exit code 7" in failed(manager, job.job_id).status_message


def test_a_trainer_that_ends_is_failed_though_the_data_folder_is_gone(tmp_path: Path):
    with running_jobs(tmp_path) as (_, base_url), TrainerJobManager(API_KEY, base_url=base_url) as manager:
        job = manager.create_and_wait(TrainerJobConfig("dies"))
        shutil.rmtree(tmp_path / "data")
        let_die(job)
        assert "exit code 7" in failed(manager, job.job_id).status_message


def test_trainer_that_is_late_is_deleted(manager: TrainerJobManager):
    with pytest.raises(OperationTimeoutError, match="not ready within 0.5 s; it was at: "):
        manager.create_and_wait(TrainerJobConfig("loading"), timeout_s=0.5)
    assert manager.list() == []


def test_ctrl_c_while_waiting_deletes_the_job(manager: TrainerJobManager, monkeypatch: pytest.MonkeyPatch):
    waits, get = threading.Event(), manager.get
    monkeypatch.setattr(manager, "get", lambda job_id: (waits.set(), get(job_id))[1])

    def interrupt() -> None:
        assert waits.wait(DEADLINE_S)
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    with sigint_heeded():
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            manager.create_and_wait(TrainerJobConfig("loading"), timeout_s=DEADLINE_S)
        thread.join()
    assert manager.list() == []


def test_trainer_deaf_to_sigterm_is_killed(manager: TrainerJobManager):
    job = manager.create_and_wait(TrainerJobConfig("deaf"))
    start = time.monotonic()
    manager.delete(job.job_id)
    # It was given its time to leave by itself, jobs_process.STOP_GRACE_S.
    assert time.monotonic() - start >= STOP_GRACE_S


@pytest.mark.parametrize(
    ("config", "exception", "text"),
    [
        (TrainerJobConfig(""), InvalidArgumentError, "base_model is empty"),
        (TrainerJobConfig("m", max_context_length=1), InvalidArgumentError, "max_context_length is 1"),
        (TrainerJobConfig("m", display_name="x" * 101), InvalidArgumentError, "display_name has 101 characters"),
        (TrainerJobConfig("m", display_name="a\nb"), InvalidArgumentError, "display_name"),
    ],
)
def test_config_that_cannot_be_is_refused_by_name(
    manager: TrainerJobManager, config: TrainerJobConfig, exception: type[GradwireError], text: str
):
    with pytest.raises(exception, match=text):
        manager.create_and_wait(config)
    assert manager.list() == []


def test_gradient_accumulation_steps_warns_that_the_loop_does_it(manager: TrainerJobManager):
    with pytest.warns(UserWarning, match="gradient_accumulation_steps=4 has no effect"):
        manager.create(TrainerJobConfig("loading", gradient_accumulation_steps=4))


def test_wrong_key_is_refused(base_url: str):
    with TrainerJobManager("wrong", base_url=base_url) as manager, pytest.raises(UnauthenticatedError):
        manager.list()


def test_health_needs_no_key(base_url: str):
    with grpc.insecure_channel(base_url.removeprefix("http://")) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        for service in ("", "gradwire.v1.TrainerJobService"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=DEADLINE_S)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_healthcheck_script_tells_by_its_exit_code(base_url: str):
    script = str(Path(__file__).parents[2] / "scripts" / "healthcheck.py")
    address = base_url.removeprefix("http://")
    for service, code in (("gradwire.v1.TrainerJobService", 0), ("gradwire.v1.TrainerService", 1)):
        done = subprocess.run(
            [sys.executable, script, "--address", address, "--service", service],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
    assert "NOT_FOUND" in done.stderr


def test_trainer_is_no_control_plane(manager: TrainerJobManager):
    job = manager.create_and_wait(TrainerJobConfig("quick"))
    with (
        TrainerJobManager(API_KEY, base_url=job.base_url) as wrong,
        pytest.raises(UnimplementedError, match="does not offer this call"),
    ):
        wrong.list()


def test_progress_lines_tell_each_change_once(manager: TrainerJobManager, capsys: pytest.CaptureFixture[str]):
    manager.create_and_wait(TrainerJobConfig("quick", display_name="told"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Starting a trainer for quick: starting the control plane"
    assert " is ready (" in lines[-1]
    assert len(lines) == len(set(lines))


def test_quiet_manager_prints_nothing(base_url: str, capsys: pytest.CaptureFixture[str]):
    with TrainerJobManager(API_KEY, base_url=base_url, quiet=True) as manager:
        manager.delete(manager.create_and_wait(TrainerJobConfig("quick")).job_id)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("how", ["sigterm", "sigkill", "stdin"])
def test_trainers_end_with_the_control_plane(tmp_path: Path, how: str):
    with running_jobs(tmp_path) as (process, base_url):
        with TrainerJobManager(API_KEY, base_url=base_url) as manager:
            manager.create_and_wait(TrainerJobConfig("quick"))
            manager.create(TrainerJobConfig("loading"))
        below = descendants(process.pid)
        assert len(below) == 2
        if how == "stdin":
            assert process.stdin is not None
            process.stdin.close()
        else:
            process.send_signal(signal.SIGKILL if how == "sigkill" else signal.SIGTERM)
        assert process.wait(DEADLINE_S) == (-signal.SIGKILL if how == "sigkill" else 0)
        assert wait_gone(below) == []


def test_frames_no_client_would_send_are_answered_with_a_status(manager: TrainerJobManager, base_url: str):
    job = manager.create_and_wait(TrainerJobConfig("quick"))
    seen = send_frames(base_url.removeprefix("http://"), Frames(1, job.job_id), 80, files=JOBS, api_key=API_KEY)
    assert {"OK", "INVALID_ARGUMENT", "NOT_FOUND"} <= set(seen)
    assert manager.get(manager.create_and_wait(TrainerJobConfig("quick")).job_id).state == "ready"
