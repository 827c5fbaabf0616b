"""The other side of every comparison: an ordinary PyTorch loop over a transformers model, sharing no code with ours."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gradwire.codec import Batch
from transformers import AutoModelForCausalLM, PreTrainedModel

PlainLoss = Callable[[list[torch.Tensor]], torch.Tensor]
"""Logprobs of each sequence → scalar."""


@dataclass(frozen=True)
class PlainSequence:
    """One sequence: tokens [N], targets and weights [N] or [N, K]."""

    tokens: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]


def load_plain(folder: Path, device: str = "cpu", *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model as any script would load it.

    In float64 it measures what float32 cannot: on the CPU plain float32 gradients of SmolLM2 are themselves 2e-4 off,
    where the engine's are 2e-5.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval().to(device)


def random_sequences(
    lengths: Sequence[int], *, vocab_size: int, k: int | None = None, seed: int = 0
) -> list[PlainSequence]:
    """Random tokens; weights positive, negative and zero."""
    rng = np.random.default_rng(seed)
    shapes = [(length,) if k is None else (length, k) for length in lengths]
    return [
        PlainSequence(
            tokens=rng.integers(0, vocab_size, size=shape[0]),
            targets=rng.integers(0, vocab_size, size=shape),
            weights=(rng.normal(size=shape) * (rng.random(shape) < 0.7)).astype(np.float32),
        )
        for shape in shapes
    ]


def text_sequences(tokens: Sequence[Sequence[int]], *, k: int | None = None, seed: int = 0) -> list[PlainSequence]:
    """Real text, each token predicting the next; with k, its k successors share the weight. Weights are from 0 to 1.

    A trained model's gradients for random tokens are small sums of large terms, which float32 cannot tell apart from
    rounding; for text they are well conditioned.
    """
    rng = np.random.default_rng(seed)
    made = []
    for ids in tokens:
        rows = np.stack([np.roll(ids, -shift) for shift in range(1, (k or 1) + 1)], axis=-1)[:-1]
        targets = rows if k else rows[:, 0]
        weights = rng.random(targets.shape) * (rng.random(targets.shape) < 0.8)
        made.append(PlainSequence(np.asarray(ids[:-1]), targets, weights.astype(np.float32)))
    return made


def to_batch(sequences: Sequence[PlainSequence], *, with_weights: bool = True) -> Batch:
    """The same sequences as the engine takes them."""
    inputs: dict[str, npt.NDArray[Any]] = {"target_tokens": np.concatenate([s.targets for s in sequences])}
    if with_weights:
        inputs["weights"] = np.concatenate([s.weights for s in sequences])
    return Batch(
        tokens_T=np.concatenate([s.tokens for s in sequences]).astype(np.int32),
        cu_seqlens=np.cumsum([0, *(len(s.tokens) for s in sequences)]).astype(np.int64),
        loss_fn_inputs=inputs,
    )


def plain_logprobs(model: PreTrainedModel, sequence: PlainSequence) -> torch.Tensor:
    """log_softmax over the whole vocabulary, then a gather: the textbook way.

    In float64, since torch's float32 log_softmax on the CPU is itself off by 1e-5 at a vocabulary of 49,152.
    """
    device = model.device
    logits = model(input_ids=torch.tensor(sequence.tokens, device=device)[None]).logits[0]
    targets = torch.tensor(sequence.targets, device=device)
    columns = targets if targets.ndim == 2 else targets[:, None]
    return torch.log_softmax(logits.double(), dim=-1).gather(-1, columns).view(targets.shape)


def cross_entropy_of(sequences: Sequence[PlainSequence]) -> PlainLoss:
    """−Σ weight · logprob."""

    def loss(logprobs: list[torch.Tensor]) -> torch.Tensor:
        return -sum(
            ((lp * torch.tensor(s.weights, device=lp.device)).sum() for lp, s in zip(logprobs, sequences, strict=True)),
            start=torch.zeros((), device=logprobs[0].device),
        )

    return loss


def plain_backward(
    model: PreTrainedModel, sequences: Sequence[PlainSequence], loss: PlainLoss
) -> tuple[float, npt.NDArray[np.float32]]:
    """One loss over all sequences, one backward. Returns the loss and all logprobs end to end."""
    logprobs = [plain_logprobs(model, sequence) for sequence in sequences]
    value = loss(logprobs)
    value.backward()
    return value.item(), torch.cat(logprobs).detach().float().cpu().numpy()


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """‖got − wanted‖ / ‖wanted‖ in float64; 0 where both are zero."""
    difference = (got.double() - wanted.double()).norm().item()
    return difference / wanted.double().norm().item() if difference else 0.0


def worst_gradient_error(got: PreTrainedModel, wanted: PreTrainedModel) -> float:
    """Largest relative error over all parameters' gradients, each by itself."""
    pairs = zip(got.named_parameters(), wanted.named_parameters(), strict=True)
    worst = 0.0
    for (name, ours), (plain_name, plain) in pairs:
        assert name == plain_name
        assert ours.grad is not None, name
        assert plain.grad is not None, name
        assert ours.grad.dtype == torch.float32
        worst = max(worst, relative_error(ours.grad, plain.grad))
    return worst
