"""RMSNorm as one autograd function: its input and a number a token are held, in place of three tensors.

    y = x · r · w,  r = 1 / √(mean(x²) + eps),  w the weight, or 1 + weight

    dw = Σ_t g · x · r,  dx = r · (g · w − x · r · mean(g · w · x · r))

Shape suffixes: T tokens, D size of what is normalised.
"""

from typing import Any

import torch
from torch import Tensor, nn

from trainer_service.engine.fused.module import alike, fused_class, takes_one_tensor, with_parts

_EPS = ("variance_epsilon", "eps")
"""What modules call the eps."""


def fused_norm(norm: nn.Module) -> type[nn.Module] | None:
    """The class that makes a module compute in one function what it computes already; None if it is no RMSNorm.

    Args:
        norm: Any module. What a copy of it computes on the CPU decides, not its name.
    """
    weight: Any = getattr(norm, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 1 or len([*norm.parameters()]) != 1:
        return None
    if _eps_of(norm) is None or not takes_one_tensor(norm):
        return None
    for offset in (0.0, 1.0):
        if _computes_the_same(norm, weight, offset):
            return _subclass(type(norm), offset)
    return None


def _eps_of(norm: nn.Module) -> float | None:
    found = [value for name in _EPS if isinstance(value := getattr(norm, name, None), float)]
    return found[0] if len(found) == 1 else None


def _computes_the_same(norm: nn.Module, weight: Tensor, offset: float) -> bool:
    """Tries it on ordinary inputs, and on ones so small that eps decides."""
    eps = _eps_of(norm)
    assert eps is not None
    size = len(weight)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, size, generator=generator)
    x[0, 2:] *= eps**0.5
    # Weights as they start, all zeros or ones, would not tell one formula from another.
    drawn = nn.Parameter(torch.rand(size, generator=generator) + 0.5)
    trial: Any = with_parts(norm, _parameters={**norm._parameters, "weight": drawn})
    try:
        with torch.no_grad():
            wanted, found = trial(x), _RmsNorm.apply(x, drawn, eps, offset)
    except (TypeError, ValueError, RuntimeError):
        # Called with something else than hidden states, so something else than a norm of them.
        return False
    return alike(found, wanted)


def _subclass(plain: type[nn.Module], offset: float) -> type[nn.Module]:
    def forward(self: Any, hidden_states: Tensor) -> Any:
        # In half precision architectures round at different places.
        if hidden_states.dtype != torch.float32 or self.weight.dtype != torch.float32:
            return plain.forward(self, hidden_states)
        return _RmsNorm.apply(hidden_states, self.weight, _eps_of(self), offset)

    return fused_class(plain, offset, forward)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float, offset: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scales = norms.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, scales)
        ctx.offset = offset
        return (x * scales).mul_(weight_D + offset if offset else weight_D)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight_D, scales = ctx.saved_tensors
        factor_D = weight_D + ctx.offset if ctx.offset else weight_D
        normed = x * scales
        product_TD = (grad * normed).reshape(-1, len(weight_D))
        grad_weight_D = product_TD.sum(0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_weight_D, None, None
        means = (product_TD @ factor_D).div_(len(weight_D)).view(scales.shape)
        grad_x = (grad * factor_D).addcmul_(normed, means, value=-1.0).mul_(scales)
        return grad_x, grad_weight_D, None, None
