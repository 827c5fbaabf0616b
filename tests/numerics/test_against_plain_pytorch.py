"""What the engine computes is what an ordinary PyTorch loop computes, as near to float64 as float32 allows (plain.py).

AdamW steps are taken with an eps of 1e-6: Adam divides by the gradient's own size, so with a far smaller eps a gradient
that is 0 but for rounding moves its parameter a full step to either side, in plain PyTorch as here.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradwire._client.custom_loss import run_custom_loss
from gradwire._wire.codec import Batch
from gradwire.types import AdamParams

from tests.engines import CROSS_ENTROPY, RUN, make_engine
from tests.numerics.conftest import ModelCase
from tests.numerics.plain import (
    FACTOR,
    ROUNDING,
    PlainLoss,
    PlainSequence,
    Reference,
    check_sum,
    cross_entropy_of,
    load_plain,
    plain_backward,
    to_batch,
    worst_error,
)
from trainer_service.engine.engine import Engine, ForwardResult

tiny_only = pytest.mark.parametrize("case", ["tiny_llama"], indirect=True)


@pytest.fixture
def engine(case: ModelCase, tmp_path: Path) -> Engine:
    return make_engine(case.folder, tmp_path)


@pytest.fixture
def sequences(case: ModelCase) -> list[PlainSequence]:
    return case.sequences()


@functools.lru_cache(maxsize=1)
def reference(case: ModelCase, loss: str, k: int | None = None) -> Reference:
    """Of a case's sequences, for a loss of LOSSES."""
    sequences = case.sequences(k)
    return Reference.of(lambda dtype: load_plain(case.folder, dtype=dtype), sequences, LOSSES[loss](sequences))


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


LOSSES: dict[str, Callable[[list[PlainSequence]], PlainLoss]] = {
    "built_in": cross_entropy_of,
    "custom": lambda sequences: coupled_loss,
    "both": lambda sequences: lambda logprobs: cross_entropy_of(sequences)(logprobs) + coupled_loss(logprobs),
}


def check_cross_entropy(found: ForwardResult, sequences: list[PlainSequence]) -> None:
    """The loss is the sum of what was answered."""
    weights = np.concatenate([sequence.weights for sequence in sequences])
    check_sum(found.metrics["loss:sum"], -weights * found.logprobs_TK)


def test_built_in_loss_equals_plain_pytorch(engine: Engine, case: ModelCase, sequences: list[PlainSequence]) -> None:
    found = engine.forward_backward(RUN, 1, to_batch(sequences), CROSS_ENTROPY)
    wanted = reference(case, "built_in")
    wanted.check_logprobs(found.logprobs_TK)
    wanted.check_gradients(engine.live_model(RUN).named_parameters())
    check_cross_entropy(found, sequences)


def test_accumulation_over_three_calls_equals_one_call(
    engine: Engine, case: ModelCase, sequences: list[PlainSequence]
) -> None:
    for number, (start, stop) in enumerate(((0, 1), (1, 3), (3, 4)), 1):
        piece = to_batch(sequences).sequences(start, stop)
        check_cross_entropy(engine.forward_backward(RUN, number, piece, CROSS_ENTROPY), sequences[start:stop])
    reference(case, "built_in").check_gradients(engine.live_model(RUN).named_parameters())


def test_custom_loss_equals_plain_pytorch(engine: Engine, case: ModelCase, sequences: list[PlainSequence]) -> None:
    loss, logprobs = custom_backward(engine, to_batch(sequences, with_weights=False), 1)
    wanted = reference(case, "custom")
    wanted.check_logprobs(logprobs)
    wanted.check_gradients(engine.live_model(RUN).named_parameters())
    parts = list(torch.tensor(logprobs, dtype=torch.float64).split([len(s.tokens) for s in sequences]))
    # Half a dozen roundings behind two sums, of which the margin's counts a tenth.
    sizes = 0.1 * (parts[0].abs().sum() + parts[1].abs().sum()) + (parts[2] ** 2).mean()
    roundings = (len(logprobs) + 6) * ROUNDING
    assert abs(loss - coupled_loss(parts).item()) <= roundings * sizes.item()


@tiny_only
def test_soft_targets_equal_plain_pytorch(engine: Engine, case: ModelCase) -> None:
    sequences = case.sequences(3)
    found = engine.forward_backward(RUN, 1, to_batch(sequences), CROSS_ENTROPY)
    wanted = reference(case, "built_in", 3)
    assert found.logprobs_TK.shape == (sum(len(s.tokens) for s in sequences), 3)
    wanted.check_logprobs(found.logprobs_TK)
    wanted.check_gradients(engine.live_model(RUN).named_parameters())
    check_cross_entropy(found, sequences)


@tiny_only
def test_built_in_and_custom_losses_add_up(engine: Engine, case: ModelCase, sequences: list[PlainSequence]) -> None:
    batch = to_batch(sequences)
    engine.forward_backward(RUN, 1, batch, CROSS_ENTROPY)
    custom_backward(engine, batch, 2)
    reference(case, "both").check_gradients(engine.live_model(RUN).named_parameters())


