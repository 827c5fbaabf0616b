"""Each loss is what its formula says: value and gradient against plain autograd over that formula, in float64.

The plain side knows nothing of tokens that do not count, of bounds on what autograd sees, or of packs.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradwire._wire.metrics import combine_metrics
from torch import Tensor

from tests.engines import RUN, make_engine
from tests.numerics.plain import (
    ROUNDING,
    Reference,
    load_plain,
    plain_logprobs,
    random_sequences,
    relative_error,
    to_batch,
)
from tests.tiny import VOCAB_SIZE
from trainer_service.engine.losses import LOSSES, find_loss
from trainer_service.engine.losses.loss import LossInputs, LossOutput

Plain = Callable[[Tensor, Mapping[str, Tensor], Mapping[str, float]], Tensor]
"""One datum's logprobs, its inputs, settings → its loss."""


def plain_clip(ratio: Tensor, advantages: Tensor, c: Mapping[str, float]) -> Tensor:
    clamped = ratio.clamp(c["clip_low_threshold"], c["clip_high_threshold"])
    return -torch.minimum(ratio * advantages, clamped * advantages).sum()


def plain_cispo(lp: Tensor, i: Mapping[str, Tensor], c: Mapping[str, float]) -> Tensor:
    clamped = (lp - i["logprobs"]).exp().clamp(c["clip_low_threshold"], c["clip_high_threshold"])
    return -(clamped.detach() * lp * i["advantages"]).sum()


def plain_gspo(lp: Tensor, i: Mapping[str, Tensor], c: Mapping[str, float]) -> Tensor:
    mask = i["sequence_ratio_mask"]
    mean = ((lp.detach() - i["logprobs"]) * mask).sum() / mask.sum()
    return plain_clip((mean + lp - lp.detach()).exp(), i["advantages"], c)


PLAIN: dict[str, tuple[Plain, dict[str, float]]] = {
    "cross_entropy": (lambda lp, i, c: -(lp * i["weights"]).sum(), {}),
    "importance_sampling": (lambda lp, i, c: -((lp - i["logprobs"]).exp() * i["advantages"]).sum(), {}),
    "ppo": (lambda lp, i, c: plain_clip((lp - i["logprobs"]).exp(), i["advantages"], c), {}),
    "cispo": (plain_cispo, {}),
    "dro": (
        lambda lp, i, c: -(lp * i["advantages"] - 0.5 * c["beta"] * (lp - i["logprobs"]) ** 2).sum(),
        {"beta": 0.3},
    ),
    "gspo": (plain_gspo, {"clip_low_threshold": 0.9, "clip_high_threshold": 1.15}),
}
DEFAULTS = {
    "ppo": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    "cispo": {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0},
}
names = pytest.mark.parametrize("name", list(PLAIN))


def make_inputs(logprobs_T: np.ndarray, lengths: tuple[int, ...], *, spread: float, seed: int = 0) -> dict[str, Any]:
    """Every loss's inputs: a sampler near the learner, advantages of both signs with zeros, a mask with a gap."""
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    mask = (rng.random(total) < 0.7).astype(np.float32)
    mask[np.cumsum([0, *lengths])[:-1]] = 1
    return {
        "weights": rng.normal(size=total).astype(np.float32),
        "logprobs": (logprobs_T + spread * rng.normal(size=total)).astype(np.float32),
        "advantages": (rng.normal(size=total) * (rng.random(total) < 0.8)).astype(np.float32),
        "sequence_ratio_mask": mask,
    }


def evaluate(
    name: str, logprobs_T: Tensor, inputs: Mapping[str, Any], lengths: tuple[int, ...], **c: float
) -> LossOutput:
    loss = find_loss(name)
    own = {key: torch.as_tensor(inputs[key]) for key in loss.inputs}
    cu_seqlens = torch.tensor(np.cumsum([0, *lengths]))
    return loss.fn(LossInputs(logprobs_T, own, cu_seqlens), loss.settings(c))


def plain_loss(
    name: str, logprobs_T: Tensor, inputs: Mapping[str, Any], lengths: tuple[int, ...], c: Mapping[str, float]
) -> Tensor:
    settings = {**DEFAULTS.get(name, {}), **c}
    bounds = pairwise(np.cumsum([0, *lengths]).tolist())
    values = [
        PLAIN[name][0](
            logprobs_T[start:stop],
            {key: torch.as_tensor(array[start:stop]).double() for key, array in inputs.items()},
            settings,
        )
        for start, stop in bounds
    ]
    return torch.stack(values).sum()


