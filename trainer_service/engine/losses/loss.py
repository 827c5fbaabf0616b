"""What a built-in loss is. torch is imported for types only, so that validation can read this without it.

Shape suffixes: T tokens of one microbatch, K soft targets a token (absent where targets are [T]).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LossInputs:
    """What a loss sees of one microbatch.

    Attributes:
        target_logprobs_TK: Natural-log probabilities of the targets, float32 with grad, [T] or [T, K].
        inputs: The loss's own per-token inputs by name, float32, each shaped as the targets.
    """

    target_logprobs_TK: "Tensor"
    inputs: "Mapping[str, Tensor]"


@dataclass(frozen=True)
class LossOutput:
    """What a loss found in one microbatch.

    Attributes:
        loss: Sum over tokens, nats: a float32 scalar with grad.
        num_loss_tokens: Number of targets that count, an int64 scalar.
        metrics: Further scalars by `name:sum`; only sums, so that microbatches add up.
    """

    loss: "Tensor"
    num_loss_tokens: "Tensor"
    metrics: "Mapping[str, Tensor]" = field(default_factory=dict)


@dataclass(frozen=True)
class Loss:
    """One built-in loss.

    Attributes:
        name: As loss_fn takes it.
        inputs: Names of the per-token inputs it needs beside target_tokens, each float32 and shaped as the targets.
        config_keys: Keys of loss_fn_config it knows.
        fn: (inputs, config) → output; pure.
    """

    name: str
    inputs: tuple[str, ...]
    config_keys: tuple[str, ...]
    fn: Callable[[LossInputs, Mapping[str, float]], LossOutput]
