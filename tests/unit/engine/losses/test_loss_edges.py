"""Ratios without bound and logprobs of −inf: a term that is constant has gradient zero, never NaN."""

import math
from typing import Any

import pytest
import torch
from gradwire._wire.arguments import FLOAT32_MAX
from gradwire._wire.metrics import combine_metrics
from hypothesis import given
from hypothesis import strategies as st

from trainer_service.engine.losses import LOSSES
from trainer_service.engine.losses.loss import LossInputs, LossOutput

CONFIG: dict[str, dict[str, float]] = {
    "dro": {"beta": 0.1},
    "gspo": {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1},
}
RATIO_LOSSES = [name for name in LOSSES if name not in ("cross_entropy", "dro")]


def evaluate(name: str, target: Any, sampler: Any, advantages: Any) -> tuple[LossOutput, torch.Tensor]:
    """A loss over one datum, and the gradient of its logprobs."""
    logprobs = torch.tensor(target, dtype=torch.float32, requires_grad=True)
    advantages = torch.tensor(advantages, dtype=torch.float32)
    inputs = {
        "weights": advantages,
        "logprobs": torch.tensor(sampler, dtype=torch.float32),
        "advantages": advantages,
        "sequence_ratio_mask": torch.ones_like(advantages),
    }
    loss = LOSSES[name]
    own = {key: inputs[key] for key in loss.inputs}
    output = loss.fn(LossInputs(logprobs, own, torch.tensor([0, len(logprobs)])), loss.settings(CONFIG.get(name)))
    output.loss.backward()
    assert logprobs.grad is not None
    return output, logprobs.grad


@pytest.mark.parametrize("name", ["ppo", "gspo"])
def test_a_huge_ratio_that_is_clipped_is_constant(name: str) -> None:
    output, gradient = evaluate(name, [-1.0, -1.0], [-500.0, -500.0], [2.0, 1.0])
    assert output.loss.item() == pytest.approx(-3 * (1.2 if name == "ppo" else 1.1))
    assert gradient.tolist() == [0, 0]
    assert output.metrics["clipped_fraction:mean"].item() == 1
    assert output.metrics["ratio:max"].item() == FLOAT32_MAX
    assert output.metrics["overflowed_tokens:sum"].item() == 2


@pytest.mark.parametrize("name", ["ppo", "gspo", "importance_sampling"])
def test_a_huge_ratio_that_nothing_clips_is_infinite_and_says_so(name: str) -> None:
    """The engine refuses the step for it (NON_FINITE); a made-up bound would train on nonsense."""
    output, _ = evaluate(name, [-1.0], [-500.0], [-2.0])
    assert output.loss.item() == math.inf


def test_cispo_bounds_a_huge_ratio_and_keeps_the_gradient() -> None:
    output, gradient = evaluate("cispo", [-1.0], [-500.0], [2.0])
    assert output.loss.item() == 8.0
    assert gradient.tolist() == [-8.0]


@pytest.mark.parametrize("name", RATIO_LOSSES)
@pytest.mark.parametrize(("target", "sampler"), [(-1.0, -1e4), (-math.inf, -1.0), (-1e30, 0.0), (-0.5, -3e38)])
def test_a_token_without_advantage_counts_for_nothing_whatever_its_ratio(
    name: str, target: float, sampler: float
) -> None:
    alone, gradient_alone = evaluate(name, [-1.0], [-1.1], [1.5])
    logprobs, gradient = evaluate(name, [-1.0, target], [-1.1, sampler], [1.5, 0.0])
    assert gradient[1].item() == 0
    assert torch.isfinite(gradient).all()
    if name != "gspo":  # Its mean is over the mask, advantages or not.
        assert logprobs.loss.item() == pytest.approx(alone.loss.item())
        assert gradient[0].item() == gradient_alone[0].item()
        assert logprobs.metrics["ratio:max"].item() == alone.metrics["ratio:max"].item()
    assert logprobs.num_loss_tokens.item() == 1


@pytest.mark.parametrize("name", ["ppo", "importance_sampling", "gspo"])
def test_a_target_of_probability_zero_has_ratio_zero(name: str) -> None:
    output, gradient = evaluate(name, [-math.inf], [-1.0], [1.0])
    assert output.loss.item() == 0
    assert gradient.tolist() == [0]


