"""What a loop chooses: hyperparameters of steps, adapters and samples."""

from collections.abc import Sequence
from dataclasses import dataclass

from gradwire._wire.arguments import check_flag, check_number, check_whole_number

MAX_LORA_RANK = 2**32 - 1
"""Largest rank the wire carries; a model takes ranks up to its hidden size."""
MAX_SEED = 2**64 - 1
"""Largest seed."""


@dataclass(frozen=True)
class AdamParams:
    """Hyperparameters of one optim_step, as torch.optim.AdamW takes them; each a number that float32 holds.

    Raises:
        InvalidArgumentError: One is not a number, or out of range.
    """

    learning_rate: float = 1e-4
    """At least 0."""
    beta1: float = 0.9
    """In [0, 1)."""
    beta2: float = 0.95
    """In [0, 1)."""
    eps: float = 1e-12
    """Above 0."""
    weight_decay: float = 0.0
    """At least 0."""
    grad_clip_norm: float = 0.0
    """Gradients are scaled so that their global L2 norm is at most this; 0 is off."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "weight_decay", "grad_clip_norm"):
            self._check(name, at_least=0)
        for name in ("beta1", "beta2"):
            self._check(name, at_least=0, below=1)
        self._check("eps", above=0)

    def _check(self, name: str, **bounds: float) -> None:
        object.__setattr__(self, name, check_number(name, getattr(self, name), **bounds))


@dataclass(frozen=True)
class LoraConfig:
    """Settings of a LoRA run, as create_lora_training_client(**vars(config)) takes them.

    Raises:
        InvalidArgumentError: One is of another type, or out of range.
    """

    rank: int = 32
    """Rank of the adapter's matrices."""
    seed: int | None = None
    """Seed of the adapter's first matrices; None is 0."""
    train_unembed: bool = True
    """Adapt the head, the layer that makes logits."""
    train_mlp: bool = True
    """Adapt the feed-forward layers."""
    train_attn: bool = True
    """Adapt the attention layers."""

    def __post_init__(self) -> None:
        check_whole_number("rank", self.rank, at_least=1, at_most=MAX_LORA_RANK)
        if self.seed is not None:
            check_whole_number("seed", self.seed, at_least=0, at_most=MAX_SEED)
        for name in ("train_unembed", "train_mlp", "train_attn"):
            check_flag(name, getattr(self, name))


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen: first temperature, then top_k, then top_p."""

    max_tokens: int | None = None
    """Most tokens in a sample; None takes as many as fit the context."""
    seed: int | None = None
    """The same seed makes the same choices, whatever else the trainer does; None takes a new one each time."""
    stop: str | Sequence[str] | Sequence[int] | None = None
    """Texts, or token ids, that end a sample and are part of it. None: the model's own end-of-sequence tokens; given,
    those no longer count, and an empty list stops at nothing."""
    temperature: float = 1.0
    """Logits are divided by it; 0 takes the likeliest token."""
    top_k: int = -1
    """Tokens are chosen among this many likeliest ones; -1 or 0 is off."""
    top_p: float = 1.0
    """Tokens are chosen among the fewest likeliest ones whose probabilities reach this sum; 1 is off."""
