"""Runs over a fake worker, without gRPC."""

import asyncio
import tempfile
from pathlib import Path
from typing import Any

import pytest
from gradwire.errors import (
    FailedPreconditionError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
    error,
)
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.trainer_service_pb2 import CreateRunRequest, TrainRequest, TrainResponse

from tests.fakes import FakeWorker
from tests.waiting import DEADLINE_S, until
from trainer_service.checkpoints.catalog import Catalog
from trainer_service.checkpoints.transfers import Transfers
from trainer_service.config import Limits
from trainer_service.runs.observer import Observer
from trainer_service.runs.operation import Operation
from trainer_service.runs.registry import Runs
from trainer_service.runs.run import Run
from trainer_service.served_model import ServedModel


@pytest.fixture(autouse=True)
def folders_go_with_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def make_runs(worker: FakeWorker, **settings: Any) -> Runs:
    settings = {"base_model": "fake", "limits": Limits(), "detach_grace_s": 60.0, **settings}
    settings["base_model"] = ServedModel(settings["base_model"])
    runs_dir = settings.pop("runs_dir", None) or Path(tempfile.mkdtemp(prefix="gradwire-test-"))
    runs = Runs(
        worker,
        observer=Observer(),
        runs_dir=runs_dir,
        adapter_dir=runs_dir.parent / "adapters",
        transfers=Transfers(Catalog(runs_dir.parent / "checkpoints")),
        **settings,
    )
    runs.start()
    return runs


def step(seq_id: int) -> Operation:
    return Operation.made(TrainRequest(seq_id=seq_id, optim_step=ops.OptimStepRequest()))


def zero_grad(seq_id: int) -> Operation:
    return Operation.made(TrainRequest(seq_id=seq_id, zero_grad=ops.ZeroGradRequest()))


async def test_an_operation_is_answered_by_its_number_with_its_times():
    worker = FakeWorker(latency_s=0.02)
    run = await make_runs(worker).create(CreateRunRequest())
    response = await run.execute(step(1))
    assert (response.seq_id, response.optim_step.step) == (1, 1)
    assert response.execute_ms == pytest.approx(20)
    assert response.transfer_ms > 0
    assert run.describe().step == 1


async def test_operations_go_ahead_to_the_worker_so_that_the_device_never_waits():
    worker = FakeWorker()
    run = await make_runs(worker).create(CreateRunRequest())
    worker.gate.clear()
    for seq_id in (1, 2, 3):
        run.submit(zero_grad(seq_id), lambda _: None)
    await asyncio.wait_for(worker.has_waiting(3), DEADLINE_S)


async def test_a_repeat_while_the_first_executes_executes_once():
    worker = FakeWorker(latency_s=0.01)
    run = await make_runs(worker).create(CreateRunRequest())
    first, again = await asyncio.gather(run.execute(step(1)), run.execute(step(1)))
    assert first == again
    assert [kind for _, _, kind in worker.executed] == ["create_run", "optim_step"]


async def test_an_operation_cannot_acknowledge_itself():
    run = await make_runs(FakeWorker()).create(CreateRunRequest())
    request = TrainRequest(seq_id=1, acked_seq_id=1, optim_step=ops.OptimStepRequest())
    first = await run.execute(Operation.made(request))
    assert await run.execute(Operation.made(request)) == first


async def test_an_operation_goes_on_when_its_caller_stops_waiting():
    worker = FakeWorker(latency_s=0.02)
    run = await make_runs(worker).create(CreateRunRequest())
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(run.execute(step(1)), 0.001)
    assert (await run.execute(step(1))).optim_step.step == 1


async def test_the_same_request_id_gets_the_same_run():
    worker = FakeWorker(latency_s=0.01)
    runs = make_runs(worker)
    both = await asyncio.gather(*(runs.create(CreateRunRequest(request_id="a")) for _ in range(2)))
    third = await runs.create(CreateRunRequest(request_id="a"))
    other = await runs.create(CreateRunRequest(request_id="b"))
    assert both[0] is both[1] is third
    assert other is not third
    assert len(runs) == 2


async def test_a_create_that_failed_may_be_tried_again_under_its_request_id():
    worker = FakeWorker(ready=None, status_message="loading")
    runs = make_runs(worker)
    with pytest.raises(UnavailableError, match="loading") as caught:
        await runs.create(CreateRunRequest(request_id="a"))
    assert caught.value.reason == "WORKER_NOT_READY"
    assert caught.value.retry_after_s
    assert len(runs) == 0
    worker.become_ready()
    await runs.create(CreateRunRequest(request_id="a"))


