"""Whether two ways of computing the same gave the same result."""

import math

import torch
from torch import Tensor

_INFINITE = 1e30
"""Logits as large as this stand for infinite ones, as the least float does that some models rule tokens out with."""


def relative_difference(got: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a part of the largest finite value of `wanted`.

    What is infinite on both sides in the same way is no difference, as are logits of a head whose bias rules tokens out
    with −inf. What is NaN, or infinite on one side alone, is an infinite one.
    """
    differ = got != wanted
    if not differ.any():
        return 0.0
    difference = (got[differ] - wanted[differ]).abs().max()
    sizes = wanted[wanted.abs() < _INFINITE].abs()
    size = float(sizes.max()) if len(sizes) else 0.0
    found = float(difference) / max(size, torch.finfo(torch.float32).tiny)
    return found if not math.isnan(found) else math.inf
