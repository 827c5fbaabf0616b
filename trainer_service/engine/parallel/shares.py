"""Which rank runs which packs of a batch. numpy only, and the same on every rank.

Ranks go through their shares in rounds, one pack of each a round: the model's parameters are gathered for all of them
at once. A rank that has none left runs an empty one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trainer_service.engine.packed.packing import Pack, Piece

_ROOMS = (1.0, 1.1, 1.25, 1.5, 2.0)
"""How much larger than an even share of the batch a pack may be, tried one after the other."""

EMPTY = Pack(
    token_rows_T=np.zeros(1, np.int64),
    positions_T=np.zeros(1, np.int64),
    pieces=(Piece(0, 1, 1),),
    sequences=(),
    rows_R=np.zeros(0, np.int64),
    cu_seqlens=np.zeros(1, np.int64),
    token_of_row_R=np.zeros(0, np.int64),
)
"""One token of the batch that answers no row, and so has no gradient."""


@dataclass(frozen=True)
class Round:
    """What all ranks run at the same time.

    Attributes:
        packs: One of each rank that has one left.
    """

    packs: tuple[Pack, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest. What is decided by size is decided by this, so that all ranks decide alike."""
        return max(pack.num_tokens for pack in self.packs)

    @property
    def num_tokens(self) -> int:
        """Of all of them."""
        return sum(pack.num_tokens for pack in self.packs)

    @property
    def num_shared_tokens(self) -> int:
        """Of all of them; see Pack."""
        return sum(pack.num_shared_tokens for pack in self.packs)

    @property
    def num_padding_tokens(self) -> int:
        """Of all of them; see Pack."""
        return sum(pack.num_padding_tokens for pack in self.packs)


@dataclass(frozen=True)
class Place:
    """What one rank runs in a round.

    Attributes:
        number: Of the pack in the batch; None for an empty one.
        pack: What is run.
        round: The round.
    """

    number: int | None
    pack: Pack
    round: Round


def plan_shares(plan: Callable[[int], list[Pack]], *, max_tokens: int, world_size: int) -> list[list[Place]]:
    """Packs of a batch dealt to ranks, by rank; each answers every row once.

    Args:
        plan: Makes packs of at most so many tokens.
        max_tokens: Most tokens of a pack.
        world_size: How many ranks; with tensor parallel how many groups of them, each of which runs the same packs.
    """
    packs = plan(max_tokens)
    if world_size == 1:
        return [[Place(number, pack, Round((pack,))) for number, pack in enumerate(packs)]]
    even = -(-sum(pack.num_tokens for pack in packs) // world_size)
    plans = [packs, *(plan(room) for room in dict.fromkeys(int(even * room) for room in _ROOMS) if room < max_tokens)]
    # The first of those whose heaviest share is lightest, then of those with the fewest rounds.
    return min((_places(packs, world_size) for packs in plans), key=_goodness)


def deal(costs: Sequence[int], world_size: int) -> list[list[int]]:
    """Numbers of the items each rank gets, costliest first into the emptiest share."""
    shares: list[list[int]] = [[] for _ in range(world_size)]
    totals = [0] * world_size
    for number in sorted(range(len(costs)), key=lambda number: (-costs[number], number)):
        emptiest = min(range(world_size), key=lambda rank: (totals[rank], len(shares[rank]), rank))
        shares[emptiest].append(number)
        totals[emptiest] += costs[number]
    return shares


def _places(packs: list[Pack], world_size: int) -> list[list[Place]]:
    shares = deal([pack.num_tokens for pack in packs], world_size)
    rounds = [
        Round(tuple(packs[share[place]] for share in shares if place < len(share)))
        for place in range(max(map(len, shares)))
    ]
    return [
        [
            Place(share[place], packs[share[place]], round) if place < len(share) else Place(None, EMPTY, round)
            for place, round in enumerate(rounds)
        ]
        for share in shares
    ]


def _goodness(shares: list[list[Place]]) -> tuple[int, int]:
    """Smaller is better."""
    return max(sum(place.pack.num_tokens for place in share) for share in shares), len(shares[0])
