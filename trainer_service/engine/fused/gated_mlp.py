"""What a gated MLP makes of its two projections, act(gate) · up, as one autograd function.

Only the projections are held for backward, which both need anyway; act(gate) is computed again.

    dup = g · act(gate),  dgate = g · up · act'(gate)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer_service.engine.fused.module import alike, fused_class, takes_one_tensor, with_parts

_ACTIVATIONS = {"silu": {}, "gelu": {"approximate": "tanh"}}
"""Activations of torch's own, with their settings, whose derivative torch has as an operation."""
_TRIAL_SIZE = 8
"""Inputs, hidden and outputs of the MLP that is tried."""
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def fused_gated_mlp(mlp: nn.Module) -> type[nn.Module] | None:
    """The class that makes a module compute in fewer operations what it computes already; None if it is no gated MLP.

    Args:
        mlp: Any module. What a copy of it with small projections computes decides; that it has them makes it worth a
            try.
    """
    children = dict(mlp.named_children())
    if not all(isinstance(children.get(name), nn.Linear) for name in _PROJECTIONS) or not takes_one_tensor(mlp):
        return None
    if len([*mlp.parameters()]) != sum(len([*children[name].parameters()]) for name in _PROJECTIONS):
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, _TRIAL_SIZE, generator=generator) * 2
    small = {name: _drawn(generator) for name in _PROJECTIONS}
    trial: Any = with_parts(mlp, _modules={**mlp._modules, **small})
    try:
        with torch.no_grad():
            wanted = trial(x)
            for activation in _ACTIVATIONS:
                if alike(_run(trial, x, activation), wanted):
                    return fused_class(type(mlp), activation, _forward(activation))
    except (TypeError, ValueError, RuntimeError):
        # Called with something else than hidden states, so something else than an MLP of them.
        return None
    return None


def _drawn(generator: torch.Generator) -> nn.Module:
    # Without its own initialisation, which draws from the generator that everybody shares.
    linear = nn.utils.skip_init(nn.Linear, _TRIAL_SIZE, _TRIAL_SIZE)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return linear


def _forward(activation: str) -> Callable[[Any, Tensor], Tensor]:
    return lambda mlp, x: _run(mlp, x, activation)


def _run(mlp: Any, x: Tensor, activation: str) -> Tensor:
    gated = _Gated.apply(mlp.gate_proj(x), mlp.up_proj(x), activation)
    found: Tensor = mlp.down_proj(gated)
    return found


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return getattr(F, activation)(gate, **_ACTIVATIONS[activation]).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = ctx.saved_tensors
        settings = _ACTIVATIONS[ctx.activation]
        grad_up = getattr(F, ctx.activation)(gate, **settings).mul_(grad)
        derivative = getattr(torch.ops.aten, f"{ctx.activation}_backward")
        product = grad * up
        # In the place of its own input: an operation on each element by itself.
        grad_gate = derivative.grad_input(product, gate, **settings, grad_input=product)
        return grad_gate, grad_up, None


def gated_halves(both: Tensor) -> Tensor:
    """silu(gate) · up, [..., I], of a gate and what it lets through side by side, [..., 2 I]."""
    found: Any = _GatedHalves.apply(both)
    return found


class _GatedHalves(torch.autograd.Function):
    """As _Gated, with both gradients in one tensor."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, dim=-1)
        grad_both = torch.empty_like(both)
        grad_gate, grad_up = grad_both.chunk(2, dim=-1)
        torch.ops.aten.silu.out(gate, out=grad_up).mul_(grad)
        torch.mul(grad, up, out=grad_gate)
        # In the place of its own input: an operation on each element by itself.
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return grad_both
