"""From a batch to what forwards of the model see, as its architecture allows. numpy only.

Shape suffixes: T tokens of the batch, N sequences.
"""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from trainer_service.engine.models.runner import Traits
from trainer_service.engine.packed.packing import Ints, Pack, plan_packs
from trainer_service.engine.packed.padded import plan_padded


def plan(
    tokens_T: npt.NDArray[np.int32],
    cu_seqlens: Ints,
    traits: Traits,
    *,
    max_tokens: int,
    min_shared_tokens: int | None = None,
) -> list[Pack]:
    """What answers every row of a batch once: packed, in padded rows, or one sequence at a time.

    Args:
        tokens_T: Token ids of all sequences end to end.
        cu_seqlens: int64 [N + 1].
        traits: The model's.
        max_tokens: Most tokens of a forward; a sequence longer than that has one to itself.
        min_shared_tokens: See plan_packs.
    """

    def planned(tokens_T: npt.NDArray[np.int32], cu_seqlens: Ints) -> list[Pack]:
        if traits.padded:
            return plan_padded(cu_seqlens, max_tokens=max_tokens)
        return plan_packs(
            tokens_T,
            cu_seqlens,
            max_tokens=max_tokens if traits.packed else 1,
            share=traits.packed and not traits.why_not_shared,
            min_shared_tokens=min_shared_tokens,
        )

    parts: dict[object, list[int]] = {}
    for number, length in enumerate(np.diff(cu_seqlens).tolist()):
        parts.setdefault(traits.side_of(length), []).append(number)
    if len(parts) <= 1:
        return planned(tokens_T, cu_seqlens)
    found: list[Pack] = []
    bounds = list(pairwise(cu_seqlens.tolist()))
    for numbers in parts.values():
        rows = np.concatenate([np.arange(*bounds[number]) for number in numbers])
        own = np.cumsum([0, *(bounds[number][1] - bounds[number][0] for number in numbers)]).astype(np.int64)
        found += [_among_all(pack, numbers, rows) for pack in planned(tokens_T[rows], own)]
    return found


def _among_all(pack: Pack, numbers: list[int], rows: Ints) -> Pack:
    """A pack of some of a batch's sequences, which are its rows `rows`, as one of the batch."""
    return replace(
        pack,
        token_rows_T=rows[pack.token_rows_T],
        rows_R=rows[pack.rows_R],
        sequences=tuple(numbers[number] for number in pack.sequences),
    )
