"""Rotary positions as one autograd function, which holds nothing of its own for backward.

    y₁ = x₁ · c₁ − x₂ · s₁,  y₂ = x₂ · c₂ + x₁ · s₂

with x₁ and x₂ the halves of a head. Its derivative is a rotation too.

transformers has a function for it in each architecture's file, which its attention calls by its global name. A fused
attention has the forward of its own class, in which that name means ours: for what it was found to compute the same of,
and for everything else the architecture's.

Shape suffixes: H heads, T tokens, D head size.
"""

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from trainer_service.engine.fused.module import alike, fused_class

_NAME = "apply_rotary_pos_emb"
Rotate = Callable[..., tuple[Tensor, Tensor]]


def fused_rotation(attention: nn.Module) -> type[nn.Module] | None:
    """The class that makes a module rotate in one function where it does so in many; None if it does not rotate so."""
    forward = type(attention).forward
    if not isinstance(forward, FunctionType) or _NAME not in forward.__code__.co_names:
        return None
    plain = forward.__globals__.get(_NAME)
    if plain is None or list(inspect.signature(plain).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return None
    if not _rotates_halves(plain, torch.float32):
        return None
    names = {**forward.__globals__, _NAME: _Rotation(plain, mixed=_rotates_halves(plain, torch.bfloat16))}
    fused = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    fused.__kwdefaults__ = forward.__kwdefaults__
    return fused_class(type(attention), _NAME, fused)


class _Rotation:
    """What the name means there.

    Args:
        plain: The architecture's own.
        mixed: Whether it makes float32 of heads in bfloat16 and positions in float32, as under autocast.
    """

    def __init__(self, plain: Rotate, *, mixed: bool) -> None:
        self._plain = plain
        self._mixed = mixed

    def __call__(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """[1, H, T, D] each, cos and sin [1, T, D]; anything else goes to the architecture's own."""
        fits = not (args or kwargs) and cos.ndim == 3 and not (cos.requires_grad or sin.requires_grad)
        if fits and all(self._serves(x, cos) for x in (q, k)):
            return _rotate(q, cos, sin), _rotate(k, cos, sin)
        return self._plain(q, k, cos, sin, *args, **kwargs)

    def _serves(self, x: Tensor, cos: Tensor) -> bool:
        mixed = self._mixed and (x.dtype, cos.dtype) == (torch.bfloat16, torch.float32)
        return x.ndim == 4 and x.shape[-2:] == cos.shape[-2:] and (x.dtype == cos.dtype or mixed)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated = _Rotate.apply(x, cos[:, None], sin[:, None])
    assert isinstance(rotated, Tensor)
    return rotated


def _rotates_halves(plain: Rotate, dtype: torch.dtype) -> bool:
    """Whether it does with heads of that dtype and positions in float32."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 5, 8, generator=generator).to(dtype) for heads in (4, 2))
    # Halves of cos and sin differ, unlike any model's, so that no other order of them gives the same.
    cos, sin = (torch.randn(1, 5, 8, generator=generator) for _ in range(2))
    try:
        with torch.no_grad():
            wanted = plain(q, k, cos, sin)
            return all(alike(_rotate(x, cos, sin), y) for x, y in zip((q, k), wanted, strict=True))
    except (TypeError, ValueError, RuntimeError, IndexError):
        # It takes something else.
        return False


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        x = x.to(cos.dtype)
        half = x.shape[-1] // 2
        rotated = x * cos
        rotated[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1.0)
        rotated[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return rotated

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = ctx.saved_tensors
        half = grad.shape[-1] // 2
        grad_x = grad * cos
        grad_x[..., :half].addcmul_(grad[..., half:], sin[..., half:])
        grad_x[..., half:].addcmul_(grad[..., :half], sin[..., :half], value=-1.0)
        return grad_x.to(ctx.dtype), None, None
