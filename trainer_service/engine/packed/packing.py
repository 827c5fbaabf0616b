"""From a batch of sequences to packs: what one forward of the model sees. numpy only.

A pack is tokens end to end, without padding. Sequences with a common beginning share it: the pack is then a forest of
segments, and a segment attends to its ancestors and to itself.

Shape suffixes: T tokens of one pack, R rows: tokens of the batch that the pack answers. A row's logprobs come from one
token; a token that sequences share answers a row of each.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

MIN_SHARED_TOKENS = 16
"""Shorter common beginnings are computed for each sequence separately: attention over shared segments also costs."""
MIN_SAVING = 1 / 16
"""Fraction of their tokens that sequences must save together; otherwise they are packed unshared."""


@dataclass(frozen=True)
class Piece:
    """Adjacent segments of the same length that attend to the same ancestors.

    Attributes:
        start: First token in the pack.
        count: How many segments; 1 if other pieces continue it.
        length: Tokens of each.
        ancestors: Numbers of the pieces before it in its sequences, first to last; empty at a sequence's beginning.
    """

    start: int
    count: int
    length: int
    ancestors: tuple[int, ...] = ()

    @property
    def stop(self) -> int:
        """One past the last token in the pack."""
        return self.start + self.count * self.length


@dataclass(frozen=True)
class Pack:
    """One forward's share of a batch: tokens end to end, or rows padded on the right (padded.py).

    Attributes:
        token_rows_T: Row of the batch that each token comes from.
        positions_T: Position of each token in its sequence.
        pieces: Cover the tokens in order; ancestors come before those who continue them.
        sequences: Numbers of the sequences in the batch, in the order of `rows_R`.
        rows_R: Rows of the batch answered, sequence after sequence.
        cu_seqlens: Where sequences begin and end in `rows_R`.
        token_of_row_R: The token that answers each row; None where row r is token r.
        num_rows: Equally long rows that the tokens stand in; 1 for tokens end to end.
    """

    token_rows_T: Ints
    positions_T: Ints
    pieces: tuple[Piece, ...]
    sequences: tuple[int, ...]
    rows_R: Ints
    cu_seqlens: Ints
    token_of_row_R: Ints | None
    num_rows: int = 1

    @property
    def num_tokens(self) -> int:
        """T, the tokens of the pack."""
        return len(self.token_rows_T)

    @property
    def num_shared_tokens(self) -> int:
        """Rows beyond one per token: what sharing saves."""
        return max(0, len(self.rows_R) - len(self.token_rows_T))

    @property
    def num_padding_tokens(self) -> int:
        """Tokens beyond one per row: what pads rows shorter than the longest."""
        return max(0, len(self.token_rows_T) - len(self.rows_R))


@dataclass
class _Segment:
    """Tokens `depth` to `depth + length` of its members, the sequences that share them."""

    parent: int
    depth: int
    length: int
    members: list[int]
    has_children: bool = False


def plan_packs(
    tokens_T: npt.NDArray[np.int32],
    cu_seqlens: Ints,
    *,
    max_tokens: int,
    share: bool = True,
    min_shared_tokens: int | None = None,
) -> list[Pack]:
    """Packs that answer every row of the batch once.

    Args:
        tokens_T: Token ids of all sequences end to end.
        cu_seqlens: int64 [N + 1].
        max_tokens: Most tokens of a pack; a longer sequence has a pack to itself.
        share: Whether common beginnings are computed once.
        min_shared_tokens: Shortest common beginning worth sharing; None for MIN_SHARED_TOKENS.
    """
    min_shared = MIN_SHARED_TOKENS if min_shared_tokens is None else min_shared_tokens
    lengths = np.diff(cu_seqlens)
    families = _families(tokens_T, cu_seqlens, max_tokens, min_shared) if share else None
    if families is None:
        bins = _first_fit_decreasing(lengths.tolist(), max_tokens)
        return [_build_unshared(np.array(bin_), lengths, cu_seqlens) for bin_ in bins]
    sizes = [sum(int(lengths[number]) - common for number, common in family) for family in families]
    return [
        _build([families[number] for number in bin_], lengths, cu_seqlens)
        for bin_ in _first_fit_decreasing(sizes, max_tokens)
    ]


def _families(
    tokens_T: npt.NDArray[np.int32], cu_seqlens: Ints, max_tokens: int, min_shared: int
) -> list[list[tuple[int, int]]] | None:
    """Families of sequences that are computed together, each with the number of tokens it shares with the previous one.

    None if nothing is shared.
    """
    # Big-endian, so that bytes sort like token ids, and sequences with a common beginning become adjacent.
    encoded = np.ascontiguousarray(tokens_T, dtype=">u4").tobytes()
    keys = [encoded[4 * start : 4 * stop] for start, stop in pairwise(cu_seqlens.tolist())]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    families: list[list[tuple[int, int]]] = []
    size = 0
    for place, number in enumerate(order):
        common = _common_tokens(keys[order[place - 1]], keys[number], min_shared) if place else 0
        length = len(keys[number]) // 4
        if common and size + length - common <= max_tokens:
            families[-1].append((number, common))
            size += length - common
        else:
            families.append([(number, 0)])
            size = length
    worth = [_worth_sharing(family, keys) for family in families]
    if not any(worth):
        return None
    kept: list[list[tuple[int, int]]] = []
    for family, shared in zip(families, worth, strict=True):
        kept += [family] if shared else [[(number, 0)] for number, _ in family]
    return kept


def _worth_sharing(family: list[tuple[int, int]], keys: Sequence[bytes]) -> bool:
    saved = sum(common for _, common in family)
    return saved > 0 and saved > MIN_SAVING * sum(len(keys[number]) // 4 for number, _ in family)


def _common_tokens(one: bytes, other: bytes, min_shared: int) -> int:
    """Length of the common beginning in tokens; 0 if it is shorter than min_shared."""
    head = 4 * min_shared
    if len(one) < head or len(other) < head or one[:head] != other[:head]:
        return 0
    size = min(len(one), len(other))
    differ = np.frombuffer(one, dtype="V4", count=size // 4) != np.frombuffer(other, dtype="V4", count=size // 4)
    return int(differ.argmax()) if differ.any() else size // 4


def _first_fit_decreasing(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Puts each item, largest first, into the first bin with room. Returns the numbers of the items in each bin."""
    if sum(sizes) <= capacity:
        return [list(range(len(sizes)))]
    bins: list[list[int]] = []
    room: list[int] = []
    # Bins before this one are full: not even the smallest item fits.
    first_open, smallest = 0, min(sizes)
    for item in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        size = sizes[item]
        while first_open < len(bins) and room[first_open] < smallest:
            first_open += 1
        place = next((number for number in range(first_open, len(bins)) if room[number] >= size), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(capacity)
        bins[place].append(item)
        room[place] -= size
    return bins


def _build_unshared(numbers: Ints, lengths: Ints, cu_seqlens: Ints) -> Pack:
    """What `_build` makes of these sequences where none shares anything, without a step for each of them."""
    # Pieces: sequences of the same length become adjacent, lengths in the order in which they first appear.
    _, first, group = np.unique(lengths[numbers], return_index=True, return_inverse=True)
    sequences = numbers[np.argsort(first[group], kind="stable")]
    own = lengths[sequences]
    cu_own = np.concatenate([[0], np.cumsum(own)])
    positions = np.arange(cu_own[-1]) - np.repeat(cu_own[:-1], own)
    rows = positions + np.repeat(cu_seqlens[sequences], own)
    bounds = [*np.flatnonzero(np.diff(own, prepend=0)).tolist(), len(own)]
    return Pack(
        token_rows_T=rows,
        positions_T=positions,
        pieces=tuple(Piece(int(cu_own[lo]), hi - lo, int(own[lo])) for lo, hi in pairwise(bounds)),
        sequences=tuple(sequences.tolist()),
        rows_R=rows,
        cu_seqlens=cu_own,
        token_of_row_R=None,
    )


def _build(families: Iterable[list[tuple[int, int]]], lengths: Ints, cu_seqlens: Ints) -> Pack:
    segments: list[_Segment] = []
    for family in families:
        _grow(segments, family, lengths)
    # Pieces: segments without children that have the same parent and length become adjacent.
    groups: dict[tuple[int, int, int], list[int]] = {}
    for number, segment in enumerate(segments):
        alone = number if segment.has_children else -1
        groups.setdefault((segment.parent, segment.length, alone), []).append(number)
    pieces: list[Piece] = []
    piece_of: dict[int, int] = {}
    token_rows: list[Ints] = []
    positions: list[Ints] = []
    token_start: dict[int, int] = {}
    start = 0
    # A parent comes before its children in `segments`, but a segment grouped with an earlier one moves up: only
    # segments without children do, so the order holds.
    for (parent, length, _), numbers in groups.items():
        depth = segments[parent].depth + segments[parent].length if parent >= 0 else 0
        ancestors = (*pieces[piece_of[parent]].ancestors, piece_of[parent]) if parent >= 0 else ()
        piece_of[numbers[0]] = len(pieces)
        pieces.append(Piece(start, len(numbers), length, ancestors))
        offsets = np.arange(depth, depth + length)
        first_rows = cu_seqlens[[segments[number].members[0] for number in numbers]]
        token_rows.append((first_rows[:, None] + offsets).ravel())
        positions.append(np.tile(offsets, len(numbers)))
        for number in numbers:
            token_start[number] = start
            start += length
    sequences, token_of_row = _rows(segments, token_start, lengths)
    rows = np.concatenate([np.arange(cu_seqlens[number], cu_seqlens[number + 1]) for number in sequences])
    return Pack(
        token_rows_T=np.concatenate(token_rows),
        positions_T=np.concatenate(positions),
        pieces=tuple(pieces),
        sequences=tuple(sequences),
        rows_R=rows,
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths[sequences])]).astype(np.int64),
        token_of_row_R=token_of_row,
    )


