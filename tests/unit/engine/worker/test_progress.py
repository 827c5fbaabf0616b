"""A worker that loads tells of progress while there is any, and only then."""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gradwire.v1.worker_service_pb2 import WorkerEvent

from trainer_service.config import EngineSettings, Limits
from trainer_service.engine import __main__ as worker
from trainer_service.engine import engine
from trainer_service.engine.ranks import Ranks
from trainer_service.engine.worker import progress

ENOUGH = 3


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LOOK_S", 0.2)


def computes(folder: Path) -> None:
    stop_s = time.process_time() + 0.5
    while time.process_time() < stop_s:
        pass


def reads(folder: Path) -> None:
    with (folder / "f").open("w+b") as file:
        os.truncate(file.fileno(), 2 << 20)
        file.read()
    time.sleep(0.1)


def writes(folder: Path) -> None:
    (folder / "f").write_bytes(bytes(2 << 20))
    time.sleep(0.1)


@pytest.mark.parametrize("work", [computes, reads, writes])
def test_work_of_every_kind_is_told(tmp_path: Path, work: Callable[[Path], None]):
    told = list[None]()
    with progress.told_of_progress(lambda: told.append(None)):
        stop_s = time.monotonic() + 20
        while len(told) < ENOUGH and time.monotonic() < stop_s:
            work(tmp_path)
    count = len(told)
    assert count >= ENOUGH
    work(tmp_path)
    assert len(told) == count


def test_waiting_is_not_told_nor_the_little_that_adds_up():
    told = list[None]()
    with progress.told_of_progress(lambda: told.append(None)):
        stop_s = time.monotonic() + 3
        while time.monotonic() < stop_s:
            busy_s = time.process_time() + 0.002
            while time.process_time() < busy_s:
                pass
            time.sleep(0.05)
    assert told == []


def test_a_worker_says_what_it_begins_and_of_a_long_load_that_it_gets_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    said = list[str]()

    class Trainer:
        def send(self, event: WorkerEvent) -> None:
            said.append(event.loading)

    def load(*_: Any, **__: Any) -> str:
        while len(said) < 5:
            computes(tmp_path)
        return "engine"

    monkeypatch.setattr(engine, "Engine", load)
    parser = argparse.ArgumentParser()
    EngineSettings.add_arguments(parser)
    arguments = parser.parse_args([])
    vars(arguments).update(base_model="m", checkpoint_dir=tmp_path, loss_module="", max_context_length=0)
    trainer: Any = Trainer()
    assert worker._load(arguments, Ranks.from_environment(), Limits(), trainer) == "engine"
    assert said[:2] == ["importing torch and transformers", "looking for a device"]
    assert said[2].startswith("loading m onto ")
    assert said[3:] == [said[2]] * (len(said) - 3)
