"""The other side of every comparison: an ordinary PyTorch loop over a transformers model, sharing no code with ours.

How near is near enough follows from arithmetic, so that it holds on every processor. What float32 finds is off by its
roundings, which differ with the order of sums, and so from one library, instruction set or number of threads to
another. How far that is, plain float32 shows on the machine at hand: `Reference` measures it against float64. Roundings
add up as a random walk does, as the root of their number; the engine, which packs, chunks and recomputes, may make
FACTOR² as many as plain transformers. A formula that is wrong is off by orders of magnitude.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gradwire._wire.codec import Batch
from transformers import AutoModelForCausalLM, PreTrainedModel

FACTOR = 4.0
"""How many times as far from float64 as plain float32 the engine may be."""
ROUNDING = 2.0**-24
"""Relative error of one rounding to float32."""
PlainLoss = Callable[[list[torch.Tensor]], torch.Tensor]
"""A loss: logprobs of each sequence → scalar."""


@dataclass(frozen=True)
class PlainSequence:
    """One sequence: tokens [N], targets and weights [N] or [N, K]."""

    tokens: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]


def load_plain(folder: Path, device: str = "cpu", *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model as any script would load it."""
    # Experts one after the other: torch multiplies them together in no other dtype than float32 and below.
    experts = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **experts)
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
    # Without a cache: RWKV changes the one it makes, which its backward would need.
    logits = model(input_ids=torch.tensor(sequence.tokens, device=device)[None], use_cache=False).logits[0]
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
) -> tuple[float, npt.NDArray[np.float64]]:
    """One loss over all sequences, one backward. Returns the loss and all logprobs end to end."""
    logprobs = [plain_logprobs(model, sequence) for sequence in sequences]
    value = loss(logprobs)
    value.backward()
    return value.item(), torch.cat(logprobs).detach().cpu().numpy()


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """‖got − wanted‖ / ‖wanted‖ in float64; 0 where both are zero."""
    difference = (got.double() - wanted.double()).norm().item()
    return difference / wanted.double().norm().item() if difference else 0.0


def worst_error(got: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> float:
    """Largest relative error over all tensors, each by itself."""
    assert got.keys() == wanted.keys()
    return max(relative_error(got[name], wanted[name]) for name in wanted)


def gradients_of(parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> dict[str, torch.Tensor]:
    """Gradients by name, of what trains and was used."""
    return {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}


@dataclass(frozen=True)
class Reference:
    """What float64 finds, and how far plain float32 is from it on this machine.

    Attributes:
        logprobs: Of all sequences end to end, float64.
        gradients: By name, float64 rounded to float32.
        logprobs_error: Largest error of plain float32's logprobs.
        gradient_error: Largest relative error of one of its gradients.
    """

    logprobs: npt.NDArray[np.float64]
    gradients: Mapping[str, torch.Tensor]
    logprobs_error: float
    gradient_error: float

    @classmethod
    def of(cls, load: Callable[[torch.dtype], Any], sequences: Sequence[PlainSequence], loss: PlainLoss) -> "Reference":
        """Args: load, the plain model in a dtype; then as plain_backward."""
        exact = load(torch.float64)
        # Constants of a model are made in it, of which float64's lowest number is one.
        torch.set_default_dtype(torch.float64)
        try:
            _, logprobs = plain_backward(exact, sequences, loss)
        finally:
            torch.set_default_dtype(torch.float32)
        # Half the memory, for a rounding that is nothing beside float32's errors.
        wanted = {name: gradient.float() for name, gradient in gradients_of(exact.named_parameters()).items()}
        del exact
        plain = load(torch.float32)
        _, found = plain_backward(plain, sequences, loss)
        # Its log_softmax is float64's here; what float32 would at least add is the rounding of its result.
        rounding = ROUNDING * float(np.abs(logprobs).max())
        return cls(
            logprobs,
            wanted,
            logprobs_error=float(np.abs(found - logprobs).max()) + rounding,
            gradient_error=worst_error(gradients_of(plain.named_parameters()), wanted),
        )

    def check_logprobs(self, found: npt.NDArray[np.float32]) -> None:
        """Logprobs are as near to float64 as float32 allows."""
        np.testing.assert_allclose(found, self.logprobs, rtol=0, atol=FACTOR * self.logprobs_error)

    def check_gradients(self, parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
        """Gradients are float32, and as near to float64 as float32 allows."""
        found = gradients_of(parameters)
        assert {gradient.dtype for gradient in found.values()} == {torch.float32}
        assert worst_error(found, self.gradients) <= FACTOR * self.gradient_error


def check_sum(found: float, terms: npt.NDArray[Any]) -> None:
    """A float32 sum is off by at most its number of additions, each rounded, of the size of what is added up."""
    terms = np.asarray(terms, dtype=np.float64).ravel()
    assert abs(found - terms.sum()) <= (len(terms) + 2) * ROUNDING * np.abs(terms).sum()
