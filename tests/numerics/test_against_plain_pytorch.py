"""What the engine computes is what an ordinary PyTorch loop computes, in float32.

Tolerances: loss 2e-6 relative; logprobs 1e-4 absolute (nats); every parameter's gradient, by itself, 2e-5 in relative
L2 norm of plain PyTorch in float64; parameters after three AdamW steps 5e-3 of the distance they moved. That last one
is with an eps of 1e-6: Adam divides by the gradient's own size, so with a far smaller eps a gradient that is 0 but for
rounding moves its parameter a full step to either side, in plain PyTorch as here.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from gradwire.codec import Batch
from gradwire.custom_loss import run_custom_loss
from gradwire.types import AdamParams
from transformers import PreTrainedModel

from tests.engines import CROSS_ENTROPY, RUN, make_engine
from tests.numerics.conftest import ModelCase
from tests.numerics.plain import (
    PlainSequence,
    cross_entropy_of,
    load_plain,
    plain_backward,
    relative_error,
    to_batch,
    worst_gradient_error,
)
from trainer_service.engine.engine import Engine

LOSS = 2e-6
LOGPROBS = 1e-4
GRADIENTS = 2e-5
MOVED = 5e-3
tiny_only = pytest.mark.parametrize("case", ["tiny_llama"], indirect=True)


@pytest.fixture
def engine(case: ModelCase, tmp_path: Path) -> Engine:
    return make_engine(case.folder, tmp_path)


@pytest.fixture
def plain(case: ModelCase) -> PreTrainedModel:
    return load_plain(case.folder)


@pytest.fixture
def exact(case: ModelCase) -> PreTrainedModel:
    return load_plain(case.folder, dtype=torch.float64)


@pytest.fixture
def sequences(case: ModelCase) -> list[PlainSequence]:
    return case.sequences()


def coupled_loss(logprobs: list[torch.Tensor]) -> torch.Tensor:
    """A loss no built-in could be: it couples the first two sequences, squares the third, ignores the fourth."""
    margin = logprobs[0].sum() - logprobs[1].sum()
    return -torch.nn.functional.logsigmoid(0.1 * margin) + (logprobs[2] ** 2).mean()


def custom_backward(engine: Engine, batch: Batch, seq_id: int) -> tuple[float, np.ndarray]:
    """What forward_backward_custom does, without the wire."""
    found = engine.forward(RUN, seq_id, batch, keep_graph=True)
    gradients, loss, _ = run_custom_loss(
        lambda _, logprobs: (coupled_loss(logprobs), {}),
        [None] * batch.num_sequences,
        found.logprobs_TK,
        batch.cu_seqlens,
    )
    engine.backward(RUN, seq_id + 1, forward_seq_id=seq_id, gradients_TK=gradients)
    return loss, found.logprobs_TK


def test_built_in_loss_equals_plain_pytorch(
    engine: Engine, exact: PreTrainedModel, sequences: list[PlainSequence]
) -> None:
    found = engine.forward_backward(RUN, 1, to_batch(sequences), CROSS_ENTROPY)
    loss, logprobs = plain_backward(exact, sequences, cross_entropy_of(sequences))
    assert found.metrics["loss:sum"] == pytest.approx(loss, rel=LOSS)
    np.testing.assert_allclose(found.logprobs_TK, logprobs, rtol=0, atol=LOGPROBS)
    assert worst_gradient_error(engine.live_model(RUN), exact) < GRADIENTS


def test_custom_loss_equals_plain_pytorch(
    engine: Engine, exact: PreTrainedModel, sequences: list[PlainSequence]
) -> None:
    loss, logprobs = custom_backward(engine, to_batch(sequences, with_weights=False), 1)
    plain_loss, plain_found = plain_backward(exact, sequences, coupled_loss)
    assert loss == pytest.approx(plain_loss, rel=LOSS)
    np.testing.assert_allclose(logprobs, plain_found, rtol=0, atol=LOGPROBS)
    assert worst_gradient_error(engine.live_model(RUN), exact) < GRADIENTS


@tiny_only
def test_soft_targets_equal_plain_pytorch(engine: Engine, plain: PreTrainedModel, case: ModelCase) -> None:
    sequences = case.sequences(3)
    found = engine.forward_backward(RUN, 1, to_batch(sequences), CROSS_ENTROPY)
    loss, logprobs = plain_backward(plain, sequences, cross_entropy_of(sequences))
    assert found.logprobs_TK.shape == (sum(len(s.tokens) for s in sequences), 3)
    assert found.metrics["loss:sum"] == pytest.approx(loss, rel=LOSS)
    np.testing.assert_allclose(found.logprobs_TK, logprobs, rtol=0, atol=LOGPROBS)
    assert worst_gradient_error(engine.live_model(RUN), plain) < GRADIENTS


def test_accumulation_over_three_calls_equals_one_call(
    engine: Engine, exact: PreTrainedModel, sequences: list[PlainSequence]
) -> None:
    pieces = [to_batch(sequences).sequences(start, stop) for start, stop in ((0, 1), (1, 3), (3, 4))]
    losses = [
        engine.forward_backward(RUN, number, piece, CROSS_ENTROPY).metrics["loss:sum"]
        for number, piece in enumerate(pieces, 1)
    ]
    loss, _ = plain_backward(exact, sequences, cross_entropy_of(sequences))
    assert sum(losses) == pytest.approx(loss, rel=LOSS)
    assert worst_gradient_error(engine.live_model(RUN), exact) < GRADIENTS


@tiny_only
def test_built_in_and_custom_losses_add_up(
    engine: Engine, plain: PreTrainedModel, sequences: list[PlainSequence]
) -> None:
    batch = to_batch(sequences)
    engine.forward_backward(RUN, 1, batch, CROSS_ENTROPY)
    custom_backward(engine, batch, 2)
    plain_backward(plain, sequences, cross_entropy_of(sequences))
    plain_backward(plain, sequences, coupled_loss)
    assert worst_gradient_error(engine.live_model(RUN), plain) < GRADIENTS


def steps(plain: PreTrainedModel, settings: list[AdamParams]) -> Iterator[tuple[AdamParams, torch.optim.Optimizer]]:
    """torch's own AdamW, one tensor after the other, given each step's hyperparameters."""
    optimizer = torch.optim.AdamW(plain.parameters(), fused=False, foreach=False)
    for params in settings:
        optimizer.param_groups[0].update(
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            weight_decay=params.weight_decay,
        )
        yield params, optimizer


@pytest.mark.parametrize("kind", ["built_in", "custom"])
def test_three_adamw_steps_equal_plain_pytorch(
    engine: Engine, plain: PreTrainedModel, sequences: list[PlainSequence], kind: str
) -> None:
    before = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    settings = [
        AdamParams(learning_rate=1e-4, eps=1e-6),
        AdamParams(learning_rate=5e-5, beta1=0.8, beta2=0.99, eps=1e-6, weight_decay=0.1),
        AdamParams(learning_rate=2e-5, eps=1e-6, grad_clip_norm=0.5),
    ]
    for number, (params, optimizer) in enumerate(steps(plain, settings)):
        if kind == "built_in":
            engine.forward_backward(RUN, 10 * number, to_batch(sequences), CROSS_ENTROPY)
            plain_backward(plain, sequences, cross_entropy_of(sequences))
        else:
            custom_backward(engine, to_batch(sequences), 10 * number)
            plain_backward(plain, sequences, coupled_loss)
        found = engine.optim_step(RUN, 10 * number + 5, params)
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), params.grad_clip_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        assert found.step == number + 1
        assert found.metrics["grad_norm:mean"] == pytest.approx(norm.item(), rel=1e-4)
    for (name, ours), parameter in zip(engine.live_model(RUN).named_parameters(), plain.parameters(), strict=True):
        assert ours.grad is None
        moved = parameter.detach() - before[name]
        assert relative_error(ours.detach() - before[name], moved) < MOVED, name


@tiny_only
@pytest.mark.parametrize(("normalization", "divisor"), [("num_loss_tokens", None), ("num_sequences", 4)])
def test_normalization_divides_before_clipping(
    engine: Engine, plain: PreTrainedModel, sequences: list[PlainSequence], normalization: str, divisor: int | None
) -> None:
    count = divisor or sum(int((s.weights != 0).sum()) for s in sequences)
    batch = to_batch(sequences)
    for number in (0, 2):
        # In two calls, so that the counts have to add up too.
        engine.forward_backward(RUN, number + 1, batch.sequences(number, number + 2), CROSS_ENTROPY)
    plain_backward(plain, sequences, cross_entropy_of(sequences))
    for parameter in plain.parameters():
        assert parameter.grad is not None
        parameter.grad /= count
    before = [parameter.detach().clone() for parameter in plain.parameters()]
    # eps of the gradients' own size: without it the first Adam step would not show their scale.
    params = AdamParams(learning_rate=1e-3, eps=1e-3, grad_clip_norm=1.0)
    (_, optimizer) = next(steps(plain, [params]))
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), params.grad_clip_norm)
    optimizer.step()
    found = engine.optim_step(RUN, 9, params, normalization)  # pyright: ignore[reportArgumentType]
    assert found.metrics["grad_norm:mean"] == pytest.approx(norm.item(), rel=1e-4)
    for ours, parameter, start in zip(engine.live_model(RUN).parameters(), plain.parameters(), before, strict=True):
        assert relative_error(ours.detach() - start, parameter.detach() - start) < MOVED
