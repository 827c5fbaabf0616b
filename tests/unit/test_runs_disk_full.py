"""A journal whose disk is full: new operations are refused, nothing is damaged, and it goes on when there is room."""

import contextlib
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from gradwire.errors import GradwireError, from_status
from gradwire.v1.trainer_service_pb2 import CreateRunRequest

from tests.fakes import FakeWorker
from tests.unit.test_runs_recovery import forward_backward, operations, settled, step, trainer


@contextlib.contextmanager
def nothing_can_be_written() -> Iterator[None]:
    """Every write of this process to a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def test_operations_are_refused_while_the_disk_is_full_and_taken_when_there_is_room(tmp_path: Path):
    worker = FakeWorker()
    async with trainer(tmp_path, worker) as runs:
        run = await runs.create(CreateRunRequest())
        await run.execute(step(1))
        with nothing_can_be_written():
            refused = [from_status((await run.execute(one)).error) for one in (forward_backward(2), step(3))]
            assert [exc.reason for exc in refused] == ["STORAGE_FAILED"] * 2
            assert "Operation 2 was refused and had no effect" in refused[0].message
            assert "Make room on the disk" in refused[0].message
            # What was told before can still be asked.
            assert (await run.execute(step(1))).optim_step.step == 1
        await settled(run)
        # The pass that was refused is missing from the gradients, so the worker marks them.
        assert operations(worker)[2:] == [(2, "fail_operation"), (3, "fail_operation")]
        assert (await run.execute(step(4))).optim_step.step == 2
        await settled(run)
    second = FakeWorker()
    async with trainer(tmp_path, second) as runs:
        run = runs.get(run.run_id)
        assert run.next_seq_id == 5
        assert from_status((await run.execute(forward_backward(2))).error).message == refused[0].message
        assert (await run.execute(step(5))).optim_step.step == 3
        assert operations(second) == [
            (0, "create_run"),
            (1, "optim_step"),
            (2, "fail_operation"),
            (3, "fail_operation"),
            (4, "optim_step"),
            (5, "optim_step"),
        ]


async def test_what_was_executing_when_the_disk_got_full_is_answered(tmp_path: Path):
    worker = FakeWorker()
    async with trainer(tmp_path, worker) as runs:
        run = await runs.create(CreateRunRequest())
        worker.gate.clear()
        answers: list[bytes] = []
        run.submit(step(1), answers.append)
        await worker.has_waiting(1)
        with nothing_can_be_written():
            worker.gate.set()
            await run.quiet()
            assert len(answers) == 1
        assert (await run.execute(step(2))).optim_step.step == 2
    async with trainer(tmp_path, FakeWorker()) as runs:
        assert runs.get(run.run_id).next_seq_id == 3
        assert runs.unanswered == 0


async def test_a_run_that_cannot_be_written_down_is_not_made(tmp_path: Path):
    async with trainer(tmp_path / "runs", FakeWorker()) as runs:
        with nothing_can_be_written(), pytest.raises(GradwireError, match="Make room") as caught:
            await runs.create(CreateRunRequest())
        assert caught.value.reason == "STORAGE_FAILED"
        assert list((tmp_path / "runs").iterdir()) == []
        await runs.create(CreateRunRequest())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], check=False)
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(shutil.which("mount") is None or os.geteuid() != 0, reason="only root may mount a small disk")
async def test_refusals_are_on_a_full_disk_before_anything_else_is(small_disk: Path):
    """So that a trainer killed while its disk is full leaves no gap."""
    async with trainer(small_disk, FakeWorker()) as runs:
        run = await runs.create(CreateRunRequest())
        await run.execute(step(1))
        filler = small_disk / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        refused = [from_status((await run.execute(forward_backward(seq_id))).error).reason for seq_id in range(2, 30)]
        assert "STORAGE_FAILED" in refused
        refused_at = [seq_id for seq_id, reason in enumerate(refused, start=2) if reason]
        last = run.next_seq_id - 1
        await run.settled()
        # As after kill -9: the files as they are now, in another place.
        shutil.copytree(small_disk, small_disk.parent / "copy", ignore=lambda *_: ["filler"])
        filler.unlink()
        assert (await run.execute(step(last + 1))).optim_step.step == 2
    async with trainer(small_disk.parent / "copy", FakeWorker()) as runs:
        run = runs.get(run.run_id)
        assert run.next_seq_id == last + 1
        again = from_status((await run.execute(forward_backward(refused_at[0]))).error)
        assert again.reason == "STORAGE_FAILED"
