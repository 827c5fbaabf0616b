"""More runs than the worker holds: who comes back first, who waits, who makes room."""

import asyncio
from pathlib import Path

import pytest
from gradwire.errors import error, from_status
from gradwire.v1.trainer_service_pb2 import CreateRunRequest, TrainResponse

from tests.fakes import FakeWorker
from tests.runs import step, trainer
from tests.waiting import DEADLINE_S, until
from trainer_service.config import Durability, Limits
from trainer_service.runs import capacity, placement
from trainer_service.runs.run import Run
from trainer_service.runs.snapshots import Snapshot


@pytest.fixture(autouse=True)
def turns_come_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "_TURN_S", 0.02)
    monkeypatch.setattr(capacity, "_PAUSE_S", 0.02)


def begin(run: Run, *seq_ids: int) -> "list[asyncio.Task[TrainResponse]]":
    """Sends steps; their answers."""
    return [asyncio.create_task(run.execute(step(seq_id))) for seq_id in seq_ids]


async def steps(answers: "list[asyncio.Task[TrainResponse]]") -> list[int]:
    """Steps answered."""
    async with asyncio.timeout(DEADLINE_S):
        return [(await answer).optim_step.step for answer in answers]


async def unloaded(run: Run) -> None:
    await until(lambda: not run.placement.live)


async def test_after_a_death_the_runs_that_were_there_come_back_and_one_that_was_not_is_refused(tmp_path: Path):
    worker = FakeWorker()
    async with trainer(tmp_path, worker, limits=Limits(max_runs=2)) as runs:
        left = await runs.create(CreateRunRequest())
        # By hand: a lease this short might end for the others too before they are attached.
        assert await left.placement.unload()
        present = [await runs.create(CreateRunRequest()) for _ in range(2)]
        for run in (left, *present):
            run.attach("client")  # There is no room for the first.
        worker.gate.clear()
        answers = [begin(run, 1, 2) for run in present]
        await asyncio.wait_for(worker.has_waiting(4), DEADLINE_S)
        worker.die()
        worker.gate.set()
        worker.become_ready()
        assert [await steps(each) for each in answers] == [[1, 2], [1, 2]]
        refused = from_status((await left.execute(step(1))).error)
        assert refused.reason == "LIMIT_EXCEEDED"


async def test_what_an_earlier_trainer_took_in_waits_until_a_run_that_pauses_makes_room(tmp_path: Path):
    first = FakeWorker()
    async with trainer(tmp_path, first) as runs:
        made = [await runs.create(CreateRunRequest()) for _ in range(3)]
        first.gate.clear()
        for run in made:
            run.submit(step(1), lambda _: None)
        await asyncio.wait_for(first.has_waiting(3), DEADLINE_S)
    second = FakeWorker(ready=None)
    async with trainer(tmp_path, second, limits=Limits(max_runs=1)) as runs:
        again = [runs.get(run.run_id) for run in made]
        for run in again:
            run.attach("client")
        second.become_ready()
        answers = [begin(run, 1, 2) for run in again]
        assert [await steps(each) for each in answers] == [[1, 2]] * 3
        assert len(second.steps) == 1
        # The others lost their place to one another, so their operations wait as well.
        assert [await steps(begin(run, 3)) for run in again] == [[3]] * 3


async def test_what_waits_for_room_goes_on_once_a_run_is_deleted(tmp_path: Path):
    worker = FakeWorker()
    async with trainer(tmp_path, worker) as runs:
        made = [await runs.create(CreateRunRequest()) for _ in range(2)]
        run_ids = [run.run_id for run in made]
    worker = FakeWorker()
    async with trainer(tmp_path, worker, limits=Limits(max_runs=1)) as runs:
        busy, waiting = [runs.get(run_id) for run_id in run_ids]
        await busy.execute(step(1))
        worker.gate.clear()
        [under_way] = begin(busy, 2)
        answers = begin(waiting, 1)
        await until(lambda: waiting.placement.waits_for_room)
        assert not waiting.placement.on_worker
        deleting = asyncio.create_task(runs.delete(busy.run_id))
        await asyncio.sleep(0.05)
        worker.gate.set()
        assert await steps(answers) == [1]
        await deleting
        await under_way


async def test_a_run_that_cannot_be_unloaded_does_not_keep_the_others_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    worker = FakeWorker()
    async with trainer(tmp_path, worker, durability=Durability(idle_lease_s=0.05)) as runs:
        # All are faulty until both are there: a lease this short may end before that.
        sound = set[Path]()

        def list_snapshots(folder: Path) -> list[Snapshot]:
            if folder not in sound:
                raise PermissionError(13, "Permission denied")
            return real(folder)

        real = placement.list_snapshots
        monkeypatch.setattr(placement, "list_snapshots", list_snapshots)
        faulty, other = [await runs.create(CreateRunRequest()) for _ in range(2)]
        sound.add(other.folder)
        await unloaded(other)
        assert faulty.placement.live
        assert "Unloading a run failed." in caplog.text
        monkeypatch.undo()
        await unloaded(faulty)


NO_MEMORY = error("DEVICE_OUT_OF_MEMORY", "The GPU has no memory left for a run's parameters.")


async def test_a_run_that_comes_back_for_a_call_while_there_is_no_memory_fails_that_call_and_not_the_next(
    tmp_path: Path,
):
    worker = FakeWorker()
    async with trainer(tmp_path, worker, durability=Durability(idle_lease_s=0.05)) as runs:
        run = await runs.create(CreateRunRequest())
        await run.execute(step(1))
        await unloaded(run)
        for failures in ([NO_MEMORY], [error("LIMIT_EXCEEDED", "This trainer holds 8 runs, as many as it may.")]):
            reason = failures[0].reason
            worker.command_failures["create_run"] = failures
            refused = from_status((await run.execute(step(run.next_seq_id))).error)
            assert (refused.reason, run.lost) == (reason, False)
        assert (await run.execute(step(4))).optim_step.step == 2


@pytest.mark.parametrize("while_replaying", [False, True])
async def test_what_was_taken_in_waits_while_there_is_no_memory_for_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, while_replaying: bool
):
    monkeypatch.setattr(placement, "_MEMORY_RETRY_S", 0.1)
    worker = FakeWorker()
    async with trainer(tmp_path, worker) as runs:
        run = await runs.create(CreateRunRequest())
        await run.execute(step(1))
        worker.gate.clear()
        answers = begin(run, 2, 3)
        await asyncio.wait_for(worker.has_waiting(2), DEADLINE_S)
        if while_replaying:
            worker.failures[run.run_id, 1] = NO_MEMORY
        else:
            worker.command_failures["create_run"] = [NO_MEMORY] * 2
        worker.die()
        worker.gate.set()
        worker.become_ready()
        await until(lambda: not run.placement.on_worker)
        assert not run.lost
        worker.failures.clear()
        assert await steps(answers) == [2, 3]
