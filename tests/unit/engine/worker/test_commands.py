"""Commands in, events out: what the trainer sends and what it is answered, without a process or a socket."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradwire._wire.codec import Batch, batch_message, decode_tensor, split, tensor_message
from gradwire.errors import from_status
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.datum_pb2 import Datum, ModelInput
from gradwire.v1.tensor_pb2 import FloatValues, IntValues, Tensor
from gradwire.v1.trainer_service_pb2 import AttachRequest, CreateRunRequest, TrainRequest
from gradwire.v1.worker_service_pb2 import (
    WorkerCreateRun,
    WorkerDeleteRun,
    WorkerDropGraphs,
)

from tests.driver import Driver, never
from tests.engines import BATCH, RUN, make_batch, make_engine
from tests.tiny import MAX_CONTEXT_LENGTH, VOCAB_SIZE
from trainer_service.engine.worker.commands import Commands


def forward_backward(batch: Batch = BATCH, loss_fn: str = "cross_entropy") -> ops.ForwardBackwardRequest:
    return ops.ForwardBackwardRequest(batch=batch_message(batch), loss_fn=loss_fn)


def changed(**inputs: Any) -> Batch:
    """BATCH with other loss inputs; None leaves one out."""
    merged = {**BATCH.loss_fn_inputs, **inputs}
    kept = {name: array for name, array in merged.items() if array is not None}
    return Batch(BATCH.tokens_T, BATCH.cu_seqlens, kept)


def test_training_goes_through(driver: Driver) -> None:
    losses = []
    for number in range(3):
        answer = driver.send(forward_backward=forward_backward())
        assert answer.WhichOneof("result") == "forward_backward"
        assert answer.execute_ms > 0
        assert answer.queue_ms >= 0
        losses.append(answer.forward_backward.metrics["loss:sum"])
        assert driver.step().optim_step.step == number + 1
    assert losses == sorted(losses, reverse=True)


def test_answer_comes_as_bytes_to_programs_and_as_numbers_to_people(driver: Driver) -> None:
    answer = driver.send(forward_backward=forward_backward()).forward_backward
    logprobs = decode_tensor(answer.loss_fn_outputs["logprobs"], "logprobs")
    np.testing.assert_array_equal(decode_tensor(answer.cu_seqlens, "cu_seqlens"), BATCH.cu_seqlens)
    assert answer.loss_fn_outputs["logprobs"].WhichOneof("elements") == "data"
    data = [
        Datum(
            model_input=ModelInput(tokens=BATCH.tokens_T[start:stop]),
            loss_fn_inputs={
                "target_tokens": Tensor(ints=IntValues(values=BATCH.loss_fn_inputs["target_tokens"][start:stop])),
                "weights": Tensor(floats=FloatValues(values=BATCH.loss_fn_inputs["weights"][start:stop])),
            },
        )
        for start, stop in ((0, 5), (5, 14), (14, 17))
    ]
    by_hand = driver.send(forward_backward=ops.ForwardBackwardRequest(data=data, loss_fn="cross_entropy"))
    tensor = by_hand.forward_backward.loss_fn_outputs["logprobs"]
    assert tensor.WhichOneof("elements") == "floats"
    np.testing.assert_array_equal(np.array(tensor.floats.values, dtype=np.float32), logprobs)
    assert by_hand.forward_backward.cu_seqlens.ints.values == [0, 5, 14, 17]


def test_custom_loss_is_one_forward_and_the_counters_say_so(driver: Driver) -> None:
    def counters() -> dict[str, float]:
        # Deleting a run that is not there changes nothing, but its answer carries the counters.
        return dict(driver.execute(driver.command(run_id="nobody", delete_run=WorkerDeleteRun())).counters)

    before = counters()
    request = ops.ForwardRequest(batch=batch_message(changed(weights=None)), keep_graph=True)
    answer = driver.send(forward=request)
    forward_seq_id = driver.seq_id
    logprobs = decode_tensor(answer.forward.loss_fn_outputs["logprobs"], "logprobs")
    during = counters()
    backward = ops.BackwardRequest(forward_seq_id=forward_seq_id, gradients=tensor_message(np.ones_like(logprobs)))
    assert driver.send(backward=backward).backward.metrics["num_loss_tokens:sum"] == 17
    after = counters()

    def grown(name: str) -> tuple[float, float]:
        key = f"gradwire_worker_{name}"
        return during[key] - before[key], after[key] - before[key]

    # Three sequences in one pack: one forward of the model, and no second at backward.
    assert grown("forward_passes_total") == (1, 1)
    assert grown("backward_passes_total") == (0, 1)
    assert grown("tokens_total") == (17, 17)
    assert grown("held_graphs") == (1, 0)
    assert driver.step().optim_step.metrics["num_sequences:sum"] == 3


REFUSED = {
    "empty data": (ops.ForwardBackwardRequest(loss_fn="cross_entropy"), "INVALID_FIELD", "data is empty"),
    "no targets": (forward_backward(changed(target_tokens=None)), "INVALID_FIELD", 'loss_fn_inputs["target_tokens"]'),
    "no weights": (forward_backward(changed(weights=None)), "INVALID_FIELD", 'data[0].loss_fn_inputs["weights"]'),
    "lengths that differ": (
        forward_backward(changed(weights=np.ones(4, dtype=np.float32))),
        "INVALID_FIELD",
        'loss_fn_inputs["weights"] has shape [4], but there are 17 tokens',
    ),
    "wrong dtype": (
        forward_backward(changed(target_tokens=np.ones(17, dtype=np.float32))),
        "INVALID_FIELD",
        'loss_fn_inputs["target_tokens"] has dtype float32',
    ),
    "token outside the vocabulary": (
        forward_backward(Batch(BATCH.tokens_T + 128, BATCH.cu_seqlens, BATCH.loss_fn_inputs)),
        "INVALID_FIELD",
        f"vocabulary of {VOCAB_SIZE}",
    ),
    "NaN weights": (
        forward_backward(changed(weights=np.full(17, np.nan, dtype=np.float32))),
        "INVALID_FIELD",
        'data[0].loss_fn_inputs["weights"][0] is nan',
    ),
    "sequence too long": (
        forward_backward(
            Batch(
                np.zeros(MAX_CONTEXT_LENGTH + 1, dtype=np.int32),
                np.array([0, MAX_CONTEXT_LENGTH + 1]),
                {
                    "target_tokens": np.zeros(MAX_CONTEXT_LENGTH + 1, dtype=np.int64),
                    "weights": np.ones(MAX_CONTEXT_LENGTH + 1, dtype=np.float32),
                },
            )
        ),
        "SEQUENCE_TOO_LONG",
        f"at most {MAX_CONTEXT_LENGTH}",
    ),
    "unknown loss": (forward_backward(loss_fn="cross_entropyy"), "UNKNOWN_LOSS", "known: cross_entropy"),
    "no loss": (forward_backward(loss_fn=""), "UNKNOWN_LOSS", "known: cross_entropy"),
}


@pytest.mark.parametrize("operation", ["forward", "forward_backward"])
@pytest.mark.parametrize(
    ("name", "reason", "place"),
    [
        ("tokens", "INVALID_FIELD", "model_input.tokens[4]"),
        ("target_tokens", "INVALID_FIELD", 'loss_fn_inputs["target_tokens"][4]'),
        ("weights", "INVALID_FIELD", 'loss_fn_inputs["weights"][4]'),
        ("colour", "INVALID_FIELD", 'loss_fn_inputs["colour"]'),
        ("length", "SEQUENCE_TOO_LONG", "model_input"),
    ],
)
def test_a_piece_is_refused_with_the_place_in_the_callers_data(
    driver: Driver, operation: str, name: str, reason: str, place: str
) -> None:
    lengths = [8] * 199 + [MAX_CONTEXT_LENGTH + (name == "length")]
    batch = make_batch(*lengths)
    row = int(batch.cu_seqlens[-2]) + 4
    inputs = dict(batch.loss_fn_inputs)
    match name:
        case "tokens":
            batch.tokens_T[row] = VOCAB_SIZE
        case "target_tokens":
            inputs[name][row] = -1
        case "weights":
            inputs[name][row] = np.nan
        case "colour":
            inputs[name] = inputs["weights"]
    pieces = split(replace(batch, loss_fn_inputs=inputs), target_bytes=2_000)
    assert len(pieces) > 10
    number = 199 if name != "colour" else pieces[-1].first_datum_index
    fields = {"batch": batch_message(pieces[-1]), "loss_fn": "cross_entropy"}
    exc = driver.refused(**{operation: fields})
    field = f"data[{number}].{place}"
    assert (exc.reason, exc.metadata["field"]) == (reason, field)
    assert [path for path, _ in exc.field_violations] == [field]
    assert exc.message.startswith(f"{field} ")


def test_a_loss_of_a_piece_that_is_not_finite_names_the_callers_datum(driver: Driver) -> None:
    batch = make_batch(*[3] * 40)
    batch.loss_fn_inputs["weights"][3 * 39 :] = 3e38
    piece = split(batch, target_bytes=500)[-1]
    exc = driver.refused(forward_backward=forward_backward(piece))
    assert (exc.reason, exc.metadata["datum"]) == ("NON_FINITE", "39")
    assert "cross_entropy of data[39] is" in exc.message


def test_a_kept_graph_of_a_piece_is_refused_with_the_place_in_the_callers_data(driver: Driver) -> None:
    batch = make_batch(*[3] * 40)
    batch.tokens_T[-1] = VOCAB_SIZE
    request = ops.ForwardRequest(batch=batch_message(split(batch, target_bytes=500)[-1]), keep_graph=True)
    assert driver.refused(forward=request).metadata["field"] == "data[39].model_input.tokens[2]"


@pytest.mark.parametrize("case", REFUSED)
def test_refused_pass_taints_in_its_turn_and_the_run_goes_on(driver: Driver, case: str) -> None:
    request, reason, text = REFUSED[case]
    driver.send(forward_backward=forward_backward())
    exc = driver.refused(forward_backward=copy.deepcopy(request))
    assert exc.reason == reason
    assert text in exc.message
    assert exc.field_violations
    failed = driver.seq_id
    refused = from_status(driver.step().error)
    assert refused.reason == "PRIOR_OPERATION_FAILED"
    assert refused.metadata["failed_seq_id"] == str(failed)
    driver.send(forward_backward=forward_backward())
    assert driver.step().optim_step.step == 1


def test_refusal_prepared_ahead_leaves_its_mark_only_in_its_turn(driver: Driver) -> None:
    commands = [
        driver.command(request=TrainRequest(forward_backward=forward_backward())),
        driver.command(request=TrainRequest(optim_step=ops.OptimStepRequest())),
        driver.command(request=TrainRequest(forward_backward=forward_backward(loss_fn="x"))),
        driver.command(request=TrainRequest(optim_step=ops.OptimStepRequest())),
    ]
    prepared = [driver.commands.prepare(command) for command in commands]
    events = [driver.commands.execute(item) for item in prepared]
    results = [event.response.WhichOneof("result") for event in events if event is not None]
    assert results == ["forward_backward", "optim_step", "error", "error"]


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (ops.OptimStepRequest(learning_rate=-1e-4), "learning_rate"),
        (ops.OptimStepRequest(eps=0), "eps"),
        (ops.OptimStepRequest(grad_accumulation_normalization=99), "grad_accumulation_normalization"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_refused_optim_step_leaves_the_gradients_for_the_next_try(
    driver: Driver, request_: ops.OptimStepRequest, field: str
) -> None:
    driver.send(forward_backward=forward_backward())
    exc = driver.refused(optim_step=request_)
    assert exc.field_violations[0][0] == field
    assert driver.step().optim_step.step == 1


def test_absent_hyperparameters_take_their_defaults(driver: Driver, tiny_llama: Path, tmp_path: Path) -> None:
    other = Driver(Commands(make_engine(tiny_llama, tmp_path / "other"), never))
    explicit = ops.OptimStepRequest(learning_rate=1e-4, beta1=0.9, beta2=0.95, eps=1e-12, weight_decay=0)
    for one, request in ((driver, ops.OptimStepRequest()), (other, explicit)):
        one.send(forward_backward=forward_backward())
        one.send(optim_step=request)
    losses = [
        one.send(forward_backward=forward_backward()).forward_backward.metrics["loss:sum"] for one in (driver, other)
    ]
    assert losses[0] == losses[1]


def test_forward_takes_a_kept_graph_or_a_loss_not_both(driver: Driver) -> None:
    request = ops.ForwardRequest(batch=batch_message(BATCH), keep_graph=True, loss_fn="cross_entropy")
    assert driver.refused(forward=request).field_violations[0][0] == "loss_fn"
    request = ops.ForwardRequest(batch=batch_message(BATCH), loss_fn_config={"a": 1.0})
    assert driver.refused(forward=request).field_violations[0][0] == "loss_fn_config"
    request = ops.ForwardRequest(batch=batch_message(BATCH), loss_fn="cross_entropy")
    assert driver.send(forward=request).forward.metrics["loss:sum"] > 0


@pytest.mark.parametrize(
    "gradients",
    [np.ones(17, dtype=np.int64), np.full(17, np.inf, dtype=np.float32), np.ones((17, 1), dtype=np.float32)],
)
def test_gradients_that_do_not_fit_are_refused_and_taint(driver: Driver, gradients: np.ndarray) -> None:
    driver.send(forward=ops.ForwardRequest(batch=batch_message(BATCH), keep_graph=True))
    request = ops.BackwardRequest(forward_seq_id=driver.seq_id, gradients=tensor_message(gradients))
    exc = driver.refused(backward=request)
    assert exc.reason == "INVALID_FIELD"
    assert exc.field_violations[0][0].startswith("gradients")
    assert from_status(driver.step().error).reason == "PRIOR_OPERATION_FAILED"


def test_missing_gradients_are_refused(driver: Driver) -> None:
    assert "gradients has no elements" in driver.refused(backward=ops.BackwardRequest(forward_seq_id=1)).message


@pytest.mark.parametrize("operation", [{}, {"attach": AttachRequest(run_id=RUN)}])
def test_message_that_is_no_operation_is_answered_with_an_error(driver: Driver, operation: dict[str, Any]) -> None:
    assert driver.refused(**operation).reason == "PROTOCOL_VIOLATION"


def test_command_that_says_nothing_is_answered_with_an_error(driver: Driver) -> None:
    event = driver.execute(driver.command())
    assert event.WhichOneof("event") == "done"
    assert from_status(event.done.error).reason == "PROTOCOL_VIOLATION"


def test_runs_are_made_and_freed(driver: Driver) -> None:
    create = WorkerCreateRun(request=CreateRunRequest())
    event = driver.execute(driver.command(run_id="run-2", create_run=create))
    assert event.WhichOneof("event") == "done"
    assert not event.done.HasField("error")
    assert event.counters["gradwire_worker_runs"] == 2
    for _ in range(2):
        event = driver.execute(driver.command(run_id="run-2", delete_run=WorkerDeleteRun()))
        assert not event.done.HasField("error")
    assert event.counters["gradwire_worker_runs"] == 1


def test_unknown_run_is_not_found_also_when_the_request_is_bad(driver: Driver) -> None:
    for loss_fn in ("cross_entropy", "x"):
        request = TrainRequest(forward_backward=forward_backward(loss_fn=loss_fn))
        event = driver.execute(driver.command(run_id="run-9", request=request))
        assert from_status(event.response.error).reason == "RUN_NOT_FOUND"


def test_dropped_graphs_are_gone(driver: Driver) -> None:
    driver.send(forward=ops.ForwardRequest(batch=batch_message(BATCH), keep_graph=True))
    kept = driver.seq_id
    event = driver.execute(driver.command(drop_graphs=WorkerDropGraphs()))
    assert event.counters["gradwire_worker_held_graphs"] == 0
    gradients = tensor_message(np.ones(17, dtype=np.float32))
    exc = driver.refused(backward=ops.BackwardRequest(forward_seq_id=kept, gradients=gradients))
    assert exc.reason == "NO_HELD_GRAPH"
    assert "client went away" in exc.message


def test_cancel_taints_with_the_forward_cancelled(driver: Driver) -> None:
    driver.send(forward=ops.ForwardRequest(batch=batch_message(BATCH), keep_graph=True))
    kept = driver.seq_id
    driver.send(forward_backward=forward_backward())
    assert driver.send(cancel=ops.CancelRequest(forward_seq_ids=[kept], taint=True)).cancel.dropped == 1
    assert from_status(driver.step().error).metadata["failed_seq_id"] == str(kept)


def test_own_fault_is_internal_without_its_inner_words(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(*_: object, **__: object) -> None:
        raise TypeError("Engine.forward_backward() got an unexpected keyword argument 'colour'")

    with monkeypatch.context() as patched:
        patched.setattr(driver.commands._engine, "forward_backward", faulty)
        exc = driver.refused(forward_backward=forward_backward())
    assert exc.reason == "INTERNAL"
    assert "colour" not in exc.message
    driver.send(zero_grad=ops.ZeroGradRequest())
    driver.send(forward_backward=forward_backward())
    assert driver.step().optim_step.step == 1
