"""Each pack of a batch goes to one rank, and no rank gets much more than another."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer_service.engine.packed.packing import Pack, plan_packs
from trainer_service.engine.parallel.shares import Place, deal, plan_shares


def shares_of(lengths: Sequence[int], *, world_size: int, max_tokens: int) -> list[list[Place]]:
    """The shares of a batch of sequences that have nothing in common."""
    bounds = np.cumsum([0, *lengths]).astype(np.int64)
    tokens = np.arange(bounds[-1], dtype=np.int32)

    def plan(most: int) -> list[Pack]:
        return plan_packs(tokens, bounds, max_tokens=most)

    return plan_shares(plan, max_tokens=max_tokens, world_size=world_size)


@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=25),
    world_size=st.integers(1, 9),
    max_tokens=st.integers(1, 600),
)
def test_any_batch_is_answered_once_by_ranks_that_go_in_step(lengths: list[int], world_size: int, max_tokens: int):
    shares = shares_of(lengths, world_size=world_size, max_tokens=max_tokens)
    assert len(shares) == world_size
    places = [place for share in shares for place in share]
    dealt = [place for place in places if place.number is not None]
    rows = np.concatenate([place.pack.rows_R for place in dealt])
    assert sorted(rows.tolist()) == list(range(sum(lengths)))
    assert sorted(place.number or 0 for place in dealt) == list(range(len(dealt)))
    assert len({len(share) for share in shares}) == 1
    for together in zip(*shares, strict=True):
        assert len({id(place.round) for place in together}) == 1
        packs = [place.pack for place in together if place.number is not None]
        assert [*together[0].round.packs] == packs
        assert packs, "a round in which nobody has anything to do"
        assert all(not len(place.pack.rows_R) for place in together if place.number is None)


@given(costs=st.lists(st.integers(1, 1000), max_size=60), world_size=st.integers(1, 9))
def test_the_heaviest_share_is_as_near_to_the_mean_as_the_packs_allow(costs: list[int], world_size: int):
    shares = deal(costs, world_size)
    assert sorted(number for share in shares for number in share) == list(range(len(costs)))
    totals = [sum(costs[number] for number in share) for share in shares]
    mean = sum(costs) / world_size
    # What went last into the heaviest share found it no heavier than the mean, and is the least of what is in it.
    assert max(totals) <= mean + min((costs[number] for number in shares[totals.index(max(totals))]), default=0)
    if max(costs, default=0) <= 0.2 * mean:
        assert max(totals) <= 1.2 * mean


@pytest.mark.parametrize(("lengths", "heaviest"), [((100,) * 8, 400), ((1000, *(10,) * 100), 1000), ((100,) * 3, 200)])
def test_a_batch_that_would_fit_one_pack_is_divided_all_the_same(lengths: tuple[int, ...], heaviest: int):
    shares = shares_of(lengths, world_size=2, max_tokens=8192)
    assert max(sum(place.pack.num_tokens for place in share) for share in shares) == heaviest
    # As few rounds as there can be: in each, all parameters are gathered.
    assert len(shares[0]) == 1


def test_one_rank_has_all_packs_as_they_were_planned():
    (share,) = shares_of((5, 9, 3, 40), world_size=1, max_tokens=20)
    packs = plan_packs(np.arange(57, dtype=np.int32), np.array([0, 5, 14, 17, 57]), max_tokens=20)
    assert [place.number for place in share] == list(range(len(packs)))
    assert [place.pack.rows_R.tolist() for place in share] == [pack.rows_R.tolist() for pack in packs]