def term_error(logprobs: np.ndarray, inputs: Mapping[str, np.ndarray]) -> float:
    """Relative error of one token's term: exp makes the rounding of lp − q relative, beside its own and those of half a
    dozen products, differences and clips."""
    largest = np.abs(logprobs - inputs["logprobs"]).max() if "logprobs" in inputs else 0.0
    return (float(largest) + 8) * ROUNDING


def term_sizes(name: str, logprobs: np.ndarray, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Sizes of what each token's term is made of."""
    if name == "cross_entropy":
        return np.abs(inputs["weights"] * logprobs)
    difference = logprobs.astype(np.float64) - inputs["logprobs"]
    if name == "dro":
        return np.abs(inputs["advantages"] * logprobs) + difference**2
    # A clip takes a ratio to one of its bounds, which are near 1.
    ratio = np.maximum(np.exp(difference.max() if name == "gspo" else difference), 1.0)
    return np.abs(inputs["advantages"]) * ratio * (np.abs(logprobs) if name == "cispo" else 1.0)


def check_loss(name: str, found: float, wanted: float, logprobs: np.ndarray, inputs: Mapping[str, np.ndarray]) -> None:
    """Off by the terms' errors, and by those of adding them up, one rounding each."""
    error = len(logprobs) * ROUNDING + term_error(logprobs, inputs)
    assert abs(found - wanted) <= error * term_sizes(name, logprobs, inputs).sum()


def test_every_loss_has_its_formula_here() -> None:
    assert list(PLAIN) == list(LOSSES)


@names
@pytest.mark.parametrize("spread", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("lengths", [(7, 1, 12), (40,)])
def test_value_and_gradient_equal_plain_autograd(name: str, spread: float, lengths: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    logprobs = -rng.gamma(2.0, size=sum(lengths)).astype(np.float32)
    inputs = make_inputs(logprobs, lengths, spread=spread)
    ours = torch.tensor(logprobs, requires_grad=True)
    plain = torch.tensor(logprobs, dtype=torch.float64, requires_grad=True)
    output = evaluate(name, ours, inputs, lengths, **PLAIN[name][1])
    output.loss.backward()
    wanted = plain_loss(name, plain, inputs, lengths, PLAIN[name][1])
    wanted.backward()
    check_loss(name, output.loss.item(), wanted.item(), logprobs, inputs)
    assert ours.grad is not None
    assert plain.grad is not None
    # Nothing is added up here but gspo's mean, which is in float64.
    assert relative_error(ours.grad, plain.grad) < term_error(logprobs, inputs)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("ppo", {"clip_low_threshold": 0.99, "clip_high_threshold": 1.01}),
        ("cispo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}),
        ("gspo", {"clip_low_threshold": 0.5, "clip_high_threshold": 3.0}),
        ("dro", {"beta": 0.0}),
    ],
)
def test_settings_are_used(name: str, config: dict[str, float]) -> None:
    lengths = (9, 14)
    logprobs = -np.random.default_rng(2).gamma(2.0, size=23).astype(np.float32)
    inputs = make_inputs(logprobs, lengths, spread=0.5)
    found = evaluate(name, torch.tensor(logprobs), inputs, lengths, **config).loss.item()
    wanted = plain_loss(name, torch.tensor(logprobs).double(), inputs, lengths, config).item()
    other = plain_loss(name, torch.tensor(logprobs).double(), inputs, lengths, PLAIN[name][1]).item()
    check_loss(name, found, wanted, logprobs, inputs)
    assert found != pytest.approx(other, rel=1e-3)


def test_soft_targets_are_summed_over_both_dims() -> None:
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]], requires_grad=True)
    weights = torch.tensor([[0.25, 0.75], [0.0, -1.0]])
    output = evaluate("cross_entropy", logprobs, {"weights": weights}, (2,))
    output.loss.backward()
    assert output.loss.item() == 0.25 + 1.5 - 4.0
    assert output.num_loss_tokens.item() == 3
    np.testing.assert_array_equal(logprobs.grad, -weights)


