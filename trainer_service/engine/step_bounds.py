"""Whether an AdamW step can leave float32, known before it is taken.

Checking every parameter after every step would read all of them once more, and undoing a step would need a copy. But no
element of exp_avg is larger than M, the largest gradient norm so far (or 1: a norm is a root of squares, which float32
loses when they are small), so no step moves a parameter by more than

    learning_rate / (1 - beta1) * M * max(1, 1 / eps)

whatever exp_avg_sq is: 1 - beta1 is the smallest of Adam's corrections, and eps the least it divides by. Two numbers
carried from step to step thus bound all parameters. The bound is loose, by ten or more orders of magnitude, but
float32 has 38 of them: sensible training never reaches it, and anything else is checked exactly.
"""

from collections.abc import Callable
from dataclasses import dataclass

from gradwire._wire.arguments import FLOAT32_MAX
from gradwire.types import AdamParams

_LIMIT = FLOAT32_MAX / 4
"""Margin for rounding."""


@dataclass(frozen=True)
class Largest:
    """Bounds of what a step works on; infinite or NaN if no step should work on it.

    Attributes:
        parameter: Bound of the absolute values of all finite parameters.
        exp_avg: Bound of the absolute values of AdamW's first moments.
    """

    parameter: float
    exp_avg: float


class StepBounds:
    """Bounds of one optimizer's parameters and moments."""

    def __init__(self) -> None:
        self._known: Largest | None = None

    def forget(self) -> None:
        """Forgets the bounds, because something other than a step has changed parameters or moments."""
        self._known = None

    def admit(self, params: AdamParams, grad_norm: float, measure: Callable[[], Largest]) -> bool:
        """Whether a step certainly leaves everything finite; if so, counts it as taken.

        Args:
            params: The step's hyperparameters.
            grad_norm: Global L2 norm of the gradients it applies.
            measure: Reads all parameters and moments, if the known bounds are not enough.
        """
        after = None if self._known is None else _after(self._known, params, grad_norm)
        if after is None:
            after = _after(measure(), params, grad_norm)
        self._known = after
        return after is not None


def _after(before: Largest, params: AdamParams, grad_norm: float) -> Largest | None:
    """Bounds after a step; None if they are not finite."""
    # Both at least 1: what multiplies them must itself be finite, or a zero would become NaN.
    exp_avg = max(before.exp_avg, grad_norm, 1.0)
    update = params.learning_rate / (1 - params.beta1) * exp_avg * max(1.0, 1 / params.eps)
    kept = max(1.0, abs(1 - params.learning_rate * params.weight_decay))
    after = Largest(max(before.parameter, 1.0) * kept + update, exp_avg)
    # exp_avg_sq is bounded by the squared norm. A comparison with NaN is false.
    return after if after.parameter < _LIMIT and exp_avg * exp_avg < _LIMIT else None
