"""What a machine that lost its power, or its kernel, may leave of a journal: the log cut off anywhere, or torn.

Without the machine: the files of a journal that is open are copied, and the end of the log is lost, as it is where the
kernel had not written it yet.
"""

import contextlib
import random
import shutil
from pathlib import Path

import pytest
from gradwire import ServiceClient, datum_from_tokens_weights
from gradwire.errors import GradwireError
from gradwire.v1.trainer_service_pb2 import CreateRunRequest

from tests.contents import rounds, rows
from tests.fakes import FakeWorker
from tests.front_end import front_end_on_a_thread
from tests.runs import forward_backward, settled, step, trainer
from trainer_service.config import Durability, Retention, SnapshotPolicy
from trainer_service.runs import journal_contents, snapshots
from trainer_service.runs.journal_contents import files

STEPS = 12
EACH_STEP = Durability(retention=Retention(keep_operations=2), snapshots=SnapshotPolicy(every_steps=1), idle_lease_s=0)
NEVER = Durability(snapshots=SnapshotPolicy(every_steps=0, interval_s=0), idle_lease_s=0)


async def left_behind(folder: Path) -> tuple[str, Path]:
    """(run id, its folder as it is on the disk after some steps, while the trainer still runs)."""
    async with trainer(folder / "runs", FakeWorker()) as runs:
        run = await runs.create(CreateRunRequest())
        for number in range(STEPS):
            await run.execute(forward_backward(2 * number + 1))
            await run.execute(step(2 * number + 2))
        await settled(run)
        shutil.copytree(run.folder, folder / "disk")
    return run.run_id, folder / "disk"


def after_power_loss(disk: Path, run_id: str, runs_dir: Path, cut: int, garbage: bytes) -> None:
    copy = runs_dir / run_id
    shutil.copytree(disk, copy)
    log = copy / "journal.sqlite-wal"
    log.write_bytes(log.read_bytes()[:cut] + garbage)
    # Memory that processes shared; a machine that starts has none of it.
    (copy / "journal.sqlite-shm").unlink()


@pytest.mark.parametrize("torn", [False, True], ids=["cut", "torn"])
async def test_a_log_that_lost_its_end_is_a_run_as_it_was_some_operations_earlier(tmp_path: Path, torn: bool):
    run_id, disk = await left_behind(tmp_path)
    size_bytes = (disk / "journal.sqlite-wal").stat().st_size
    rng = random.Random(0)
    cuts = [0, 31, size_bytes, *(rng.randrange(size_bytes) for _ in range(40))]
    came_back: set[int] = set()
    for number, cut in enumerate(sorted(cuts)):
        garbage = rng.randbytes(rng.randrange(1, 200_000)) if torn and cut < size_bytes else b""
        after_power_loss(disk, run_id, tmp_path / str(number), cut, garbage)
        worker = FakeWorker()
        async with trainer(tmp_path / str(number), worker) as runs:
            run = runs.get(run_id)
            worker.become_ready()
            last = run.next_seq_id - 1
            # An operation without its outcome is executed; whatever there is, is there from the first on.
            numbers = range(1, last + 3)
            answers = [await run.execute(forward_backward(n) if n % 2 else step(n)) for n in numbers]
            kinds = ["forward_backward" if n % 2 else "optim_step" for n in numbers]
            assert [answer.WhichOneof("result") for answer in answers] == kinds
            assert run.step == (last + 2) // 2
            assert [seq_id for _, seq_id, _ in worker.executed if seq_id] == list(numbers)
        came_back.add(last)
    assert {0, 2 * STEPS} <= came_back
    assert len(came_back) > 8


def test_a_client_whose_answers_went_with_the_power_is_told(tmp_path: Path):
    with contextlib.ExitStack() as clients:
        with front_end_on_a_thread(data_dir=tmp_path / "data") as first:
            client = clients.enter_context(ServiceClient(f"http://{first.address}")).create_training_client()
            data = [datum_from_tokens_weights([1, 2, 3, 4], [1.0] * 4)]
            for _ in range(STEPS):
                client.forward_backward(data)
                client.optim_step().result(60)
            shutil.copytree(tmp_path / "data" / "runs" / client.run_id, tmp_path / "disk")
        half = (tmp_path / "disk" / "journal.sqlite-wal").stat().st_size // 2
        after_power_loss(tmp_path / "disk", client.run_id, tmp_path / "left" / "runs", half, b"")
        with front_end_on_a_thread(data_dir=tmp_path / "left", listen=first.address):
            with pytest.raises(GradwireError, match="it lost part of the run") as told:
                client.optim_step().result(60)
            assert told.value.reason == "RUN_LOST"


async def test_a_snapshot_of_operations_that_were_lost_is_not_taken_for_one_of_those_that_follow(tmp_path: Path):
    async with trainer(tmp_path / "runs", FakeWorker(), durability=EACH_STEP) as runs:
        run = await runs.create(CreateRunRequest())
        await run.execute(step(1))
        await settled(run)
        await run._journal.flush()
        on_disk = (run.folder / "journal.sqlite-wal").stat().st_size
        await run.execute(step(2))
        await settled(run)
        shutil.copytree(run.folder, tmp_path / "disk")
    after_power_loss(tmp_path / "disk", run.run_id, tmp_path / "left", on_disk, b"")
    worker = FakeWorker()
    async with trainer(tmp_path / "left", worker, durability=NEVER) as runs:
        run = runs.get(run.run_id)
        assert run.next_seq_id == 2
        for seq_id in (2, 3):
            await run.execute(forward_backward(seq_id))
        worker.die()
        worker.become_ready()
        await run.execute(forward_backward(4))
        # The lost step 2 is in a snapshot after operation 2.
        assert worker.steps[run.run_id] == 1


async def test_what_was_pruned_before_the_log_was_on_the_disk_takes_nothing_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(journal_contents, "_FILE_BYTES", 1)
    async with trainer(tmp_path / "runs", FakeWorker(), durability=EACH_STEP) as runs:
        run = await runs.create(CreateRunRequest())
        await rounds(run, 3)
        shutil.copytree(run.folder, tmp_path / "disk")
    # The rows of the contents pruned last are back, their files are not.
    files(tmp_path / "disk")[0].unlink()
    monkeypatch.setattr(journal_contents, "boot_id", lambda: "another")
    (tmp_path / "left").mkdir()
    shutil.copytree(tmp_path / "disk", tmp_path / "left" / run.run_id)
    worker = FakeWorker()
    async with trainer(tmp_path / "left", worker, durability=EACH_STEP) as runs:
        run = runs.get(run.run_id)
        assert run.next_seq_id == 7
        await run.execute(step(7))
        assert worker.steps[run.run_id] == 4
        assert [row.seq_id for row in await rows(run)][-2:] == [6, 7]


async def test_nothing_is_pruned_before_the_journal_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(folder: Path) -> None:
        raise OSError("Input/output error")

    monkeypatch.setattr(snapshots, "wait_for_disk", fail)
    async with trainer(tmp_path / "runs", FakeWorker(), durability=EACH_STEP) as runs:
        run = await runs.create(CreateRunRequest())
        for seq_id in (1, 2, 3, 4):
            await run.execute(step(seq_id))
            await settled(run)
        assert [snapshot.seq_id for snapshot in snapshots.list_snapshots(run.folder)] == [4, 3, 2, 1]
        assert [row.seq_id for row in await rows(run)] == [1, 2, 3, 4]
