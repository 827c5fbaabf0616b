"""How metrics of parts combine into those of the whole. Used by both sides; standard library only."""

import math
from collections.abc import Iterable, Mapping

_LOSS_TOKENS = "num_loss_tokens:sum"


def combine_metrics(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Metrics of a call from those of its pieces, or of a piece from those of its microbatches.

    The reduction is in the name: `name:sum` adds up, `name:max` and `name:min` are what they say, and `name:mean` is
    weighted by the part's `num_loss_tokens:sum`, so that parts of different size give the mean over all tokens. What is
    a mean, maximum or minimum over no loss token is left out. A name without a reduction adds up.
    """
    parts = list(parts)
    combined: dict[str, float] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        found = [(part[name], part.get(_LOSS_TOKENS, 1.0)) for part in parts if name in part]
        reduction = name.rpartition(":")[2]
        if reduction in ("mean", "max", "min"):
            found = [(value, count) for value, count in found if count]
            if not found:
                continue
        combined[name] = _reduce(reduction, found)
    return combined


def _reduce(reduction: str, found: list[tuple[float, float]]) -> float:
    values = [value for value, _ in found]
    if any(map(math.isnan, values)):
        return math.nan
    if reduction == "max":
        return max(values)
    if reduction == "min":
        return min(values)
    if reduction == "mean":
        return _sum(value * count for value, count in found) / _sum(count for _, count in found)
    return _sum(values)


def _sum(values: Iterable[float]) -> float:
    values = list(values)
    # Exact, so that the order does not show; infinities of both signs it does not take.
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)
