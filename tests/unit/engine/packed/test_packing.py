"""The packing plan, by properties: whatever the batch, every row is answered once, by the right token."""

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer_service.engine.packed import packing
from trainer_service.engine.packed.packing import Pack, plan_packs

MIN_SHARED = 3

sequences = st.lists(
    # Few token ids, and beginnings drawn from few: much is shared, at many depths.
    st.builds(
        lambda head, tail: head + tail,
        st.sampled_from([[], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 9, 9, 9], [7] * 12]),
        st.lists(st.integers(0, 3), max_size=9),
    ).filter(bool),
    min_size=1,
    max_size=12,
)


def plan(batch: list[list[int]], max_tokens: int, *, share: bool = True) -> tuple[list[Pack], np.ndarray]:
    bounds = np.cumsum([0, *map(len, batch)]).astype(np.int64)
    tokens_T = np.array([token for sequence in batch for token in sequence], dtype=np.int32)
    packs = plan_packs(tokens_T, bounds, max_tokens=max_tokens, share=share, min_shared_tokens=MIN_SHARED)
    return packs, tokens_T


def tokens_seen(pack: Pack, tokens_T: np.ndarray, token: int) -> list[int]:
    """What attention lets a token of the pack see, itself last."""
    piece = next(piece for piece in pack.pieces if piece.start <= token < piece.stop)
    before = [pack.pieces[number] for number in piece.ancestors]
    start = piece.start + (token - piece.start) // piece.length * piece.length
    places = [place for ancestor in before for place in range(ancestor.start, ancestor.stop)]
    return tokens_T[pack.token_rows_T[[*places, *range(start, token + 1)]]].tolist()


@settings(deadline=None, max_examples=150)
@given(batch=sequences, max_tokens=st.integers(1, 60), share=st.booleans())
def test_every_row_is_answered_once_by_a_token_that_sees_what_it_should(
    batch: list[list[int]], max_tokens: int, share: bool
) -> None:
    packs, tokens_T = plan(batch, max_tokens, share=share)
    rows = np.concatenate([pack.rows_R for pack in packs])
    assert sorted(rows.tolist()) == list(range(len(tokens_T)))
    for pack in packs:
        assert pack.pieces[0].start == 0
        assert [piece.stop for piece in pack.pieces[:-1]] == [piece.start for piece in pack.pieces[1:]]
        assert pack.pieces[-1].stop == pack.num_tokens
        assert all(pack.pieces[number].count == 1 for piece in pack.pieces for number in piece.ancestors)
        bounds = list(pairwise(pack.cu_seqlens.tolist()))
        for number, (start, stop) in zip(pack.sequences, bounds, strict=True):
            for position, row in enumerate(range(start, stop)):
                token = row if pack.token_of_row_R is None else int(pack.token_of_row_R[row])
                assert pack.positions_T[token] == position
                assert tokens_seen(pack, tokens_T, token) == batch[number][: position + 1]


@settings(deadline=None, max_examples=100)
@given(batch=sequences, max_tokens=st.integers(1, 60))
def test_packs_keep_to_the_budget_unless_one_sequence_is_longer(batch: list[list[int]], max_tokens: int) -> None:
    for pack in plan(batch, max_tokens)[0]:
        assert pack.num_tokens <= max_tokens or len(pack.sequences) == 1


@settings(deadline=None, max_examples=100)
@given(batch=sequences, max_tokens=st.integers(1, 60))
def test_sharing_never_costs_tokens(batch: list[list[int]], max_tokens: int) -> None:
    shared = sum(pack.num_tokens for pack in plan(batch, max_tokens)[0])
    assert shared <= sum(map(len, batch))


@settings(deadline=None, max_examples=100)
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=12), data=st.data())
def test_a_pack_that_shares_nothing_is_built_at_once_as_it_is_built_segment_by_segment(
    lengths: list[int], data: st.DataObject
) -> None:
    bounds = np.cumsum([0, *lengths]).astype(np.int64)
    numbers = data.draw(st.permutations(range(len(lengths))))[: data.draw(st.integers(1, len(lengths)))]
    at_once = packing._build_unshared(np.array(numbers), np.array(lengths), bounds)
    by_segment = packing._build([[(number, 0)] for number in numbers], np.array(lengths), bounds)
    for name in Pack.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(at_once, name), getattr(by_segment, name), err_msg=name)


def test_a_prompt_with_many_completions_is_computed_once() -> None:
    prompt = list(range(100, 128))
    (pack,), _ = plan([[*prompt, number, number + 1] for number in range(8)], 1000)
    assert pack.num_tokens == len(prompt) + 16
    assert pack.num_shared_tokens == 7 * len(prompt)
    # The completions are of one length: side by side behind the prompt, one kernel for all.
    assert [(piece.count, piece.length, piece.ancestors) for piece in pack.pieces] == [(1, 28, ()), (8, 2, (0,))]


def test_one_huge_sequence_among_many_small_has_a_pack_of_its_own() -> None:
    packs, _ = plan([[1] * 500, *([[2, number] for number in range(40)])], 100, share=False)
    assert [pack.num_tokens for pack in packs] == [500, 80]


def test_short_common_beginnings_are_not_worth_it() -> None:
    (pack,), _ = plan([[1, 2, 5], [1, 2, 6]], 100)
    assert pack.num_shared_tokens == 0
    assert pack.token_of_row_R is None