@names
def test_through_the_engine_whole_or_in_pieces_equals_plain_autograd(
    name: str, tiny_llama: Path, tmp_path: Path
) -> None:
    lengths = (9, 1, 23, 16, 5)
    sequences = random_sequences(lengths, vocab_size=VOCAB_SIZE)
    model, config = load_plain(tiny_llama), PLAIN[name][1]
    sampled = torch.cat([plain_logprobs(model, sequence) for sequence in sequences]).detach().numpy()
    inputs = make_inputs(sampled.astype(np.float32), lengths, spread=0.3)
    batch = to_batch(sequences, with_weights=False)
    inputs = {key: inputs[key] for key in find_loss(name).inputs}
    batch = replace(batch, loss_fn_inputs={**batch.loss_fn_inputs, **inputs})

    def loss(logprobs: list[Tensor]) -> Tensor:
        return plain_loss(name, torch.cat(logprobs), dict(batch.loss_fn_inputs), lengths, config)

    wanted = Reference.of(lambda dtype: load_plain(tiny_llama, dtype=dtype), sequences, loss)
    engine = make_engine(tiny_llama, tmp_path)
    for cuts in ((0, 5), (0, 1, 3, 5)):
        found = [
            engine.forward_backward(RUN, number, batch.sequences(start, stop), find_loss(name), config)
            for number, (start, stop) in enumerate(pairwise(cuts), 1)
        ]
        logprobs = np.concatenate([piece.logprobs_TK for piece in found])
        wanted.check_logprobs(logprobs)
        wanted.check_gradients(engine.live_model(RUN).named_parameters())
        value = loss([torch.tensor(logprobs, dtype=torch.float64)]).item()
        check_loss(name, combine_metrics(piece.metrics for piece in found)["loss:sum"], value, logprobs, inputs)
        engine.zero_grad(RUN)


@pytest.mark.parametrize("name", ["importance_sampling", "ppo", "cispo", "dro", "gspo"])
def test_metrics_are_over_the_loss_tokens_however_the_batch_is_cut(name: str) -> None:
    lengths = (7, 2, 13)
    logprobs = -np.random.default_rng(3).gamma(2.0, size=22).astype(np.float32)
    inputs = make_inputs(logprobs, lengths, spread=0.4)
    inputs["advantages"][7:9] = 0  # A datum that does not count.
    config = PLAIN[name][1]
    counts = np.ones(22, dtype=bool) if name == "dro" else inputs["advantages"] != 0
    log_ratio = logprobs.astype(np.float64) - inputs["logprobs"]
    ratio = np.exp(log_ratio)
    if name == "gspo":
        for start, stop in pairwise(np.cumsum([0, *lengths])):
            mask = inputs["sequence_ratio_mask"][start:stop] == 1
            ratio[start:stop] = np.exp(log_ratio[start:stop][mask].mean())
    wanted = {
        "ratio:mean": ratio[counts].mean(),
        "ratio:max": ratio[counts].max(),
        "kl:mean": (np.exp(log_ratio) - 1 - log_ratio)[counts].mean(),
        "num_loss_tokens:sum": counts.sum(),
        "overflowed_tokens:sum": 0,
    }
    settings = {**DEFAULTS.get(name, {}), **config}
    if "clip_low_threshold" in settings:
        above, below = ratio > settings["clip_high_threshold"], ratio < settings["clip_low_threshold"]
        if name != "cispo":
            above, below = above & (inputs["advantages"] > 0), below & (inputs["advantages"] < 0)
        wanted["clipped_fraction:mean"] = (above | below)[counts].mean()

    def metrics(start: int, stop: int) -> dict[str, float]:
        lo, hi = sum(lengths[:start]), sum(lengths[:stop])
        own = {key: array[lo:hi] for key, array in inputs.items()}
        output = evaluate(name, torch.tensor(logprobs[lo:hi]), own, lengths[start:stop], **config)
        found = {**output.metrics, "num_loss_tokens:sum": output.num_loss_tokens}
        return {key: float(value) for key, value in found.items()}

    for cuts in ((0, 3), (0, 1, 3), (0, 1, 2, 3)):
        found = combine_metrics(metrics(*cut) for cut in pairwise(cuts))
        # All in float64, but for gspo's ratio and a fraction.
        assert found == pytest.approx(wanted, rel=16 * ROUNDING)