def plain_steps(
    folder: Path,
    dtype: torch.dtype,
    sequences: list[PlainSequence],
    loss: str,
    settings: list[AdamParams],
    divisor: float,
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """How far torch's own AdamW, one tensor after the other, moves each parameter; the gradients' norms."""
    plain = load_plain(folder, dtype=dtype)
    before = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    optimizer = torch.optim.AdamW(plain.parameters(), fused=False, foreach=False)
    norms: list[float] = []
    for params in settings:
        plain_backward(plain, sequences, LOSSES[loss](sequences))
        for parameter in plain.parameters():
            assert parameter.grad is not None
            parameter.grad /= divisor
        norms.append(torch.nn.utils.clip_grad_norm_(plain.parameters(), params.grad_clip_norm or float("inf")).item())
        optimizer.param_groups[0].update(
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            weight_decay=params.weight_decay,
        )
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return {name: (parameter - before[name]).float() for name, parameter in plain.named_parameters()}, norms


@dataclass(frozen=True)
class SteppedReference:
    """What AdamW does in float64, and how far plain float32 is from it on this machine."""

    moved: dict[str, torch.Tensor]
    norms: list[float]
    moved_error: float
    norm_error: float
    """Relative."""

    @classmethod
    def of(cls, case: ModelCase, loss: str, settings: list[AdamParams], *, divisor: float = 1.0) -> "SteppedReference":
        sequences = case.sequences()
        exact, norms = plain_steps(case.folder, torch.float64, sequences, loss, settings, divisor)
        moved, found = plain_steps(case.folder, torch.float32, sequences, loss, settings, divisor)
        # A norm is a sum too; that plain float32 may hit it by luck makes no rounding less.
        norm_error = max(abs(one - other) / other for one, other in zip(found, norms, strict=True))
        num_roundings = len(exact) ** 0.5
        return cls(exact, norms, worst_error(moved, exact), max(norm_error, num_roundings * ROUNDING))

    def check(self, engine: Engine, before: dict[str, torch.Tensor], norms: list[float]) -> None:
        model = engine.live_model(RUN)
        assert all(parameter.grad is None for parameter in model.parameters())
        moved = {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}
        assert worst_error(moved, self.moved) <= FACTOR * self.moved_error
        assert norms == pytest.approx(self.norms, rel=FACTOR * self.norm_error)


def parameters_of(engine: Engine) -> dict[str, torch.Tensor]:
    """Copies of a run's parameters."""
    return {name: parameter.detach().clone() for name, parameter in engine.live_model(RUN).named_parameters()}


@pytest.mark.parametrize(
    ("case", "loss"),
    [
        ("tiny_llama", "built_in"),
        ("tiny_llama", "custom"),
        pytest.param("smollm2", "built_in", marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
    ],
    indirect=["case"],
)
def test_three_adamw_steps_equal_plain_pytorch(
    case: ModelCase, sequences: list[PlainSequence], loss: str, tmp_path: Path
) -> None:
    settings = [
        AdamParams(learning_rate=1e-4, eps=1e-6),
        AdamParams(learning_rate=5e-5, beta1=0.8, beta2=0.99, eps=1e-6, weight_decay=0.1),
        AdamParams(learning_rate=2e-5, eps=1e-6, grad_clip_norm=0.5),
    ]
    wanted = SteppedReference.of(case, loss, settings)
    engine = make_engine(case.folder, tmp_path)
    before, norms = parameters_of(engine), []
    for number, params in enumerate(settings):
        if loss == "built_in":
            engine.forward_backward(RUN, 10 * number, to_batch(sequences), CROSS_ENTROPY)
        else:
            custom_backward(engine, to_batch(sequences), 10 * number)
        found = engine.optim_step(RUN, 10 * number + 5, params)
        assert found.step == number + 1
        norms.append(found.metrics["grad_norm:mean"])
    wanted.check(engine, before, norms)


@tiny_only
@pytest.mark.parametrize(("normalization", "divisor"), [("num_loss_tokens", None), ("num_sequences", 4)])
def test_normalization_divides_before_clipping(
    engine: Engine, case: ModelCase, sequences: list[PlainSequence], normalization: Any, divisor: int | None
) -> None:
    count = divisor or sum(int((s.weights != 0).sum()) for s in sequences)
    # eps of the gradients' own size: without it the first Adam step would not show their scale.
    params = AdamParams(learning_rate=1e-3, eps=1e-3, grad_clip_norm=1.0)
    wanted = SteppedReference.of(case, "built_in", [params], divisor=count)
    batch, before = to_batch(sequences), parameters_of(engine)
    for number in (0, 2):
        # In two calls, so that the counts have to add up too.
        engine.forward_backward(RUN, number + 1, batch.sequences(number, number + 2), CROSS_ENTROPY)
    found = engine.optim_step(RUN, 9, params, normalization)
    wanted.check(engine, before, [found.metrics["grad_norm:mean"]])