def test_cross_entropy_ignores_a_target_without_weight_at_probability_zero() -> None:
    output, gradient = evaluate("cross_entropy", [-1.0, -math.inf], [0.0, 0.0], [1.0, 0.0])
    assert output.loss.item() == 1
    assert gradient.tolist() == [-1, 0]


@pytest.mark.parametrize("name", RATIO_LOSSES)
def test_without_a_loss_token_there_is_no_mean_and_no_maximum(name: str) -> None:
    output, gradient = evaluate(name, [-1.0, -2.0], [-1.0, -2.5], [0.0, 0.0])
    assert output.loss.item() == 0
    assert gradient.tolist() == [0, 0]
    metrics = {"num_loss_tokens:sum": output.num_loss_tokens, **output.metrics}
    combined = combine_metrics([{key: float(value) for key, value in metrics.items()}])
    assert combined == {"num_loss_tokens:sum": 0, "overflowed_tokens:sum": 0}


@pytest.mark.parametrize("name", RATIO_LOSSES)
@pytest.mark.parametrize(
    ("target", "sampler"), [(-1.0, -113.0), (-0.5, -800.0), (0.0, -3e38), (-math.inf, -1.0), (-3e38, 0.0)]
)
def test_metrics_stay_numbers_whatever_the_ratio_and_say_how_many_did_not(
    name: str, target: float, sampler: float
) -> None:
    """One token is e^112 and more, or 0, times as likely as for the sampler, two are ordinary."""
    output, _ = evaluate(name, [target, -1.0, -2.0], [sampler, -1.1, -2.0], [1.0, 1.0, 1.0])
    metrics = {key: float(value) for key, value in output.metrics.items()}
    assert all(math.isfinite(value) and abs(value) <= FLOAT32_MAX for value in metrics.values())
    # A logprob of −3e38 has no ratio beyond float32, and a KL of 3e38.
    assert metrics["overflowed_tokens:sum"] == (0 if target == -3e38 else 3 if name == "gspo" and sampler < -400 else 1)
    if target == -1.0:
        assert metrics["kl:mean"] == pytest.approx(FLOAT32_MAX / 3)


def test_metrics_within_float32_are_exact_where_float32_arithmetic_is_not() -> None:
    output, _ = evaluate("importance_sampling", [-1.0, -1.0], [-81.0, -1.0], [1.0, 1.0])
    assert output.metrics["kl:mean"].item() == pytest.approx((math.expm1(80) - 80) / 2, rel=1e-14)
    assert output.metrics["overflowed_tokens:sum"].item() == 0


logprob = st.floats(-60, 0, width=32)


@given(tokens=st.lists(st.tuples(logprob, logprob, st.floats(-3, 3, width=32)), min_size=1, max_size=12))
def test_ppo_is_never_better_than_its_unclipped_terms(tokens: list[tuple[float, float, float]]) -> None:
    target, sampler, advantages = zip(*tokens, strict=True)
    clipped, gradient = evaluate("ppo", target, sampler, advantages)
    plain, plain_gradient = evaluate("importance_sampling", target, sampler, advantages)
    assert clipped.loss.item() >= plain.loss.item() - 1e-4 * abs(plain.loss.item())
    # A token's gradient is the unclipped one, or none.
    assert all(ours in (0, theirs) for ours, theirs in zip(gradient.tolist(), plain_gradient.tolist(), strict=True))
    assert 0 <= clipped.metrics["clipped_fraction:mean"].item() <= 1
    assert clipped.metrics["kl:mean"].item() >= 0


@given(
    parts=st.lists(st.lists(st.floats(-5, 5), min_size=0, max_size=5), min_size=1, max_size=5),
)
def test_metrics_of_parts_are_those_of_the_whole(parts: list[list[float]]) -> None:
    def metrics(values: list[float]) -> dict[str, float]:
        reduced = {"x:mean": sum(values) / len(values), "x:max": max(values), "x:min": min(values)} if values else {}
        return {"num_loss_tokens:sum": float(len(values)), "x:sum": sum(values), **reduced}

    whole = metrics([value for part in parts for value in part])
    assert combine_metrics(map(metrics, parts)) == pytest.approx(whole, abs=1e-9)


def test_what_is_not_a_number_does_not_hide_in_a_maximum() -> None:
    assert math.isnan(combine_metrics([{"x:max": 1.0}, {"x:max": math.nan}, {"x:max": 2.0}])["x:max"])
    assert math.isnan(combine_metrics([{"x:sum": math.inf}, {"x:sum": -math.inf}])["x:sum"])
