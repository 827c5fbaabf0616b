"""What an operation leaves behind in a run: accumulation, taint, held graphs, exports."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gradwire._wire.codec import Batch
from gradwire.errors import (
    AlreadyExistsError,
    DeviceOutOfMemoryError,
    FailedPreconditionError,
    GradwireError,
    InvalidArgumentError,
    NoGradientsError,
    NotFoundError,
    PriorOperationFailedError,
    ResourceExhaustedError,
)
from gradwire.types import AdamParams

from tests.engines import BATCH, CROSS_ENTROPY, RUN, forward_backward, make_batch, make_engine
from trainer_service.config import Limits
from trainer_service.engine.engine import Engine, ForwardResult
from trainer_service.worker_config import EngineSettings

STEP = AdamParams(learning_rate=1e-2)


@pytest.fixture
def engine(tiny_llama: Path, tmp_path: Path) -> Engine:
    # Small packs, so that BATCH takes two forwards: 9 tokens, then 5 and 3.
    return make_engine(tiny_llama, tmp_path, settings=EngineSettings(max_pack_tokens=10))


def params(engine: Engine, run_id: str = RUN) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in engine.live_model(run_id).parameters()]


def grads(engine: Engine, run_id: str = RUN) -> list[torch.Tensor]:
    made = [parameter.grad for parameter in engine.live_model(run_id).parameters()]
    return [grad.clone() for grad in made if grad is not None]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def ones_like(found: ForwardResult) -> np.ndarray:
    return np.ones_like(found.logprobs_TK)


def test_steps_lower_the_loss(engine: Engine) -> None:
    losses = []
    for number in range(5):
        losses.append(forward_backward(engine, 2 * number + 1).metrics["loss:sum"])
        engine.optim_step(RUN, 2 * number + 2, STEP)
    assert losses == sorted(losses, reverse=True)


def test_metrics_count_what_was_done(engine: Engine) -> None:
    found = forward_backward(engine)
    assert found.metrics == pytest.approx(
        {
            "loss:sum": -float((BATCH.loss_fn_inputs["weights"] * found.logprobs_TK).sum()),
            "num_tokens:sum": 17,
            "num_sequences:sum": 3,
            "num_loss_tokens:sum": 17,
            "num_shared_tokens:sum": 0,
            "forward_passes:sum": 2,
        }
    )
    step = engine.optim_step(RUN, 2, STEP)
    assert step.step == 1
    assert step.metrics["num_loss_tokens:sum"] == 17
    assert step.metrics["grad_norm:mean"] > 0


def test_custom_loss_runs_exactly_as_many_forwards_as_a_built_in_one(engine: Engine) -> None:
    counters = engine.counters
    forward_backward(engine)
    built_in = counters.forward_passes_total, counters.backward_passes_total, counters.tokens_total
    found = engine.forward(RUN, 2, engine.stage(BATCH), keep_graph=True)
    engine.backward(RUN, 3, forward_seq_id=2, gradients_TK=ones_like(found))
    after = counters.forward_passes_total, counters.backward_passes_total, counters.tokens_total
    assert after == tuple(2 * count for count in built_in)


def test_custom_loss_equal_to_a_built_in_one_gives_the_same_bits(engine: Engine) -> None:
    built_in = forward_backward(engine)
    wanted = grads(engine)
    engine.zero_grad(RUN)
    found = engine.forward(RUN, 2, engine.stage(BATCH), keep_graph=True)
    engine.backward(RUN, 3, forward_seq_id=2, gradients_TK=-BATCH.loss_fn_inputs["weights"])
    assert same(grads(engine), wanted)
    np.testing.assert_array_equal(found.logprobs_TK, built_in.logprobs_TK)


def test_datum_that_a_custom_loss_ignores_contributes_nothing(engine: Engine) -> None:
    found = engine.forward(RUN, 1, engine.stage(BATCH), keep_graph=True)
    gradients = ones_like(found)
    gradients[5:14] = 0
    engine.backward(RUN, 2, forward_seq_id=1, gradients_TK=gradients)
    with_it = grads(engine)
    engine.zero_grad(RUN)
    for number, (start, stop) in enumerate(((0, 1), (2, 3)), 3):
        found = engine.forward(RUN, 2 * number, engine.stage(BATCH.sequences(start, stop)), keep_graph=True)
        engine.backward(RUN, 2 * number + 1, forward_seq_id=2 * number, gradients_TK=ones_like(found))
    for ours, wanted in zip(with_it, grads(engine), strict=True):
        torch.testing.assert_close(ours, wanted)


def test_forward_with_a_loss_says_its_value_and_leaves_no_gradients(engine: Engine) -> None:
    found = engine.forward(RUN, 1, engine.stage(BATCH, CROSS_ENTROPY))
    assert grads(engine) == []
    assert found.metrics == forward_backward(engine).metrics


def test_forward_alone_holds_nothing(engine: Engine) -> None:
    found = engine.forward(RUN, 1, engine.stage(BATCH))
    assert "loss:sum" not in found.metrics
    assert engine.counters.held_graphs == 0
    with pytest.raises(FailedPreconditionError, match="never was"):
        engine.backward(RUN, 2, forward_seq_id=1, gradients_TK=ones_like(found))


def test_two_runs_with_the_same_log_are_the_same_bit_for_bit(engine: Engine) -> None:
    engine.create_run("run-2")
    for run_id in (RUN, "run-2"):
        for number in range(3):
            forward_backward(engine, 4 * number, run_id=run_id)
            found = engine.forward(run_id, 4 * number + 1, engine.stage(BATCH), keep_graph=True)
            engine.backward(run_id, 4 * number + 2, forward_seq_id=4 * number + 1, gradients_TK=ones_like(found))
            engine.optim_step(run_id, 4 * number + 3, STEP)
    assert same(params(engine), params(engine, "run-2"))


def test_runs_are_independent(engine: Engine) -> None:
    engine.create_run("run-2")
    before = params(engine, "run-2")
    forward_backward(engine)
    engine.optim_step(RUN, 2, STEP)
    assert same(params(engine, "run-2"), before)
    assert grads(engine, "run-2") == []
    with pytest.raises(NoGradientsError):
        engine.optim_step("run-2", 1, STEP)
    engine.delete_run(RUN)
    forward_backward(engine, 1, run_id="run-2")


def test_deleted_run_is_unknown_and_a_new_one_starts_from_the_base_model(engine: Engine) -> None:
    before = params(engine)
    forward_backward(engine)
    engine.optim_step(RUN, 2, STEP)
    engine.delete_run(RUN)
    engine.delete_run(RUN)
    with pytest.raises(NotFoundError):
        forward_backward(engine)
    engine.create_run("run-2")
    assert same(params(engine, "run-2"), before)


def test_optim_step_without_gradients_is_refused(engine: Engine) -> None:
    with pytest.raises(NoGradientsError):
        engine.optim_step(RUN, 1, STEP)
    forward_backward(engine)
    engine.zero_grad(RUN)
    with pytest.raises(NoGradientsError):
        engine.optim_step(RUN, 2, STEP)
    forward_backward(engine)
    engine.optim_step(RUN, 4, STEP)
    with pytest.raises(NoGradientsError):
        engine.optim_step(RUN, 5, STEP)


def test_weights_of_zero_are_gradients_too(engine: Engine) -> None:
    inputs = {**BATCH.loss_fn_inputs, "weights": np.zeros(17, dtype=np.float32)}
    before = params(engine)
    forward_backward(engine, 1, Batch(BATCH.tokens_T, BATCH.cu_seqlens, inputs))
    assert engine.optim_step(RUN, 2, STEP, "num_loss_tokens").metrics["grad_norm:mean"] == 0
    assert same(params(engine), before)


Fail = Callable[[Engine, int], None]


def fail_before_the_engine(engine: Engine, seq_id: int) -> None:
    engine.fail_pass(RUN, seq_id)


def fail_without_a_graph(engine: Engine, seq_id: int) -> None:
    with pytest.raises(FailedPreconditionError):
        engine.backward(RUN, seq_id, forward_seq_id=999, gradients_TK=np.ones(3, dtype=np.float32))


def fail_with_an_infinite_loss(engine: Engine, seq_id: int) -> None:
    # Only the last sequence is bad, so that the pass breaks off with gradients of the others in place.
    weights = BATCH.loss_fn_inputs["weights"].copy()
    weights[-3:] = 3e38
    batch = Batch(BATCH.tokens_T, BATCH.cu_seqlens, {**BATCH.loss_fn_inputs, "weights": weights})
    with pytest.raises(FailedPreconditionError, match=r"cross_entropy of data\[2\] is inf") as caught:
        forward_backward(engine, seq_id, batch)
    assert caught.value.reason == "NON_FINITE"


def fail_with_gradients_of_another_shape(engine: Engine, seq_id: int) -> None:
    engine.forward(RUN, 500, engine.stage(BATCH), keep_graph=True)
    with pytest.raises(InvalidArgumentError, match="must match"):
        engine.backward(RUN, seq_id, forward_seq_id=500, gradients_TK=np.ones(3, dtype=np.float32))


def fail_by_cancel(engine: Engine, seq_id: int) -> None:
    engine.forward(RUN, seq_id, engine.stage(BATCH), keep_graph=True)
    assert engine.cancel(RUN, [seq_id], taint=True) == 1


@pytest.mark.parametrize(
    "fail",
    [
        fail_before_the_engine,
        fail_without_a_graph,
        fail_with_an_infinite_loss,
        fail_with_gradients_of_another_shape,
        fail_by_cancel,
    ],
)
@pytest.mark.parametrize("between", ["nothing", "a good pass", "another failure"])
def test_failed_pass_contributes_nothing_and_the_next_step_is_refused(engine: Engine, fail: Fail, between: str) -> None:
    before = params(engine)
    forward_backward(engine, 1)
    fail(engine, 7)
    if between == "a good pass":
        forward_backward(engine, 8)
    elif between == "another failure":
        fail_without_a_graph(engine, 8)
    with pytest.raises(PriorOperationFailedError) as caught:
        engine.optim_step(RUN, 9, STEP)
    assert caught.value.failed_seq_id == 7
    assert grads(engine) == []
    assert same(params(engine), before)

    # The run goes on as if none of it had happened.
    with pytest.raises(NoGradientsError):
        engine.optim_step(RUN, 10, STEP)
    engine.create_run("run-2")
    for run_id in (RUN, "run-2"):
        forward_backward(engine, 11, run_id=run_id)
        assert engine.optim_step(run_id, 12, STEP).step == 1
    assert same(params(engine), params(engine, "run-2"))


def test_zero_grad_clears_the_taint(engine: Engine) -> None:
    fail_without_a_graph(engine, 1)
    engine.zero_grad(RUN)
    forward_backward(engine, 2)
    assert engine.optim_step(RUN, 3, STEP).step == 1


def test_failed_forward_does_not_taint(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    forward_backward(engine, 1)
    with monkeypatch.context() as patched:
        out_of_memory_at(patched, engine, forward=2)
        with pytest.raises(DeviceOutOfMemoryError):
            engine.forward(RUN, 2, engine.stage(BATCH), keep_graph=True)
    assert engine.counters.held_graphs == 0
    assert engine.optim_step(RUN, 3, STEP).step == 1


def out_of_memory_at(monkeypatch: pytest.MonkeyPatch, engine: Engine, *, forward: int) -> None:
    """Lets the given forward of the model, from 1, ask for more memory than there is."""
    model, calls = engine.live_model(RUN).base_model, []
    real = model.forward

    def starved(*args: object, **kwargs: object) -> object:
        calls.append(args)
        if len(calls) == forward:
            torch.empty(1 << 60)
        return real(*args, **kwargs)

    monkeypatch.setattr(model, "forward", starved)


def test_a_batch_that_finds_no_memory_ahead_of_its_turn_is_put_on_the_device_in_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(engine._passes, "_copy", lambda _: torch.empty(1 << 60))
        staged = engine.stage(BATCH)
        with pytest.raises(DeviceOutOfMemoryError, match="the forward of 17 tokens"):
            engine.forward(RUN, 1, staged)
    found = engine.forward(RUN, 2, staged)
    np.testing.assert_array_equal(found.logprobs_TK, engine.forward(RUN, 3, engine.stage(BATCH)).logprobs_TK)


def test_device_out_of_memory_says_what_to_do_and_the_run_goes_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = params(engine)
    with monkeypatch.context() as patched:
        out_of_memory_at(patched, engine, forward=2)
        with pytest.raises(DeviceOutOfMemoryError) as caught:
            forward_backward(engine, 1)
    assert "17 tokens" in caught.value.message
    assert "at most 10 tokens" in caught.value.message
    assert "--max-pack-tokens" in caught.value.message
    assert caught.value.metadata["max_pack_tokens"] == "10"
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None, "the failed pass's tensors would live on in its frames"
    with pytest.raises(PriorOperationFailedError):
        engine.optim_step(RUN, 2, STEP)
    assert same(params(engine), before)
    forward_backward(engine, 3)
    assert engine.optim_step(RUN, 4, STEP).step == 1


def test_optim_step_with_infinite_gradients_is_refused_and_clears_them(engine: Engine) -> None:
    before = params(engine)
    found = engine.forward(RUN, 1, engine.stage(BATCH), keep_graph=True)
    engine.backward(RUN, 2, forward_seq_id=1, gradients_TK=np.full_like(found.logprobs_TK, 3e38))
    with pytest.raises(FailedPreconditionError) as caught:
        engine.optim_step(RUN, 3, STEP)
    assert caught.value.reason == "NON_FINITE"
    assert same(params(engine), before)
    with pytest.raises(NoGradientsError):
        engine.optim_step(RUN, 4, STEP)


def test_graph_serves_one_backward(engine: Engine) -> None:
    found = engine.forward(RUN, 1, engine.stage(BATCH), keep_graph=True)
    assert engine.counters.held_graphs == 1
    engine.backward(RUN, 2, forward_seq_id=1, gradients_TK=ones_like(found))
    assert engine.counters.held_graphs == 0
    with pytest.raises(FailedPreconditionError, match="was used by an earlier backward") as caught:
        engine.backward(RUN, 3, forward_seq_id=1, gradients_TK=ones_like(found))
    assert caught.value.reason == "NO_HELD_GRAPH"


def test_graph_stays_held_when_gradients_do_not_fit(engine: Engine) -> None:
    fail_with_gradients_of_another_shape(engine, 1)
    assert engine.counters.held_graphs == 1
    engine.zero_grad(RUN)
    engine.backward(RUN, 2, forward_seq_id=500, gradients_TK=np.ones(17, dtype=np.float32))


def test_backward_after_an_optim_step_is_refused_instead_of_wrong(engine: Engine) -> None:
    found = engine.forward(RUN, 1, engine.stage(BATCH), keep_graph=True)
    forward_backward(engine, 2)
    engine.optim_step(RUN, 3, STEP)
    with pytest.raises(FailedPreconditionError, match="dropped by optim_step 3, which changed the parameters"):
        engine.backward(RUN, 4, forward_seq_id=1, gradients_TK=ones_like(found))


def test_refused_optim_step_leaves_graphs_held(engine: Engine) -> None:
    found = engine.forward(RUN, 1, engine.stage(BATCH), keep_graph=True)
    with pytest.raises(NoGradientsError):
        engine.optim_step(RUN, 2, STEP)
    engine.backward(RUN, 3, forward_seq_id=1, gradients_TK=ones_like(found))


def test_graphs_take_their_backwards_in_any_order(engine: Engine) -> None:
    batches = {seq_id: make_batch(4, 6, seed=seq_id) for seq_id in (1, 2, 3)}
    for seq_id, batch in batches.items():
        engine.forward(RUN, seq_id, engine.stage(batch), keep_graph=True)
    forward_backward(engine, 4)
    for seq_id in (2, 3, 1):
        gradients = -batches[seq_id].loss_fn_inputs["weights"]
        engine.backward(RUN, 10 + seq_id, forward_seq_id=seq_id, gradients_TK=gradients)
    found = grads(engine)
    engine.zero_grad(RUN)
    for batch in (BATCH, *batches.values()):
        forward_backward(engine, 20, batch)
    for ours, wanted in zip(found, grads(engine), strict=True):
        torch.testing.assert_close(ours, wanted)


def test_held_graph_does_not_see_what_its_caller_does_to_the_arrays(engine: Engine) -> None:
    batch = make_batch(6)
    forward_backward(engine, 1, batch)
    wanted = grads(engine)
    engine.zero_grad(RUN)
    weights = batch.loss_fn_inputs["weights"].copy()
    engine.forward(RUN, 2, engine.stage(batch), keep_graph=True)
    for array in (batch.tokens_T, *batch.loss_fn_inputs.values()):
        array[:] = 0
    engine.backward(RUN, 3, forward_seq_id=2, gradients_TK=-weights)
    assert same(grads(engine), wanted)


def test_cancel_passes_over_graphs_that_are_not_held(engine: Engine) -> None:
    engine.forward(RUN, 1, engine.stage(BATCH), keep_graph=True)
    engine.forward(RUN, 2, engine.stage(BATCH), keep_graph=True)
    assert engine.cancel(RUN, [1, 1, 77]) == 1
    assert engine.counters.held_graphs == 1
    engine.drop_graphs(RUN)
    engine.drop_graphs("run-gone")
    assert engine.counters.held_graphs == 0
    forward_backward(engine, 3)
    assert engine.optim_step(RUN, 4, STEP).step == 1


def test_as_many_runs_as_announced_and_no_more(tiny_llama: Path, tmp_path: Path) -> None:
    engine = make_engine(tiny_llama, tmp_path, limits=Limits(max_runs=2))
    engine.create_run("run-2")
    with pytest.raises(ResourceExhaustedError) as caught:
        engine.create_run("run-3")
    assert caught.value.reason == "LIMIT_EXCEEDED"
    engine.delete_run("run-2")
    engine.create_run("run-3")


def test_taken_name_is_refused(engine: Engine, tmp_path: Path) -> None:
    engine.save_weights_for_sampler(RUN, "a")
    with pytest.raises(AlreadyExistsError):
        engine.save_weights_for_sampler(RUN, "a")
    engine.create_run("run-2")
    engine.save_weights_for_sampler("run-2", "a")


def test_errors_of_the_engine_are_gradwire_errors(engine: Engine) -> None:
    with pytest.raises(GradwireError, match="run-9"):
        engine.zero_grad("run-9")
