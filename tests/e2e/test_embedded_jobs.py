"""The embedded control plane: what a manager without a base_url starts, and how it ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from gradwire import ServiceClient, TrainerJobConfig, TrainerJobManager
from gradwire.errors import FailedPreconditionError, NotFoundError, UnauthenticatedError

from tests.listening import listening
from tests.trainer_process import descendants, wait_gone

API_KEY = "key-of-the-tests"


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GRADWIRE_HOME", str(tmp_path))
    # The key given counts, not one that happens to be in the environment.
    monkeypatch.setenv("GRADWIRE_API_KEY", "another")
    with TrainerJobManager(API_KEY) as manager:
        yield manager


@pytest.fixture
def started():
    """The processes below this one that were not there when the test began."""
    before = set(descendants(os.getpid()))
    return lambda: [pid for pid in descendants(os.getpid()) if pid not in before]


def test_embedded_jobs_train_and_go(
    manager: TrainerJobManager, started: Callable[[], list[int]], tiny_llama: Path, tmp_path: Path
):
    assert manager.list() == []
    job = manager.create_and_wait(TrainerJobConfig(str(tiny_llama), max_context_length=32))
    below = started()
    with ServiceClient(job.base_url, API_KEY) as service:
        (model,) = service.get_server_info().models
        assert model.max_context_length == 32
    # Control plane, trainer, worker: nothing else of the whole tree listens.
    assert len(below) == 3
    assert manager._connection is not None
    assert {f"http://{address}" for address in listening(below)} == {manager._connection.base_url, job.base_url}
    with ServiceClient(job.base_url, "another") as service, pytest.raises(UnauthenticatedError):
        service.get_server_info()
    assert (tmp_path / "jobs" / job.job_id / "trainer.log").exists()
    manager.delete(job.job_id)
    assert manager.list() == []
    manager.close()
    assert wait_gone(below, timeout_s=0) == []


def test_key_is_on_no_command_line(manager: TrainerJobManager, started: Callable[[], list[int]], tiny_llama: Path):
    manager.create(TrainerJobConfig(str(tiny_llama)))
    below = started()
    assert below
    for pid in below:
        assert API_KEY.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_asking_for_a_job_of_a_control_plane_never_started_starts_none(
    manager: TrainerJobManager, started: Callable[[], list[int]]
):
    with pytest.raises(NotFoundError, match="job-1"):
        manager.get("job-1")
    with pytest.raises(NotFoundError, match="job-1"):
        manager.delete("job-1")
    assert started() == []


def test_missing_server_is_told_with_the_way_to_install_it(manager: TrainerJobManager, monkeypatch: pytest.MonkeyPatch):
    import importlib.util

    def find_spec(name: str) -> object:
        return None if name in {"torch", "transformers"} else object()

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    with pytest.raises(FailedPreconditionError, match="torch, transformers cannot be imported") as caught:
        manager.create_and_wait(TrainerJobConfig("any"))
    assert "pip install 'gradwire[server]'" in str(caught.value)


def test_control_plane_that_cannot_start_says_why(manager: TrainerJobManager, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GRADWIRE_LOG_LEVEL", "NOISY")
    with pytest.raises(FailedPreconditionError, match="(?s)could not start.*NOISY"):
        manager.create_and_wait(TrainerJobConfig("any"))


def test_control_plane_that_was_killed_is_told(
    manager: TrainerJobManager, started: Callable[[], list[int]], tiny_llama: Path
):
    manager.create(TrainerJobConfig(str(tiny_llama)))
    below = started()
    (plane,) = [pid for pid in below if b"jobs" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")]
    os.kill(plane, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(FailedPreconditionError, match="control plane has ended"):
        manager.list()
    assert time.monotonic() - start < 15
    assert wait_gone(below) == []


FORKING = """
import os, time, gradwire
manager = gradwire.TrainerJobManager("k")
manager.create(gradwire.TrainerJobConfig("no-model"))
if os.fork() == 0:
    print("forked", os.getpid(), flush=True)
    time.sleep(60)
    os._exit(0)
time.sleep(60)
"""


def test_forked_child_does_not_keep_the_control_plane(tmp_path: Path):
    script = subprocess.Popen(
        [sys.executable, "-c", FORKING],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "GRADWIRE_HOME": str(tmp_path), "GRADWIRE_API_KEY": ""},
    )
    assert script.stdout is not None
    child = int(script.stdout.readline().split()[1])
    below = [pid for pid in descendants(script.pid) if pid != child]
    script.kill()
    script.wait()
    script.stdout.close()
    assert wait_gone(below) == []
    assert wait_gone([child], timeout_s=0) == [child]
    os.kill(child, signal.SIGKILL)


USING_A_FOLDER_WITH_TRAPS = """
import gradwire
with gradwire.TrainerJobManager("k") as manager:
    print(manager.create(gradwire.TrainerJobConfig("any")).state)
"""


def test_files_beside_the_script_do_not_stand_in_for_modules(tmp_path: Path):
    (tmp_path / "tokenize.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "trainer_service.py").write_text("raise RuntimeError('imported')")
    done = subprocess.run(
        [sys.executable, "-P", "-c", USING_A_FOLDER_WITH_TRAPS],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "GRADWIRE_HOME": str(tmp_path / "home")},
    )
    assert done.stdout == "starting\n", done.stderr
