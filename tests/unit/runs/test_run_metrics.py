"""Curves of runs, read from their journals."""

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
from gradwire.errors import GradwireError, error, to_status
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.trainer_service_pb2 import CreateRunRequest, TrainRequest, TrainResponse

from tests.fakes import FakeWorker
from tests.runs import settled, trainer
from trainer_service.config import Durability, Retention, SnapshotPolicy
from trainer_service.runs import run_metrics
from trainer_service.runs.operation import Operation
from trainer_service.runs.run import Run
from trainer_service.runs.run_metrics import RunMetrics


class MeasuringWorker(FakeWorker):
    """Answers with the metrics it is told to."""

    def __init__(self, **metrics: dict[str, float]) -> None:
        super().__init__()
        self.metrics = metrics
        """By kind of operation."""

    def _execute(self, run_id: str, request: TrainRequest) -> TrainResponse:
        response = super()._execute(run_id, request)
        kind = response.WhichOneof("result") or ""
        if kind in self.metrics:
            getattr(response, kind).metrics.clear()
            getattr(response, kind).metrics.update(self.metrics[kind])
        response.queue_ms = 2.0
        return response


async def execute(run: Run, **operation: Any) -> TrainResponse:
    return await run.execute(Operation.made(TrainRequest(seq_id=run.next_seq_id, **operation)))


async def train(run: Run, *, passes: int = 1, steps: int = 1, **settings: Any) -> None:
    for _ in range(steps):
        for _ in range(passes):
            await execute(run, forward_backward=ops.ForwardBackwardRequest())
        await execute(run, optim_step=ops.OptimStepRequest(**settings))


def measuring() -> MeasuringWorker:
    return MeasuringWorker(
        forward_backward={"loss:sum": 6.0, "num_loss_tokens:sum": 3.0, "kl:mean": 0.5},
        optim_step={"grad_norm:mean": 2.0, "num_loss_tokens:sum": 3.0},
        backward={"num_loss_tokens:sum": 2.0},
    )


async def test_a_point_a_step_combines_what_its_operations_said(tmp_path: Path):
    async with trainer(tmp_path, measuring()) as runs:
        run = await runs.create(CreateRunRequest())
        await train(run, passes=2, learning_rate=0.25)
        await train(run)
        points = await RunMetrics().points(run)
    assert (points.seq_ids, points.steps) == ([3, 5], [1, 2])
    assert points.series["loss:sum"] == [12.0, 6.0]
    # Not counted again by the step.
    assert points.series["num_loss_tokens:sum"] == [6.0, 3.0]
    assert points.series["kl:mean"] == [0.5, 0.5]
    assert points.series["grad_norm:mean"] == [2.0, 2.0]
    # That of a step that says none is AdamParams' own.
    assert points.series["learning_rate"] == [0.25, 1e-4]
    assert points.series["queue_ms:sum"] == [6.0, 4.0]
    assert all(time_s > 1e9 for time_s in points.times_s)


async def test_what_a_custom_loss_returned_is_a_curve(tmp_path: Path):
    async with trainer(tmp_path, measuring()) as runs:
        run = await runs.create(CreateRunRequest())
        for reward in (1.0, 3.0):
            reported = {"loss:sum": 5.0, "reward": reward, "pairs:sum": 4.0}
            await execute(run, backward=ops.BackwardRequest(forward_seq_id=1, metrics=reported))
        await execute(run, optim_step=ops.OptimStepRequest())
        points = await RunMetrics().points(run)
    assert points.series["loss:sum"] == [10.0]
    assert points.series["pairs:sum"] == [8.0]
    # A name without a reduction is the mean of what it was.
    assert points.series["reward"] == [2.0]


async def test_what_was_cleared_or_failed_is_in_no_point(tmp_path: Path):
    worker = measuring()
    async with trainer(tmp_path, worker) as runs:
        run = await runs.create(CreateRunRequest())
        await execute(run, forward_backward=ops.ForwardBackwardRequest())
        await execute(run, zero_grad=ops.ZeroGradRequest())
        worker.failures[run.run_id, 3] = error("NON_FINITE", "no")
        await execute(run, forward_backward=ops.ForwardBackwardRequest())
        worker.failures[run.run_id, 5] = error("PRIOR_OPERATION_FAILED", "no")
        await train(run)
        await train(run)
        points = await RunMetrics().points(run)
    assert (points.seq_ids, points.series["loss:sum"]) == ([7], [6.0])


async def test_evaluation_is_beside_training(tmp_path: Path):
    worker = measuring()
    worker.metrics["forward"] = {"loss:sum": 9.0, "num_loss_tokens:sum": 4.0}
    async with trainer(tmp_path, worker) as runs:
        run = await runs.create(CreateRunRequest())
        await execute(run, forward=ops.ForwardRequest(loss_fn="cross_entropy"))
        await train(run)
        await train(run)
        points = await RunMetrics().points(run)
    assert points.series["loss:sum"] == [6.0, 6.0]
    assert points.series["forward/loss:sum"][0] == 9.0
    assert math.isnan(points.series["forward/loss:sum"][1])