def _grow(segments: list[_Segment], family: list[tuple[int, int]], lengths: Ints) -> None:
    """Adds a family's tree of segments, parents before children.

    Args:
        segments: What the tree is appended to.
        family: Sequences in order, each with the number of tokens it shares with the previous one.
        lengths: Lengths of all sequences.
    """
    todo = [(0, len(family), 0, -1)]
    while todo:
        lo, hi, depth, parent = todo.pop()
        members = [number for number, _ in family[lo:hi]]
        shared = min(common for _, common in family[lo + 1 : hi]) if hi - lo > 1 else int(lengths[members[0]])
        if shared > depth:
            segments.append(_Segment(parent, depth, shared - depth, members))
            if parent >= 0:
                segments[parent].has_children = True
            parent = len(segments) - 1
        if hi - lo > 1:
            cuts = [lo, *(place for place in range(lo + 1, hi) if family[place][1] == shared), hi]
            todo += [(start, stop, shared, parent) for start, stop in reversed(list(pairwise(cuts)))]


def _rows(segments: list[_Segment], token_start: dict[int, int], lengths: Ints) -> tuple[list[int], Ints | None]:
    """(sequences in the order of their first token, the token of each of their rows or None for the identity)."""
    by_start = sorted(token_start, key=token_start.__getitem__)
    sequences = list(dict.fromkeys(number for segment in by_start for number in segments[segment].members))
    num_rows = int(lengths[sequences].sum())
    if num_rows == sum(segment.length for segment in segments):
        return sequences, None
    first_row = dict(zip(sequences, np.concatenate([[0], np.cumsum(lengths[sequences])]).tolist(), strict=False))
    token_of_row = np.empty(num_rows, dtype=np.int64)
    for number, start in token_start.items():
        segment = segments[number]
        tokens = np.arange(start, start + segment.length)
        for member in segment.members:
            row = first_row[member] + segment.depth
            token_of_row[row : row + segment.length] = tokens
    return sequences, token_of_row
