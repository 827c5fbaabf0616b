"""From a batch of sequences to microbatches: what one forward of the model sees."""

from dataclasses import dataclass
from itertools import pairwise

from gradwire.codec import Batch

BATCHING = "one sequence at a time"
"""What GetServerInfo says about `plan_microbatches`."""


@dataclass(frozen=True)
class Microbatch:
    """One forward's share of a batch.

    Attributes:
        sequence: Number of the sequence in the batch.
        tokens: Where its tokens, and everything per token, lie in the batch's columns.
    """

    sequence: int
    tokens: slice


def plan_microbatches(batch: Batch) -> list[Microbatch]:
    """Microbatches that cover every token of the batch once, in the batch's order. No padding."""
    bounds = pairwise(batch.cu_seqlens.tolist())
    return [Microbatch(sequence=number, tokens=slice(start, stop)) for number, (start, stop) in enumerate(bounds)]
