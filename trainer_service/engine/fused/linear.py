"""Linear layers whose products are made as products.py chooses, and whose weight's gradient is added where it is made.

torch makes a gradient of the whole weight for each forward, and then adds it to the one that is there. FSDP, which sums
gradients as they are made, must see them: of a model in parts they stay torch's to add.
"""

from typing import Any

import torch
from torch import Tensor, nn

from trainer_service.engine import products
from trainer_service.engine.fused.module import Fused


def fused_linear(linear: nn.Module) -> type[nn.Module] | None:
    """The class that makes a module's products so; None if it is no plain linear layer."""
    return FusedLinear if type(linear) is nn.Linear else None


def is_plain_linear(module: nn.Module) -> bool:
    """Whether it is torch's linear layer, fused or not, and no class with weights of its own kind."""
    return type(module) in (nn.Linear, FusedLinear, AddingLinear)


def add_in_place(model: nn.Module) -> None:
    """Has fused layers of a model that is whole add their weights' gradients to `weight.grad` directly."""
    for module in model.modules():
        if type(module) is FusedLinear:
            # The class is changed, not `forward`: that would refer to the layer, which in a cycle outlives its model.
            module.__class__ = AddingLinear


class FusedLinear(Fused, nn.Linear):
    """torch's layer. What products.py does not serve is torch's own affair."""

    def forward(self, input: Tensor) -> Tensor:
        """[…, I] → […, O]."""
        return self._product(input) if products.serves(input, self.weight) else super().forward(input)

    def _product(self, input: Tensor, *, adds: bool = False) -> Tensor:
        product = _Linear.apply(input, self.weight, self.bias, adds)
        assert isinstance(product, Tensor)
        return product


class AddingLinear(FusedLinear):
    """The same, with its weight's gradient added by the product that makes it."""

    def forward(self, input: Tensor) -> Tensor:
        """[…, I] → […, O]."""
        adds = self.weight.requires_grad and torch.is_grad_enabled() and products.fits(input, self.weight)
        return self._product(input, adds=True) if adds else super().forward(input)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, adds: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        # What is saved may come back as another tensor, which has no gradient.
        ctx.adds_to = weight_OI if adds else None
        return products.linear(x, weight_OI, bias_O)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight_OI = ctx.saved_tensors
        grad_TO = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight_OI = None
        if ctx.needs_input_grad[0]:
            grad_x = products.input_gradient(grad_TO, weight_OI).view(x.shape)
        if ctx.needs_input_grad[1]:
            x_TI = x.reshape(-1, x.shape[-1])
            if ctx.adds_to is None:
                grad_weight_OI = products.weight_gradient(grad_TO, x_TI, weight_OI)
            else:
                products.add_weight_gradient(grad_TO, x_TI, ctx.adds_to)
        return grad_x, grad_weight_OI, grad_TO.sum(0) if ctx.needs_input_grad[2] else None, None
