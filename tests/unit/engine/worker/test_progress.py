"""A worker that loads tells of progress while there is any, and only then."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gradwire.v1.worker_service_pb2 import WorkerEvent

from trainer_service.engine import __main__ as worker
from trainer_service.engine import engine
from trainer_service.engine.rank_channels import Ranks
from trainer_service.engine.worker import progress
from trainer_service.worker_config import WorkerConfig

DEADLINE_S = 60


class Looks:
    """Has the watch look when a test says so, however little of a busy machine the test gets meanwhile."""

    def __init__(self) -> None:
        self._asked, self._waiting = threading.Semaphore(0), threading.Semaphore(0)

    def wait(self, over: threading.Event) -> bool:
        """Stands for the wait between two looks."""
        self._waiting.release()
        while not self._asked.acquire(timeout=0.01):
            if over.is_set():
                return False
        return True

    def look(self) -> None:
        """Returns once the watch has looked and told."""
        assert self._waiting.acquire(timeout=DEADLINE_S)
        self._asked.release()
        assert self._waiting.acquire(timeout=DEADLINE_S)
        self._waiting.release()


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    made = Looks()
    monkeypatch.setattr(progress, "_time_to_look", made.wait)
    return made


def computes(folder: Path) -> None:
    stop_s = time.process_time() + 0.2
    while time.process_time() < stop_s:
        pass


def reads(folder: Path) -> None:
    with (folder / "f").open("w+b") as file:
        os.truncate(file.fileno(), 2 << 20)
        file.read()


def writes(folder: Path) -> None:
    (folder / "f").write_bytes(bytes(2 << 20))


@pytest.mark.parametrize("work", [computes, reads, writes])
def test_work_of_every_kind_is_told(tmp_path: Path, work: Callable[[Path], None], looks: Looks):
    told = list[None]()
    with progress.told_of_progress(lambda: told.append(None)):
        # What it took to begin is not counted.
        looks.look()
        told.clear()
        for count in (1, 2, 3):
            work(tmp_path)
            looks.look()
            assert len(told) == count
    work(tmp_path)
    assert len(told) == 3


def test_waiting_is_not_told_nor_the_little_that_adds_up(looks: Looks):
    told = list[None]()
    with progress.told_of_progress(lambda: told.append(None)):
        looks.look()
        told.clear()
        for _ in range(15):
            busy_s = time.process_time() + 0.008
            while time.process_time() < busy_s:
                pass
            looks.look()
    assert told == []


def test_looks_come_by_themselves_until_it_is_over(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress, "_LOOK_S", 0.001)
    over = threading.Event()
    assert progress._time_to_look(over)
    over.set()
    assert not progress._time_to_look(over)


def test_a_worker_says_what_it_begins_and_of_a_long_load_that_it_gets_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looks: Looks
):
    said = list[str]()

    class Trainer:
        def send(self, event: WorkerEvent) -> None:
            said.append(event.loading)

    def load(*_: Any, **__: Any) -> str:
        while len(said) < 5:
            computes(tmp_path)
            looks.look()
        return "engine"

    monkeypatch.setattr(engine, "Engine", load)
    config = WorkerConfig(base_model="m", checkpoint_dir=tmp_path, max_runs=8)
    trainer: Any = Trainer()
    assert worker._load(str(tmp_path / "worker.sock"), config, Ranks.from_environment(), trainer.send) == "engine"
    assert said[:2] == ["importing torch and transformers", "looking for a device"]
    assert said[2].startswith("loading m onto ")
    assert said[3:] == [said[2]] * (len(said) - 3)
