"""Tensors that ranks wrote in parts, put together."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from trainer_service.engine.parallel.tensor_parallel import Cut
from trainer_service.engine.storage.parts import Arrangement, Parts

WHOLE = torch.arange(48.0).view(6, 8)


class Group:
    """The tensor parallel group of a rank, as far as parts are concerned."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def own(self, length: int) -> slice:
        return slice(self.rank * length // self.size, (self.rank + 1) * length // self.size)


def cut(dim: int | None, rank: int, size: int) -> Cut:
    group: Any = Group(rank, size)
    return Cut(group, dim)


def by_rank(dim: int, *, tp_size: int, fsdp_size: int) -> dict[int, torch.Tensor]:
    """What ranks write of WHOLE: each column or band of a group in parts along the first dim."""
    pieces = [piece.chunk(fsdp_size) for piece in WHOLE.chunk(tp_size, dim)]
    return {part * tp_size + place: pieces[place][part] for part in range(fsdp_size) for place in range(tp_size)}


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(("tp_size", "fsdp_size"), [(2, 1), (2, 2), (2, 3), (1, 3)])
def test_parts_of_any_arrangement_are_read_in_any_other(dim: int, tp_size: int, fsdp_size: int):
    written = Arrangement(tp_size * fsdp_size, tp_size, {"weight": dim} if tp_size > 1 else {})
    parts = written.parts("weight", by_rank(dim, tp_size=tp_size, fsdp_size=fsdp_size))
    assert parts.shape == [6, 8]
    assert torch.equal(parts.whole(), WHOLE)
    assert torch.equal(parts.like(torch.empty(6, 8), cut(None, 0, 2)), WHOLE)
    for size in (1, 2):
        for wanted in (0, 1):
            found = [parts.like(torch.empty(0), cut(wanted, rank, size)) for rank in range(size)]
            assert torch.equal(torch.cat(found, wanted), WHOLE)


def test_summands_are_those_of_ranks_or_of_groups():
    written = Arrangement(4, 2, {"cut": 1}, ["summed"])
    stored = {rank: torch.full((2, 3), float(rank)) for rank in range(4)}
    assert [one.whole()[0, 0] for one in written.summands("summed", stored).values()] == [0, 1, 2, 3]
    cut_ones = written.summands("cut", stored)
    assert [one.shape for one in cut_ones.values()] == [[2, 6]] * 2
    assert cut_ones[1].whole()[0].tolist() == [2, 2, 2, 3, 3, 3]
    # The same on both ranks of a group.
    assert [one.whole()[0, 0] for one in written.summands("alike", stored).values()] == [0, 2]
    # A rank that had nothing to do wrote nothing.
    assert [*written.summands("summed", {3: stored[3]})] == [3]


@pytest.mark.parametrize(
    ("stored", "dim", "why"),
    [
        ({0: torch.ones(2, 3), 1: torch.ones(2, 4)}, 1, "do not fit together"),
        ({0: torch.ones(2, 3), 1: torch.ones(3, 3)}, 1, "beside one another"),
        ({0: torch.ones(2, 3)}, 1, "parts of 1 of 2 ranks"),
        ({0: torch.ones(2), 1: torch.ones(2)}, 1, "1 dims that were cut along dim 1"),
    ],
)
def test_parts_that_are_not_of_one_tensor_are_refused(stored: dict[int, torch.Tensor], dim: int, why: str):
    with pytest.raises(ValueError, match=why):
        Arrangement(2, 2, {"weight": dim}).parts("weight", stored)


def test_numbers_in_several_parts_are_refused():
    with pytest.raises(ValueError, match="a number in several parts"):
        Parts([[torch.tensor(1.0), torch.tensor(1.0)]])


@pytest.mark.parametrize(
    "counters",
    [
        {"world_size": 0},
        {"world_size": "2"},
        {"world_size": 4, "tp_size": 3},
        {"world_size": 4, "tp_size": 2, "dims": {"weight": 2}},
        {"world_size": 4, "tp_size": 2, "dims": [1]},
        {"world_size": 4, "tp_size": 2, "summed": {"a": 1}},
    ],
)
def test_an_arrangement_that_cannot_be_is_refused(counters: Mapping[str, Any]):
    with pytest.raises(ValueError, match=" is "):
        Arrangement.read(counters)


def test_an_arrangement_is_read_as_it_was_written():
    for written in (Arrangement(), Arrangement(4), Arrangement(4, 2, {"weight": 1}, ["other"])):
        assert Arrangement.read(written.written()) == written
