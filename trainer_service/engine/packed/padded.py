"""From a batch of sequences to rows of similar length, padded on the right. numpy only.

For models that cannot be packed: what a causal model finds for a token does not depend on what comes after it, be it
attention of its own kind, a recurrent state or a convolution.

Shape suffixes: B rows of one forward, L tokens of each, T = B · L, R rows of the batch answered, N sequences.
"""

import numpy as np

from trainer_service.engine.packed.packing import Ints, Pack

_FORWARD_TOKENS = 128
"""What another forward costs, in tokens: fewer forwards are worth so much padding each. Measured with models of 30M
parameters on two cores (benchmarks/models.py), a hybrid and others."""


def plan_padded(cu_seqlens: Ints, *, max_tokens: int) -> list[Pack]:
    """Packs that answer every row of the batch once, for the least cost there is.

    Args:
        cu_seqlens: int64 [N + 1].
        max_tokens: Most tokens of a forward, padding included; a longer sequence has one to itself.
    """
    lengths = np.diff(cu_seqlens)
    order = np.argsort(-lengths, kind="stable")
    return [_build(order[start:stop], lengths, cu_seqlens) for start, stop in _cut(lengths[order], max_tokens)]


def _cut(lengths: Ints, max_tokens: int) -> list[tuple[int, int]]:
    """Where to cut sequences, longest first, into forwards: their padded tokens and what a forward costs are least."""
    num = len(lengths)
    best = np.zeros(num + 1, dtype=np.int64)
    cut = np.zeros(num + 1, dtype=np.int64)
    first = 0
    for stop in range(1, num + 1):
        while first < stop - 1 and (stop - first) * lengths[first] > max_tokens:
            first += 1
        starts = np.arange(first, stop)
        costs = best[first:stop] + (stop - starts) * lengths[first:stop]
        cheapest = int(costs.argmin())
        best[stop], cut[stop] = costs[cheapest] + _FORWARD_TOKENS, first + cheapest
    found = []
    stop = num
    while stop:
        found.append((int(cut[stop]), stop))
        stop = int(cut[stop])
    return found[::-1]


def _build(numbers: Ints, lengths: Ints, cu_seqlens: Ints) -> Pack:
    """One forward of these sequences, longest first. A row is padded with its own last token."""
    own, longest = lengths[numbers], int(lengths[numbers[0]])
    offsets = np.arange(longest)
    token_rows_BL = cu_seqlens[numbers][:, None] + np.minimum(offsets, own[:, None] - 1)
    token_of_row = np.flatnonzero(offsets < own[:, None])
    return Pack(
        token_rows_T=token_rows_BL.ravel(),
        positions_T=np.tile(offsets, len(numbers)),
        pieces=(),
        sequences=tuple(numbers.tolist()),
        rows_R=token_rows_BL.ravel()[token_of_row],
        cu_seqlens=np.concatenate([[0], np.cumsum(own)]).astype(np.int64),
        token_of_row_R=None if len(token_of_row) == token_rows_BL.size else token_of_row,
        num_rows=len(numbers),
    )
