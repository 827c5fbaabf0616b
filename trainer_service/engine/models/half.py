"""Matrices of a frozen base model in bfloat16: half their memory.

Only what is multiplied: linear layers beside which adapters can train, and stacked weights of experts. Products that
are made in bfloat16 come out as before, to the bit, since float32 weights were cast for each of them; others make the
weight float32 for a product, forward and backward, and no such copy outlives it. Embeddings, the head and norms stay
in float32: what lies between layers is as precise as before.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer_service.engine import products
from trainer_service.engine.device import computed_in
from trainer_service.engine.fused.linear import is_plain_linear
from trainer_service.engine.models.experts import GROUPED
from trainer_service.engine.models.lora_targets import Targets
from trainer_service.engine.parallel.expert_parallel import goes_by_interface
from trainer_service.engine.parallel.hollow import replace_parameters, weightless
from trainer_service.engine.parallel.sharding import record_of

_HALF = torch.bfloat16


class HalfLinear(nn.Linear):
    """A frozen linear layer with its weight in bfloat16, for inputs of any dtype."""

    def forward(self, input: Tensor) -> Tensor:
        """[…, I] → […, O], in autocast's dtype where that is on, else in the input's."""
        product = _Product.apply(input, self)
        assert isinstance(product, Tensor)
        return product


class _Product(torch.autograd.Function):
    """x · Wᵀ + bias, W and bias without gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        dtype = computed_in(x)
        ctx.layer, ctx.x_dtype = layer, x.dtype
        bias = None if layer.bias is None else layer.bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return products.linear(x.to(dtype), layer.weight.to(dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return products.input_gradient(grad, ctx.layer.weight.to(grad.dtype)).to(ctx.x_dtype), None


def halved(model: PreTrainedModel, targets: Targets) -> PreTrainedModel:
    """A frozen model with its matrices in bfloat16: the same one, or where it is in parts another in its place.

    Args:
        model: Prepared.
        targets: What adapters can be put beside in its architecture.
    """
    if (sharded := record_of(model)) is not None:
        return sharded.frozen(lambda hollow: _halve(hollow, targets, lambda weight: weightless(weight, dtype=_HALF)))
    _halve(model, targets, lambda weight: weight.to(_HALF))
    return model


def _halve(model: nn.Module, targets: Targets, cast: Callable[[Tensor], Tensor]) -> None:
    # What is tied stays it.
    made: dict[nn.Parameter, nn.Parameter] = {}
    for name in (*targets.attn, *targets.mlp):
        owner, parameter = name.rsplit(".", 1) if name in targets.stacked else (name, "weight")
        module: Any = model.get_submodule(owner)
        if name in targets.stacked:
            # Others read them in their own way.
            if not goes_by_interface(module) or module.config._experts_implementation != GROUPED:
                continue
        elif is_plain_linear(module):
            module.__class__ = HalfLinear
        elif not isinstance(module, HalfLinear):
            continue
        weight = getattr(module, parameter)
        if weight.dtype != _HALF:
            if weight not in made:
                made[weight] = nn.Parameter(cast(weight.detach()), requires_grad=False)
            setattr(module, parameter, made[weight])


def make_float32(model: nn.Module) -> None:
    """Undoes `halved`, in place, but for what that lost."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for _, weight in list(model.named_parameters()):
        if weight.dtype == _HALF:
            made[weight] = nn.Parameter(weight.detach().float(), requires_grad=False)
    replace_parameters(model, made)
    for module in model.modules():
        if isinstance(module, HalfLinear):
            layer: Any = module
            layer.__class__ = nn.Linear


@contextmanager
def as_if_float32(model: nn.Module) -> Iterator[None]:
    """Within, what is in bfloat16 has stand-ins in float32, without values: peft puts adapters beside a weight in its
    dtype, and drops what they start from to it."""
    stand_ins = {weight: weightless(weight) for weight in model.parameters() if weight.dtype == _HALF}
    replace_parameters(model, stand_ins)
    try:
        yield
    finally:
        replace_parameters(model, {stand_in: weight for weight, stand_in in stand_ins.items()})
