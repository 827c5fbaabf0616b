"""A linear layer with an adapter: peft's, computed in one piece.

One autograd function a layer adds the low-rank part into the base layer's output, and makes no further tensors of that
size.

Shape suffixes: T tokens, I and O a layer's inputs and outputs, R the LoRA rank.
"""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from trainer_service.engine import products
from trainer_service.engine.device import computed_in

ADAPTER = "default"
"""What peft calls the one adapter of a model."""


class FusedLoraLinear(PeftLinear):
    """peft's layer with one autograd function for all of it."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[…, I] → […, O]."""
        base: Any = self.base_layer
        if self.disable_adapters or self.merged or self.lora_variant or args or kwargs or self.training:
            return super().forward(x, *args, **kwargs)
        a_RI, b_OR = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        product = _LoraLinear.apply(x, base, a_RI, b_OR, self.scaling[ADAPTER])
        assert isinstance(product, Tensor)
        return product


class _LoraLinear(torch.autograd.Function):
    """x · Wᵀ + bias + scale · (x · Aᵀ) · Bᵀ, W and bias without gradients.

    The layer is asked for its weight in either direction: one that keeps it in fewer bits makes it whole for a product.
    Thin products are made as [R, …], which on a CPU takes a third of the time of […, R].
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, layer: nn.Linear, a_RI: Tensor, b_OR: Tensor, scale: float
    ) -> Tensor:
        dtype = computed_in(x)
        with _without_autocast(x.device.type):
            x_TI = x.reshape(-1, x.shape[-1]).to(dtype)
            weight_OI, bias_O = layer.weight.to(dtype), layer.bias
            ctx.served = products.serves(x_TI, weight_OI)
            low_RT = products.product(a_RI.to(dtype), x_TI.T, served=ctx.served).mul_(scale)
            product = products.linear(x_TI.view(x.shape), weight_OI, None if bias_O is None else bias_O.to(dtype))
            product.view(-1, len(weight_OI)).addmm_(low_RT.T, b_OR.to(dtype).T)
        ctx.save_for_backward(x_TI, low_RT, a_RI, b_OR)
        ctx.layer, ctx.scale, ctx.shape, ctx.x_dtype = layer, scale, x.shape, x.dtype
        return product

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_TI, low_RT, a_RI, b_OR = ctx.saved_tensors
        dtype, product = x_TI.dtype, functools.partial(products.product, served=ctx.served)
        with _without_autocast(grad.device.type):
            grad_TO = grad.reshape(-1, grad.shape[-1]).to(dtype)
            grad_low_RT = product(b_OR.to(dtype).T, grad_TO.T).mul_(ctx.scale)
            grad_b_OR = product(low_RT, grad_TO).T.to(b_OR.dtype).contiguous() if ctx.needs_input_grad[3] else None
            grad_a_RI = product(grad_low_RT, x_TI).to(a_RI.dtype) if ctx.needs_input_grad[2] else None
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x_TI = products.input_gradient(grad_TO, ctx.layer.weight.to(dtype))
                grad_x = grad_x_TI.addmm_(grad_low_RT.T, a_RI.to(dtype)).to(ctx.x_dtype).view(ctx.shape)
        return grad_x, None, grad_a_RI, grad_b_OR, None


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Switches autocast off. Entering torch.autocast takes tens of microseconds, so only where it is on."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()
