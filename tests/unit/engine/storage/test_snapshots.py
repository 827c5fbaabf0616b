"""Snapshots of a run on the worker: a run restored from one goes on as if it had never stopped."""

import threading
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from gradwire.errors import GradwireError
from gradwire.types import AdamParams
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.trainer_service_pb2 import CreateRunRequest, TrainRequest
from gradwire.v1.worker_service_pb2 import (
    WorkerCommand,
    WorkerCreateRun,
    WorkerEvent,
    WorkerFailOperation,
    WorkerSnapshotRun,
)

from tests.engines import BATCH, RUN, forward_backward, make_batch, make_engine
from trainer_service import atomic_folders
from trainer_service.config import SnapshotPolicy
from trainer_service.engine.engine import Engine
from trainer_service.engine.storage.state_files import State
from trainer_service.engine.worker.commands import Commands
from trainer_service.runs.snapshots import SnapshotClock

DiskUsage = namedtuple("DiskUsage", "total used free")
ADAM = AdamParams(learning_rate=1e-2)


class Driver:
    """Commands to one engine, and the answers that come later."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._later: list[WorkerEvent] = []
        self._came = threading.Event()
        self._commands = Commands(engine, self._send)

    def _send(self, event: WorkerEvent) -> None:
        self._later.append(event)
        self._came.set()

    def command(self, **command: object) -> WorkerEvent:
        """One command and its answer, whenever it comes."""
        sent = WorkerCommand(command_id=1, run_id=RUN, **command)  # pyright: ignore[reportArgumentType]
        answer = self._commands.execute(self._commands.prepare(sent))
        if answer is None:
            assert self._came.wait(20)
            answer = self._later.pop()
            self._came.clear()
        return answer

    def snapshot(self, folder: Path) -> WorkerEvent:
        """Takes a snapshot."""
        return self.command(snapshot_run=WorkerSnapshotRun(folder=str(folder)))

    def create(self, folder: Path) -> WorkerEvent:
        """Creates the run from a snapshot."""
        request = WorkerCreateRun(request=CreateRunRequest(), snapshot_folder=str(folder))
        return self.command(create_run=request)


@pytest.fixture
def driver(tiny_llama: Path, tmp_path: Path) -> Driver:
    return Driver(make_engine(tiny_llama, tmp_path / "checkpoints"))


def step(engine: Engine, seq_id: int) -> None:
    engine.optim_step(RUN, seq_id, ADAM)


def logprobs(engine: Engine) -> np.ndarray:
    return engine.forward(RUN, 99, engine.stage(BATCH)).logprobs_TK


def test_a_run_restored_in_the_middle_of_an_accumulation_goes_on_bit_for_bit(driver: Driver, tmp_path: Path):
    engine = driver.engine
    forward_backward(engine, 1)
    step(engine, 2)
    forward_backward(engine, 3)
    assert not driver.snapshot(tmp_path / "snapshot").done.HasField("error")

    def go_on() -> None:
        forward_backward(engine, 4, make_batch(7, 2, seed=1))
        engine.optim_step(RUN, 5, ADAM, "num_loss_tokens")

    go_on()
    undisturbed = logprobs(engine)
    engine.delete_run(RUN)
    assert not driver.create(tmp_path / "snapshot").done.HasField("error")
    assert engine.run_state(RUN).step == 1
    go_on()
    np.testing.assert_array_equal(logprobs(engine), undisturbed)


def test_a_run_with_an_adapter_is_restored_too(driver: Driver, tmp_path: Path):
    engine = driver.engine
    engine.delete_run(RUN)
    request = CreateRunRequest(lora_rank=4, seed=3)
    made = WorkerCreateRun(request=request)
    assert not driver.command(create_run=made).done.HasField("error")
    forward_backward(engine, 1)
    step(engine, 2)
    driver.snapshot(tmp_path / "snapshot")
    forward_backward(engine, 3)
    step(engine, 4)
    undisturbed = logprobs(engine)
    engine.delete_run(RUN)
    made.snapshot_folder = str(tmp_path / "snapshot")
    assert not driver.command(create_run=made).done.HasField("error")
    forward_backward(engine, 3)
    step(engine, 4)
    np.testing.assert_array_equal(logprobs(engine), undisturbed)


def test_what_runs_behind_a_snapshot_is_not_in_it(driver: Driver, tmp_path: Path):
    before = logprobs(driver.engine)
    driver.snapshot(tmp_path / "snapshot")
    forward_backward(driver.engine, 1)
    step(driver.engine, 2)
    driver.engine.delete_run(RUN)
    driver.create(tmp_path / "snapshot")
    np.testing.assert_array_equal(logprobs(driver.engine), before)


def test_the_mark_of_a_failed_pass_is_part_of_a_snapshot(driver: Driver, tmp_path: Path):
    driver.engine.fail_pass(RUN, 7)
    driver.snapshot(tmp_path / "snapshot")
    driver.engine.delete_run(RUN)
    driver.create(tmp_path / "snapshot")
    with pytest.raises(GradwireError) as caught:
        step(driver.engine, 8)
    assert (caught.value.reason, caught.value.metadata["failed_seq_id"]) == ("PRIOR_OPERATION_FAILED", "7")


def test_a_damaged_snapshot_is_refused_and_leaves_no_run_behind(driver: Driver, tmp_path: Path):
    driver.snapshot(tmp_path / "snapshot")
    driver.engine.delete_run(RUN)
    file = tmp_path / "snapshot" / "parameters.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    assert "has different content than was written" in driver.create(tmp_path / "snapshot").done.error.message
    driver.engine.create_run(RUN)


def test_no_snapshot_is_taken_while_a_custom_loss_is_under_way(driver: Driver, tmp_path: Path):
    driver.engine.forward(RUN, 1, driver.engine.stage(BATCH), keep_graph=True)
    assert "1 custom losses are under way" in driver.snapshot(tmp_path / "snapshot").done.error.message
    assert not (tmp_path / "snapshot").exists()


def test_a_snapshot_that_cannot_be_written_is_told(driver: Driver, tmp_path: Path):
    (tmp_path / "file").write_text("")
    assert driver.snapshot(tmp_path / "file" / "snapshot").done.error.message


def test_what_a_failure_did_is_done_again_without_executing_anything(driver: Driver):
    engine = driver.engine
    forward_backward(engine, 1)
    driver.command(fail_operation=WorkerFailOperation(seq_id=2, kind="optim_step", reason="DEVICE_OUT_OF_MEMORY"))
    assert engine.run_state(RUN).accumulation.num_passes == 1
    driver.command(fail_operation=WorkerFailOperation(seq_id=2, kind="optim_step", reason="NON_FINITE"))
    assert engine.run_state(RUN).accumulation.num_passes == 0
    engine.forward(RUN, 3, engine.stage(BATCH), keep_graph=True)
    failed = WorkerFailOperation(seq_id=4, kind="backward", forward_seq_id=3)
    failed.reason = "INVALID_FIELD"
    driver.command(fail_operation=failed)
    assert list(engine.run_state(RUN).graphs) == [3]
    failed.reason = "DEVICE_OUT_OF_MEMORY"
    driver.command(fail_operation=failed)
    assert list(engine.run_state(RUN).graphs) == []
    assert engine.run_state(RUN).accumulation.failed_seq_id == 4
    answer = driver.command(request=TrainRequest(seq_id=5, optim_step=ops.OptimStepRequest()))
    assert "Operation 4 failed" in answer.response.error.message


def test_a_snapshot_the_disk_has_no_room_for_is_refused_before_anything_is_copied(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    copied: list[object] = []
    monkeypatch.setattr(State, "copied", copied.append)
    monkeypatch.setattr(
        atomic_folders.shutil, "disk_usage", lambda path: DiskUsage(total=1 << 30, used=1 << 30, free=0)
    )
    assert "MiB are needed, and 0 MiB are free" in driver.snapshot(tmp_path / "snapshot").done.error.message
    assert copied == []


def test_a_snapshot_that_failed_is_due_again_behind_the_next_step():
    clock = SnapshotClock(SnapshotPolicy(every_steps=7, interval_s=0))
    clock.taken()
    clock.failed()
    assert [clock.operation(kind) for kind in ("forward_backward", "optim_step")] == [False, True]
    clock.taken()
    assert [clock.operation("optim_step") for _ in range(7)] == [False] * 6 + [True]
