"""What a gated MLP makes of its two projections, act(gate) · up, as one autograd function.

Only the projections are held for backward, which both need anyway; act(gate) is computed again.

    dup = g · act(gate),  dgate = g · up · act'(gate)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer_service.engine.fused.module import fused_class, takes_one_tensor

_ACTIVATIONS = {"silu": {}, "gelu": {"approximate": "tanh"}}
"""Activations of torch's own, with their settings, whose derivative torch has as an operation."""
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def fused_gated_mlp(mlp: nn.Module) -> type[nn.Module] | None:
    """The class that makes a module compute in fewer operations what it computes already; None if it is no gated MLP.

    Args:
        mlp: Any module, in float32. Its numbers decide; that it has the projections only makes it worth a try.
    """
    children = dict(mlp.named_children())
    if not all(isinstance(children.get(name), nn.Linear) for name in _PROJECTIONS) or not takes_one_tensor(mlp):
        return None
    if len([*mlp.parameters()]) != sum(len([*children[name].parameters()]) for name in _PROJECTIONS):
        return None
    weight: Any = children["gate_proj"].weight
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(1, 4, weight.shape[1], generator=generator) * 2).to(weight.device, weight.dtype)
    try:
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            wanted = mlp(x)
            for activation in _ACTIVATIONS:
                found = _run(mlp, x, activation)
                if isinstance(wanted, Tensor) and wanted.shape == found.shape and _close(found, wanted):
                    return fused_class(type(mlp), activation, _forward(activation))
    except (TypeError, ValueError, RuntimeError):
        # Called with something else than hidden states, so something else than an MLP of them.
        return None
    return None


def _close(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).abs().max() <= 1e-5 * wanted.abs().max())


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
