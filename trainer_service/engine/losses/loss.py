"""What a built-in loss is. torch is imported for types only, so that validation can read this without it.

Shape suffixes: T targets of one microbatch, K soft targets a token (absent where targets are [T]), N datums.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gradwire._wire.codec import Batch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LossInputs:
    """What a loss sees of one microbatch. A datum is never split across microbatches.

    Attributes:
        target_logprobs_TK: Natural-log probabilities of the targets, float32 with grad, [T] or [T, K].
        inputs: The loss's own per-token inputs by name, float32, each shaped as the targets.
        cu_seqlens: Where datums begin and end among the T, int64 [N + 1], on the same device.
    """

    target_logprobs_TK: "Tensor"
    inputs: "Mapping[str, Tensor]"
    cu_seqlens: "Tensor"


@dataclass(frozen=True)
class LossOutput:
    """What a loss found in one microbatch.

    Attributes:
        loss: Sum over tokens, nats: a float32 scalar with grad.
        num_loss_tokens: Number of targets that count, an int64 scalar.
        metrics: Further scalars by `name:reduction`. `name:sum` adds up over microbatches, `name:max` and `name:min`
            are over the loss tokens, and `name:mean` is the mean over the loss tokens, which is why means combine
            weighted by num_loss_tokens. Without a loss token only sums count.
    """

    loss: "Tensor"
    num_loss_tokens: "Tensor"
    metrics: "Mapping[str, Tensor]" = field(default_factory=dict)


@dataclass(frozen=True)
class Loss:
    """One loss that the trainer evaluates itself.

    Attributes:
        name: As loss_fn takes it.
        inputs: Names of the per-token inputs it needs beside target_tokens, each float32 and shaped as the targets.
        fn: (inputs, config) → output; pure. config has every key of `config`.
        config: Keys of loss_fn_config to their defaults; None where the caller must say.
        soft_targets: Whether it takes K targets a token beside one.
        check_config: Raises InvalidArgumentError where settings contradict each other.
        check_inputs: Raises InvalidArgumentError where inputs, all finite, do not make sense, naming the place by
            Batch.input_path: a batch may be a piece of the caller's. numpy only.
    """

    name: str
    inputs: tuple[str, ...]
    fn: Callable[[LossInputs, Mapping[str, float]], LossOutput]
    config: Mapping[str, float | None] = field(default_factory=dict)
    soft_targets: bool = False
    check_config: Callable[[Mapping[str, float]], None] = lambda config: None
    check_inputs: Callable[[Batch], None] = lambda batch: None

    def settings(self, config: Mapping[str, float] | None) -> dict[str, float]:
        """`config`, which was checked, with defaults for what it leaves out."""
        defaults = {key: value for key, value in self.config.items() if value is not None}
        return defaults | dict(config or {})