async def test_the_next_trainer_has_the_whole_curve_and_follows_it(tmp_path: Path):
    async with trainer(tmp_path, measuring()) as runs:
        run = await runs.create(CreateRunRequest())
        await train(run, steps=3)
    async with trainer(tmp_path, worker := measuring()) as runs:
        worker.become_ready()
        run, metrics = runs.get(run.run_id), RunMetrics()
        assert (await metrics.points(run)).steps == [1, 2, 3]
        await train(run, steps=2)
        later = await metrics.points(run, names=["loss:sum", "no such"], after_seq_id=6)
        assert (later.steps, later.series, later.more) == ([4, 5], {"loss:sum": [6.0, 6.0]}, False)
        assert (await metrics.points(run, since_step=5)).steps == [5]


async def test_curves_stay_whole_where_the_journal_lets_operations_go(tmp_path: Path):
    durability = Durability(
        retention=Retention(keep_operations=4), snapshots=SnapshotPolicy(every_steps=2), idle_lease_s=0
    )
    async with trainer(tmp_path, measuring(), durability=durability) as runs:
        run = await runs.create(CreateRunRequest())
        for _ in range(12):
            await train(run)
            await settled(run)
        points = await RunMetrics().points(run)
        with run_metrics.contextlib.closing(run_metrics.journal.connect(run.folder)) as db:
            assert run_metrics.journal.seq_ids(db)[0] > 2
    assert points.steps == list(range(1, 13))
    assert points.series["loss:sum"] == [6.0] * 12
    assert points.series["learning_rate"] == [1e-4] * 12


async def test_an_operation_under_way_is_waited_for_by_no_curve(tmp_path: Path):
    worker = measuring()
    async with trainer(tmp_path, worker) as runs:
        run, metrics = await runs.create(CreateRunRequest()), RunMetrics()
        await train(run)
        worker.gate.clear()
        run.submit(
            Operation.made(TrainRequest(seq_id=3, forward_backward=ops.ForwardBackwardRequest())), lambda _: None
        )
        assert (await metrics.points(run)).steps == [1]
        worker.gate.set()
        await train(run)
        found = await metrics.points(run)
        assert (found.steps, found.series["loss:sum"]) == ([1, 2], [6.0, 12.0])


async def test_a_loss_that_makes_up_names_has_so_many_curves_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(run_metrics, "MAX_NAMES", 20)
    async with trainer(tmp_path, measuring()) as runs:
        run = await runs.create(CreateRunRequest())
        for n in range(30):
            await execute(run, backward=ops.BackwardRequest(forward_seq_id=1, metrics={f"m{n}": 1.0}))
            await execute(run, optim_step=ops.OptimStepRequest())
        points = await RunMetrics().points(run)
    assert (len(points.series), points.names_left_out > 0) == (20, True)
    assert {len(values) for values in points.series.values()} == {30}


async def test_a_long_curve_comes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_metrics, "MAX_VALUES", 20)
    async with trainer(tmp_path, measuring()) as runs:
        run, metrics = await runs.create(CreateRunRequest()), RunMetrics()
        await train(run, steps=7)
        first = await metrics.points(run, names=["loss:sum"])
        assert (first.steps, first.more) == ([1, 2, 3, 4, 5], True)
        rest = await metrics.points(run, names=["loss:sum"], after_seq_id=first.seq_ids[-1])
        assert (rest.steps, rest.more) == ([6, 7], False)


async def test_a_journal_that_is_gone_is_said(tmp_path: Path):
    async with trainer(tmp_path, measuring()) as runs:
        run = await runs.create(CreateRunRequest())
        run.folder.rename(tmp_path / "elsewhere")
        with pytest.raises(GradwireError, match="cannot be read") as caught:
            await RunMetrics().points(run)
        assert caught.value.reason == "STORAGE_FAILED"
        (tmp_path / "elsewhere").rename(run.folder)
        assert to_status(caught.value).message


async def test_many_who_ask_at_once_get_one_answer_and_one_who_leaves_disturbs_nobody(tmp_path: Path):
    async with trainer(tmp_path, measuring()) as runs:
        run, metrics = await runs.create(CreateRunRequest()), RunMetrics()
        await train(run, steps=5)
        asked = [asyncio.ensure_future(metrics.points(run)) for _ in range(20)]
        await asyncio.sleep(0)
        asked[0].cancel()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(answers[0], asyncio.CancelledError)
        assert {tuple(answer.steps) for answer in answers[1:] if isinstance(answer, run_metrics.Points)} == {
            (1, 2, 3, 4, 5)
        }
        assert sum(isinstance(answer, run_metrics.Points) for answer in answers) == 19
