"""Linear layers of a frozen base model in 8 or 4 bits, by bitsandbytes.

A layer keeps its weight quantised and makes it whole for each product, forward and backward, so that no whole weight
outlives its product. Embeddings, the head, norms and the stacked weights of experts stay as they are.

Shape suffixes: I and O a layer's inputs and outputs.
"""

import importlib
from collections.abc import Iterable
from typing import Any

import torch
from gradwire.errors import GradwireError, invalid_field
from torch import Tensor, nn
from torch.nn import functional as F

from trainer_service.engine import products
from trainer_service.engine.fused.linear import is_plain_linear
from trainer_service.engine.parallel.sharding import part
from trainer_service.worker_config import QUANTIZED, BaseDtype

_BLOCK = 64
"""Values that share a scale, in 4 bits: what QLoRA takes."""
_WORST_ERROR = {"int8": 0.03, "int4": 0.15}
"""Largest relative error of a random weight. Of normal numbers, 8 bits lose 0.7 % and 4 bits of type nf4 9 %."""


class QuantizedLinear(nn.Linear):
    """A linear layer whose `weight` is made of fewer bits whenever it is read, in float32."""

    base_dtype: BaseDtype
    quantized: Tensor
    scales: Tensor
    code: Tensor

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """[O, I]."""
        functional = _bitsandbytes()
        if self.base_dtype == "int8":
            return functional.int8_vectorwise_dequant(self.quantized, self.scales)
        num_values = self.out_features * self.in_features
        state = functional.QuantState(
            absmax=self.scales,
            shape=torch.Size((len(self.scales), _BLOCK)),
            code=self.code,
            blocksize=_BLOCK,
            quant_type="nf4",
            dtype=torch.float32,
        )
        blocks = functional.dequantize_4bit(self.quantized, state)
        return blocks.reshape(-1)[:num_values].view(self.out_features, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        """[…, I] → […, O]."""
        product: Any = _Product.apply(input, self)
        return product if self.bias is None else product + self.bias.to(product.dtype)


class _Product(torch.autograd.Function):
    """x · Wᵀ; the whole weight is made again for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.layer, ctx.x_dtype = layer, x.dtype
        return products.linear(x, layer.weight.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return products.input_gradient(grad, ctx.layer.weight.to(grad.dtype)).to(ctx.x_dtype), None


def check_base_dtype(base_dtype: BaseDtype, device: torch.device, *, world_size: int) -> None:
    """Refuses bits that cannot be had here.

    Args:
        base_dtype: What was asked for.
        device: Where the model goes.
        world_size: Ranks that share it.

    Raises:
        InvalidArgumentError: INVALID_FIELD: bitsandbytes is not installed or does not work on this device, or there are
            several ranks.
    """
    if base_dtype not in QUANTIZED:
        return
    if world_size > 1:
        why = f"is for one rank, and there are {world_size}; use bfloat16 or float32, or --nproc-per-node 1."
        raise _refused(base_dtype, why)
    try:
        _bitsandbytes()
    except Exception as exc:
        raise _refused(base_dtype, f"needs bitsandbytes ({exc}); pip install 'gradwire[quantized]'.") from exc
    layer = nn.Linear(_BLOCK, _BLOCK, bias=False, device=device).requires_grad_(False)
    whole_OI = layer.weight.detach().clone()
    try:
        quantize(layer, [""], base_dtype)
        error = ((layer.weight - whole_OI).norm() / whole_OI.norm()).item()
    except Exception as exc:
        raise _refused(base_dtype, f"does not work on {device}: bitsandbytes says {exc}.") from exc
    if not error < _WORST_ERROR[base_dtype]:
        raise _refused(base_dtype, f"does not work on {device}: a weight is off by {error:.0%}; use float32.")


def quantize(model: nn.Module, names: Iterable[str], base_dtype: BaseDtype) -> None:
    """Quantises linear layers of a frozen model in place.

    Args:
        model: The model.
        names: Of the layers; what is no nn.Linear stays as it is.
        base_dtype: Bits to keep, one of QUANTIZED.
    """
    functional = _bitsandbytes()
    for name in names:
        module = model.get_submodule(name)
        if not is_plain_linear(module):
            continue
        layer: Any = module
        weight_OI = layer.weight.detach()
        code = torch.empty(0)
        if base_dtype == "int8":
            # Its kernels take no other dtype.
            quantized, scales, _ = functional.int8_vectorwise_quant(weight_OI.to(torch.float16))
        else:
            # A block a row: with AVX-512, bitsandbytes 0.50 reads a weight wrongly whose rows are no whole blocks.
            values = weight_OI.reshape(-1)
            blocks = F.pad(values, (0, -len(values) % _BLOCK)).view(-1, _BLOCK)
            quantized, state = functional.quantize_4bit(blocks, blocksize=_BLOCK, quant_type="nf4")
            scales, code = state.absmax, state.code
        del layer.weight
        layer.__class__ = QuantizedLinear
        layer.base_dtype = base_dtype
        # Buffers, so that they go where the layer goes and runs share them.
        for buffer, tensor in (("quantized", quantized), ("scales", scales), ("code", code)):
            layer.register_buffer(buffer, tensor, persistent=False)


def held_bytes(model: nn.Module) -> int:
    """What a model's parameters and buffers take on this rank, as they are kept."""
    own = (part(tensor) for tensor in (*model.parameters(), *model.buffers()))
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in own}.values())


def make_whole(model: nn.Module) -> None:
    """Undoes quantize, but for what it lost."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            weight = module.weight
            for buffer in ("quantized", "scales", "code"):
                delattr(module, buffer)
            layer: Any = module
            layer.__class__ = nn.Linear
            layer.weight = nn.Parameter(weight, requires_grad=False)


def _bitsandbytes() -> Any:
    return importlib.import_module("bitsandbytes.functional")


def _refused(base_dtype: BaseDtype, why: str) -> GradwireError:
    return invalid_field("base_dtype", f'is "{base_dtype}", which {why}')
