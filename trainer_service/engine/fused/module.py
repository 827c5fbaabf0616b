"""What modules have in common whose forward is fused."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Fused:
    """A module that computes in one function what its own class computes in many."""


def takes_one_tensor(module: nn.Module) -> bool:
    """Whether its forward has one argument: with more, one try does not tell what it computes."""
    return len(inspect.signature(module.forward).parameters) == 1


def with_parts(module: nn.Module, **parts: dict[str, Any]) -> nn.Module:
    """A copy to be tried, with other parameters or modules: the module's own may be large, or hold no numbers yet."""
    trial = copy.copy(module)
    trial.__dict__.update(parts)
    return trial


def alike(found: Any, wanted: Any) -> bool:
    """Whether two ways to compute the same in float32 have, rounding apart."""
    if not (isinstance(found, Tensor) and isinstance(wanted, Tensor)):
        return False
    same_kind = (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    return same_kind and bool(((found - wanted).abs() <= 1e-5 * wanted.abs() + 1e-6 * wanted.abs().max()).all())


_classes: dict[tuple[type[nn.Module], Any], type[nn.Module]] = {}


def fused_class(plain: type[nn.Module], key: object, forward: Callable[[Any, Tensor], Any]) -> type[nn.Module]:
    """A class like `plain` with another forward, the same for the same key."""
    if (plain, key) not in _classes:
        members = {"forward": forward, "__module__": __name__, "__qualname__": f"Fused{plain.__qualname__}"}
        _classes[plain, key] = type(f"Fused{plain.__name__}", (Fused, plain), members)
    return _classes[plain, key]
