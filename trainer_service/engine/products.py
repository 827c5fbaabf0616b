"""Products of linear layers in float32, by the faster of the two libraries that torch has for them.

torch asks MKL, which keeps to AVX2 on CPUs that are not Intel's. oneDNN, by which torch makes products in bfloat16,
uses AVX-512 on AMD's as well: on Zen 5 it takes 0.41 to 0.48 of the time, forward and backward, for 16 to 1,024 tokens,
on Zen 4, which does such instructions in two halves, 0.92.

Who makes a product follows from the CPU and the weight's size, never from a measurement or from how many tokens there
are: the same log gives the same bits, and a token's do not depend on how many stand beside it. By oneDNN, as by MKL,
they do not from a few rows on.

Shape suffixes: T tokens, I and O a layer's inputs and outputs.
"""

import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer_service.engine.device import computed_in

_LOCK = threading.Lock()
_SMALLEST = 1 << 16
"""Elements of a weight from which on oneDNN is worth the 10 µs that it takes to be called."""


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether products of these are made by oneDNN, and not as torch chooses."""
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


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x · Wᵀ + bias, […, I] → […, O]."""
    x_TI = x.reshape(-1, x.shape[-1])
    with _made_by(onednn=serves(x_TI, weight_OI)):
        product_TO = F.linear(x_TI, weight_OI, bias_O)
    if x.ndim == 2:
        return product_TO
    # No view to autograd, which lets no model change a view in place that a function of ours returns. What torch makes
    # of more than two dimensions can be one.
    return torch.ops.aten._unsafe_view(product_TO, [*x.shape[:-1], len(weight_OI)])


def product(left_MK: Tensor, right_KN: Tensor, *, served: bool) -> Tensor:
    """left · right, [M, N], of a thin matrix of a layer and its inputs or gradients.

    Args:
        left_MK: float32, as the right one.
        right_KN: The other.
        served: Whether products of the layer's weight are.
    """
    with _made_by(onednn=served):
        return left_MK @ right_KN


def input_gradient(grad_TO: Tensor, weight_OI: Tensor) -> Tensor:
    """g · W, [T, I]."""
    with _made_by(onednn=serves(grad_TO, weight_OI)):
        return grad_TO @ weight_OI


def weight_gradient(grad_TO: Tensor, x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """gᵀ · x, [O, I]."""
    with _made_by(onednn=serves(x_TI, weight_OI)):
        return grad_TO.T @ x_TI


def add_weight_gradient(grad_TO: Tensor, x_TI: Tensor, weight: Tensor) -> None:
    """Adds gᵀ · x to the weight's gradient, in place where there is one."""
    if weight.grad is None:
        weight.grad = weight_gradient(grad_TO, x_TI, weight)
    else:
        with _made_by(onednn=serves(x_TI, weight)):
            weight.grad.addmm_(grad_TO.T, x_TI)


@contextmanager
def _made_by(*, onednn: bool) -> Iterator[None]:
    """Has torch ask oneDNN for products in float32, or leaves who makes them to torch.

    It asks it only where bfloat16 may take the place of float32. So it may here, and never does: without AMX oneDNN has
    no products of float32 matrices other than in float32, see _by_onednn.

    The setting is the process's: a product that another thread has torch make meanwhile may come out in other bits. One
    thread drives the device.
    """
    if not onednn:
        yield
        return
    settings = _settings()
    with _LOCK:
        before, settings.fp32_precision = settings.fp32_precision, "bf16"
        try:
            yield
        finally:
            settings.fp32_precision = before


def _settings() -> Any:
    """torch's about oneDNN's products."""
    return cast("Any", torch.backends.mkldnn).matmul


@functools.cache
def _by_onednn() -> bool:
    """Whether oneDNN is the faster one, and as exact."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    cpus = Path("/proc/cpuinfo")
    if not cpus.exists() or "AuthenticAMD" not in (about := cpus.read_text()) or "amx_tile" in about:
        return False
    # Each length of a pack takes a dozen kernels of its own, and oneDNN would keep the last 1,024.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    return _is_exact()


def _is_exact() -> bool:
    """Whether products by oneDNN are those of float32, tried on numbers that bfloat16 would round."""
    numbers = torch.full((64, 64), 1 + 2.0**-12)
    with _made_by(onednn=True):
        return torch.equal(numbers @ torch.eye(64), numbers)
