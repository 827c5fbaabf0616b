"""AdamW with hyperparameters per step; normalisation and clipping ride in the same pass over the gradients."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from gradwire.types import AdamParams
from torch import Tensor, nn


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    Attributes:
        applied: False where the gradients were NaN or infinite: nothing was changed.
        grad_norm: Global L2 norm of the gradients after division, before clipping.
    """

    applied: bool
    grad_norm: float


class AdamW:
    """torch.optim.AdamW, fused. State is float32 and made at the first step.

    Args:
        parameters: What it trains.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._optimizer = torch.optim.AdamW(list(parameters), fused=True)

    def step(self, params: AdamParams, *, divisor: float = 1.0) -> StepResult:
        """Divides the gradients, clips them, and applies them. Gradients are used up, not cleared.

        Args:
            params: Hyperparameters of this step.
            divisor: What the gradients are divided by first.
        """
        group = self._optimizer.param_groups[0]
        grads = [p.grad for p in group["params"] if p.grad is not None]
        grad_norm = float(torch.nn.utils.get_total_norm(grads)) / divisor
        if grad_norm != grad_norm or grad_norm == float("inf"):
            return StepResult(applied=False, grad_norm=grad_norm)
        group.update(
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            weight_decay=params.weight_decay,
        )
        # As torch.nn.utils.clip_grad_norm_, whose 1e-6 keeps a zero norm from dividing.
        shrink = min(1.0, params.grad_clip_norm / (grad_norm + 1e-6)) if params.grad_clip_norm > 0 else 1.0
        scale = divisor / shrink
        # The fused kernel divides by grad_scale as it reads each gradient, which is how torch.amp unscales too.
        self._optimizer.grad_scale = None if scale == 1.0 else _scalar(scale, grads[0])  # pyright: ignore[reportAttributeAccessIssue]
        try:
            self._optimizer.step()
        except BaseException:
            self._drop_half_made_state()
            raise
        return StepResult(applied=True, grad_norm=grad_norm)

    def state_of(self, parameter: nn.Parameter) -> Mapping[str, Tensor]:
        """Its "step" (float32 scalar), "exp_avg" and "exp_avg_sq" (float32, shaped as it); empty before its first."""
        return self._optimizer.state.get(parameter, {})

    def load_state_of(self, parameter: nn.Parameter, state: Mapping[str, Tensor]) -> None:
        """Takes over what state_of gave, on the parameter's device."""
        self._optimizer.state[parameter] = dict(state)

    def drop_state_of(self, parameter: nn.Parameter) -> None:
        """Forgets what state_of gives, to be loaded again before the parameter's next step."""
        self._optimizer.state.pop(parameter, None)

    def clear_state(self) -> None:
        """Starts afresh."""
        self._optimizer.state.clear()

    def _drop_half_made_state(self) -> None:
        """Memory may run out while state is made, before anything is updated; a later step then starts over."""
        for parameter, state in list(self._optimizer.state.items()):
            if not {"step", "exp_avg", "exp_avg_sq"} <= state.keys() or not state["step"].item():
                del self._optimizer.state[parameter]


def _scalar(value: float, like: Tensor) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=like.device)
