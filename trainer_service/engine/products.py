"""Products of linear layers in float32, by the faster of the two libraries that torch has for them.

torch asks MKL, which keeps to AVX2 on CPUs that are not Intel's. oneDNN, by which torch makes products in bfloat16,
uses AVX-512 on AMD's as well: 0.41 to 0.48 of the time, forward and backward, for 16 to 1,024 tokens.

Who makes a product follows from the CPU and the weight's size, never from a measurement or from how many tokens there
are: the same log gives the same bits, and a token's do not depend on how many stand beside it. By oneDNN, as by MKL,
they do not from a few rows on.

Shape suffixes: T tokens, I and O a layer's inputs and outputs.
"""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer_service.engine.device import computed_in

_SMALLEST = 1 << 16
"""Elements of a weight from which on oneDNN is worth the 10 µs that it takes to be called."""
_ADDED = 1 << 22
"""Elements of a product that are added at a time: few enough to be still in the cache."""


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether products of these are made here, and not by torch's own choice."""
    return fits(x, weight) and torch._C._get_mkldnn_enabled() and _by_onednn()


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether a product of these is large enough, in float32 and on a CPU."""
    return (
        computed_in(x) == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and weight.numel() >= _SMALLEST
        and weight.is_contiguous()
        and x.numel() > 0
    )


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x · Wᵀ + bias, [T, O]."""
    if serves(x_TI, weight_OI):
        return _product(x_TI, weight_OI, bias_O)
    return F.linear(x_TI, weight_OI, bias_O)


def product(left_MK: Tensor, right_KN: Tensor, *, served: bool) -> Tensor:
    """left · right, [M, N], of a thin matrix of a layer and its inputs or gradients.

    Args:
        left_MK: float32, as the right one.
        right_KN: The other.
        served: Whether products of the layer's weight are.
    """
    return _product(left_MK, right_KN.T) if served else left_MK @ right_KN


def input_gradient(grad_TO: Tensor, weight_OI: Tensor) -> Tensor:
    """g · W, [T, I]."""
    if serves(grad_TO, weight_OI):
        return _product(grad_TO, weight_OI.T)
    return grad_TO @ weight_OI


def weight_gradient(grad_TO: Tensor, x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """gᵀ · x, [O, I]."""
    if serves(x_TI, weight_OI):
        return _product(grad_TO.T, x_TI.T)
    return grad_TO.T @ x_TI


def add_weight_gradient(grad_TO: Tensor, x_TI: Tensor, weight: Tensor) -> None:
    """Adds gᵀ · x to the weight's gradient, in place where there is one."""
    if weight.grad is None:
        weight.grad = weight_gradient(grad_TO, x_TI, weight)
    elif serves(x_TI, weight):
        rows = max(1, _ADDED // weight.shape[1])
        for into_OI, left_TO in zip(weight.grad.split(rows), grad_TO.split(rows, dim=1), strict=True):
            into_OI.add_(_product(left_TO.T, x_TI.T))
    else:
        weight.grad.addmm_(grad_TO.T, x_TI)


@functools.cache
def _by_onednn() -> bool:
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    cpus = Path("/proc/cpuinfo")
    amd = cpus.exists() and "AuthenticAMD" in cpus.read_text()
    return amd and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _product(left_MK: Tensor, right_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """left · rightᵀ + bias, [M, N]. What torch.compile makes linear layers by; it has no public name."""
    strides = right_NK.stride()
    if 1 not in strides or 0 in strides:
        # It takes a matrix or its transpose.
        right_NK = right_NK.contiguous()
    found: Any = torch.ops.mkldnn._linear_pointwise(left_MK, right_NK, bias_N, "none", [], "")
    return found