async def test_a_create_given_up_by_its_caller_leaves_no_run_behind(tmp_path: Path):
    worker = FakeWorker(latency_s=0.02)
    runs_dir = tmp_path / "runs"
    runs = make_runs(worker, runs_dir=runs_dir)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(runs.create(CreateRunRequest()), 0.001)
    await until(lambda: [kind for _, _, kind in worker.executed] == ["create_run", "delete_run"])
    await runs.stop()
    assert list(runs_dir.iterdir()) == []


async def test_another_base_model_is_refused_naming_both():
    runs = make_runs(FakeWorker())
    with pytest.raises(FailedPreconditionError, match="'other'.*'fake'") as caught:
        await runs.create(CreateRunRequest(base_model="other"))
    assert caught.value.reason == "BASE_MODEL_MISMATCH"
    assert caught.value.metadata == {"requested": "other", "served": "fake"}


async def test_a_folder_is_the_same_model_however_it_is_spelt(tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    runs = make_runs(FakeWorker(), base_model=str(tmp_path / "model"))
    await runs.create(CreateRunRequest(base_model=f"{tmp_path}/link/../model/"))
    await runs.create(CreateRunRequest(base_model=str(tmp_path / "link")))


async def test_the_worker_says_the_lora_rank():
    run = await make_runs(FakeWorker()).create(CreateRunRequest(lora_rank=8))
    assert run.describe().lora_rank == 8


async def test_no_more_runs_than_the_limit_even_when_asked_at_once():
    worker = FakeWorker(latency_s=0.01)
    runs = make_runs(worker, limits=Limits(max_runs=2))
    results = await asyncio.gather(*(runs.create(CreateRunRequest()) for _ in range(3)), return_exceptions=True)
    made = [result for result in results if isinstance(result, Run)]
    refused = [result for result in results if isinstance(result, ResourceExhaustedError)]
    assert (len(made), len(refused)) == (2, 1)
    assert refused[0].metadata["limit"] == "2"
    await runs.delete(made[0].run_id)
    await runs.create(CreateRunRequest())


async def test_a_deleted_run_is_forgotten():
    worker = FakeWorker()
    runs = make_runs(worker)
    run = await runs.create(CreateRunRequest(request_id="a"))
    await runs.delete(run.run_id)
    assert worker.executed[-1] == (run.run_id, 0, "delete_run")
    with pytest.raises(NotFoundError, match=run.run_id):
        runs.get(run.run_id)
    assert await runs.create(CreateRunRequest(request_id="a")) is not run


async def test_graphs_go_when_the_client_stays_away_and_stay_when_it_comes_back():
    worker = FakeWorker()
    run = await make_runs(worker, detach_grace_s=0.05).create(CreateRunRequest())
    run.detach(run.attach("client"))
    again = run.attach("client")
    await asyncio.sleep(0.1)
    assert [kind for _, _, kind in worker.executed] == ["create_run"]
    run.detach(again)
    await until(lambda: [kind for _, _, kind in worker.executed] == ["create_run", "drop_graphs"])


async def test_a_newer_attach_takes_the_run_from_the_older():
    run = await make_runs(FakeWorker()).create(CreateRunRequest())
    older = run.attach("a")
    newer = run.attach("b")
    assert (await older.taken).reason == "ATTACH_SUPERSEDED"
    assert not newer.taken.done()
    # The older one's end does not free what the newer holds.
    run.detach(older)
    assert run.attachment is newer


async def test_the_failure_of_one_operation_is_an_answer_and_the_next_goes_on():
    worker = FakeWorker()
    run = await make_runs(worker).create(CreateRunRequest())
    worker.failures[run.run_id, 1] = error("NO_GRADIENTS", "Nothing was accumulated.")
    answers: list[TrainResponse] = [await run.execute(step(1)), await run.execute(zero_grad(2))]
    assert [response.WhichOneof("result") for response in answers] == ["error", "zero_grad"]


async def test_quiet_comes_once_everything_is_answered():
    worker = FakeWorker(latency_s=0.01)
    runs = make_runs(worker)
    run = await runs.create(CreateRunRequest())
    got: list[bytes] = []
    for seq_id in (1, 2, 3):
        run.submit(zero_grad(seq_id), got.append)
    assert runs.unanswered == 3
    await runs.quiet()
    assert len(got) == 3
