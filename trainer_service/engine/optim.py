"""AdamW with hyperparameters per step; normalisation and clipping share its pass over the gradients.

A step is applied as a whole, with a finite result, or not at all.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from gradwire.types import AdamParams
from torch import Tensor, nn

from trainer_service.engine.parallel.gradient_sums import sum_gradients, total_norm
from trainer_service.engine.parallel.sharding import part
from trainer_service.engine.rank_channels import Ranks
from trainer_service.engine.step_bounds import Largest, StepBounds


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    Attributes:
        applied: False if the gradients or the result are NaN or infinite; then nothing was changed.
        grad_norm: Global L2 norm of the gradients after division, before clipping.
        overflowing: If finite gradients were not applied, a parameter that would have become NaN or infinite, or one
            of its moments.
    """

    applied: bool
    grad_norm: float
    overflowing: nn.Parameter | None = None


class AdamW:
    """torch.optim.AdamW, fused. Its state is float32 and created at the first step.

    Args:
        parameters: What it trains: parts of a sharded model, or what is the same on every rank.
        ranks: All of which take each step together.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], ranks: Ranks | None = None) -> None:
        self._ranks = ranks or Ranks()
        self._optimizer = torch.optim.AdamW(list(parameters), fused=True)
        self._bounds = StepBounds()

    def step(self, params: AdamParams, *, divisor: float = 1.0) -> StepResult:
        """Divides the gradients, clips them, and applies them. Leaves the gradients changed, not cleared.

        Args:
            params: Hyperparameters of this step.
            divisor: What the gradients are divided by first.
        """
        group = self._optimizer.param_groups[0]
        sum_gradients(group["params"], self._ranks)
        trained: list[nn.Parameter] = [p for p in group["params"] if p.grad is not None]
        grads = [p.grad for p in trained if p.grad is not None]
        grad_norm = total_norm(trained, self._ranks) / divisor
        if not math.isfinite(grad_norm):
            return StepResult(applied=False, grad_norm=grad_norm)
        group.update(
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            weight_decay=params.weight_decay,
        )
        # Like torch.nn.utils.clip_grad_norm_, whose 1e-6 avoids a division by zero.
        shrink = min(1.0, params.grad_clip_norm / (grad_norm + 1e-6)) if params.grad_clip_norm > 0 else 1.0
        scale = divisor / shrink
        # The fused kernel divides by grad_scale as it reads each gradient, as torch.amp does to unscale.
        self._optimizer.grad_scale = None if scale == 1.0 else _scalar(scale, grads[0])  # pyright: ignore[reportAttributeAccessIssue]
        if not self._bounds.admit(params, grad_norm * shrink, self._largest_anywhere):
            for parameter in trained:
                if any(self._ranks.execution.gather(self._overflows(parameter))):
                    return StepResult(applied=False, grad_norm=grad_norm, overflowing=parameter)
        try:
            self._optimizer.step()
        except BaseException:
            self._bounds.forget()
            self._drop_half_made_state()
            raise
        return StepResult(applied=True, grad_norm=grad_norm)

    def state_of(self, parameter: nn.Parameter) -> Mapping[str, Tensor]:
        """A parameter's "step" (float32 scalar), "exp_avg" and "exp_avg_sq" (float32, of its shape); empty before its
        first step."""
        return self._optimizer.state.get(parameter, {})

    def load_state_of(self, parameter: nn.Parameter, state: Mapping[str, Tensor]) -> None:
        """Restores what state_of returned, on the parameter's device."""
        self._bounds.forget()
        self._optimizer.state[parameter] = dict(state)

    def drop_state_of(self, parameter: nn.Parameter) -> None:
        """Forgets a parameter's state, which must be loaded again before its next step."""
        self._optimizer.state.pop(parameter, None)

    def clear_state(self) -> None:
        """Forgets all state. Must also be called when something else has changed the parameters."""
        self._bounds.forget()
        self._optimizer.state.clear()

    def _overflows(self, parameter: nn.Parameter) -> bool:
        """Whether the step would make a finite element, or a moment, NaN or infinite; tried on a copy."""
        before = part(parameter.detach())
        trial = nn.Parameter(before.clone())
        assert parameter.grad is not None
        trial.grad = part(parameter.grad).clone()
        group = self._optimizer.param_groups[0]
        optimizer = torch.optim.AdamW([trial], fused=True)
        optimizer.param_groups[0].update({name: value for name, value in group.items() if name != "params"})
        optimizer.grad_scale = self._optimizer.grad_scale  # pyright: ignore[reportAttributeAccessIssue]
        if state := self.state_of(parameter):
            optimizer.state[trial] = {name: part(tensor).clone() for name, tensor in state.items()}
        optimizer.step()
        moments = [optimizer.state[trial][name] for name in ("exp_avg", "exp_avg_sq")]
        # An infinite parameter may be intended, such as a bias that forbids a token.
        fine = [trial.detach().isfinite() | ~before.isfinite(), *(moment.isfinite() for moment in moments)]
        return not all(bool(each.all()) for each in fine)

    def _largest_anywhere(self) -> Largest:
        """Over all ranks."""
        own = self._largest()
        found = torch.tensor(self._ranks.execution.gather([own.parameter, own.exp_avg]))
        return Largest(*found.amax(0).tolist())

    @torch.no_grad()
    def _largest(self) -> Largest:
        """What the bounds start from; NaN if a moment is one that no step of Adam produces."""
        trained = [p for p in self._optimizer.param_groups[0]["params"] if part(p).numel()]
        parameter = _max(map(_absolute_max, trained))
        if not math.isfinite(parameter):
            parameter = _max(_absolute_max(part(p).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)) for p in trained)
        states = [state for p in trained if (state := self.state_of(p))]
        for state in states:
            low, high = torch.aminmax(part(state["exp_avg_sq"]))
            if not 0 <= low.item() <= high.item() < math.inf:
                return Largest(parameter, math.nan)
        return Largest(parameter, _max(_absolute_max(state["exp_avg"]) for state in states))

    def _drop_half_made_state(self) -> None:
        """Creates state before anything is updated: if memory runs out, a later step starts over."""
        for parameter, state in list(self._optimizer.state.items()):
            if not {"step", "exp_avg", "exp_avg_sq"} <= state.keys() or not state["step"].item():
                del self._optimizer.state[parameter]


def _absolute_max(tensor: Tensor) -> Tensor:
    """The largest absolute value; NaN if any is NaN."""
    low, high = torch.aminmax(part(tensor))
    return torch.maximum(-low, high)


def _max(scalars: Iterable[Tensor]) -> float:
    """The largest value; 0 if there is none, NaN if any is NaN."""
    found = list(scalars)
    return torch.stack(found).max().item() if found else 0.0


def _scalar(value: float, like: Tensor) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=like.device)
