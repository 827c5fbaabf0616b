"""Tensors that several ranks wrote in parts, read by any number of them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainer_service.engine.parallel.sharding import first_row, part
from trainer_service.engine.parallel.tensor_parallel import Cut, TensorParallel, cut_of

_MAX_WORLD_SIZE = 1 << 20
"""Ranks that a state may say wrote it."""


def file_name(group: str, rank: int, world_size: int) -> str:
    """The file that a rank's tensors of a group go to."""
    return f"{group}.safetensors" if world_size == 1 else f"{group}-{rank + 1:05}-of-{world_size:05}.safetensors"


class Parts:
    """A tensor in parts.

    Args:
        columns: Parts in their order along the first dim, of each rank of a tensor parallel group by itself where it
            was cut; views of files, which are read where they are looked at.
        dim: The dim it was cut along; None where there is one column.

    Raises:
        ValueError: They are not parts of one tensor.
    """

    def __init__(self, columns: Sequence[Sequence[Tensor]], dim: int | None = None) -> None:
        if dim == 0:
            # Which is as if they had been cut into more.
            columns, dim = [[one for column in columns for one in column]], None
        parts = [one for column in columns for one in column]
        first = parts[0]
        if len({(one.dtype, one.ndim, one.shape[1:]) for one in parts}) > 1:
            raise ValueError(f"has parts that do not fit together: {[tuple(one.shape) for one in parts]}")
        if len(parts) > 1 and not first.ndim:
            raise ValueError("has a number in several parts")
        if dim is not None and not dim < first.ndim:
            raise ValueError(f"has parts of {first.ndim} dims that were cut along dim {dim}")
        heights = {sum(map(len, column)) for column in columns if first.ndim}
        if len(heights) > 1:
            raise ValueError(f"has parts that have {heights} rows beside one another")
        self._columns = [list(column) for column in columns]
        self._dim = dim
        self.dtype = first.dtype
        self.shape = list(first.shape)
        """Of the whole."""
        if first.ndim:
            self.shape[0] = heights.pop()
        if dim is not None:
            self.shape[dim] *= len(columns)

    def like(self, tensor: Tensor, cut: Cut | None = None) -> Tensor:
        """What belongs to this rank.

        Args:
            tensor: As which it lies: in parts, or whole.
            cut: How that lies on a group; None where it is no group's.
        """
        if not self.shape:
            return self._columns[0][0]
        start, stop, dim = 0, self.shape[0], None if cut is None else cut.dim
        own = slice(0) if cut is None or dim is None else cut.group.own(self.shape[dim])
        if dim == 0:
            start, stop = own.start, own.stop
        if isinstance(tensor, DTensor):
            start += first_row(tensor)
            stop = start + len(part(tensor))
        found = [_rows(column, start, stop) for column in self._columns]
        if dim:
            return _between(found, dim, own)
        return found[0] if self._dim is None else torch.cat(found, self._dim)

    def whole(self) -> Tensor:
        """All of it."""
        return self.like(torch.empty(()))


def _rows(parts: Sequence[Tensor], start: int, stop: int) -> Tensor:
    found: list[Tensor] = []
    begin = 0
    for one in parts:
        end = begin + len(one)
        if begin < stop and start < end:
            found.append(one[max(start, begin) - begin : min(stop, end) - begin])
        begin = end
    if not found:
        return parts[0][:0]
    return found[0] if len(found) == 1 else torch.cat(found)


def _between(columns: Sequence[Tensor], dim: int, own: slice) -> Tensor:
    """What lies between two places along a dim, of tensors of the same size side by side along it."""
    width = columns[0].shape[dim]
    found: list[Tensor] = []
    for number, column in enumerate(columns):
        low, high = max(own.start - number * width, 0), min(own.stop - number * width, width)
        if low < high:
            found.append(column.narrow(dim, low, high - low))
    return found[0] if len(found) == 1 else torch.cat(found, dim)


@dataclass(frozen=True)
class Arrangement:
    """The ranks that wrote a state, and what each wrote.

    Attributes:
        world_size: How many there were.
        tp_size: How many of them computed each layer together; 1 where each did by itself.
        dims: Of tensors that were cut for that, by name, the dim.
        summed: Names of tensors that were whole on such ranks, each of whose gradients is a summand.
    """

    world_size: int = 1
    tp_size: int = 1
    dims: Mapping[str, int] = field(default_factory=dict)
    summed: Collection[str] = ()

    @classmethod
    def of(cls, trained: Mapping[str, Tensor], world_size: int) -> "Arrangement":
        """How a run lies on ranks, by its parameters."""
        cuts = {
            name: cut
            for name, parameter in trained.items()
            # Experts that ranks divide lie on them in their order, as if they did not.
            if (cut := cut_of(parameter)) is not None and isinstance(cut.group, TensorParallel)
        }
        return cls(
            world_size,
            next((cut.group.size for cut in cuts.values()), 1),
            {name: cut.dim for name, cut in cuts.items() if cut.dim is not None},
            [name for name, cut in cuts.items() if cut.summand],
        )

    @classmethod
    def read(cls, counters: Mapping[str, Any]) -> "Arrangement":
        """What `written` gave.

        Raises:
            ValueError: It is something else.
        """
        found = cls(*(counters.get(each.name, getattr(_ALONE, each.name)) for each in fields(cls)))
        if type(found.world_size) is not int or not 1 <= found.world_size <= _MAX_WORLD_SIZE:
            raise ValueError(f"world_size is {found.world_size!r:.200}")
        if type(found.tp_size) is not int or found.tp_size < 1 or found.world_size % found.tp_size:
            raise ValueError(f"tp_size is {found.tp_size!r:.200}")
        if not isinstance(found.dims, dict) or not all(dim in (0, 1) for dim in found.dims.values()):
            raise ValueError(f"dims is {found.dims!r:.200}")
        if not isinstance(found.summed, list | tuple):
            raise ValueError(f"summed is {found.summed!r:.200}")
        return found

    def written(self) -> dict[str, Any]:
        """As JSON has it."""
        if self.tp_size > 1:
            return asdict(self)
        return {"world_size": self.world_size}

    def parts(self, name: str, stored: Mapping[int, Tensor]) -> Parts:
        """A tensor, given what ranks wrote of it, in the order of ranks.

        Raises:
            ValueError: They are not parts of one tensor.
        """
        # A number is the same for all of its parameter.
        dim = self.dims.get(name) if next(iter(stored.values())).ndim else None
        columns: dict[int, list[Tensor]] = {}
        for rank, tensor in stored.items():
            columns.setdefault(0 if dim is None else rank % self.tp_size, []).append(tensor)
        if dim is not None and sorted(columns) != [*range(self.tp_size)]:
            raise ValueError(f"has parts of {len(columns)} of {self.tp_size} ranks")
        return Parts([columns[place] for place in sorted(columns)], dim)

    def summands(self, name: str, stored: Mapping[int, Tensor]) -> dict[int, Parts]:
        """Summands of a tensor, given what ranks wrote of it: by rank, or where a group's ranks had parts of the same
        one, or had all the same, by group.

        Raises:
            ValueError: They are not summands of one tensor.
        """
        if name in self.summed:
            return {rank: Parts([[tensor]]) for rank, tensor in stored.items()}
        groups: dict[int, dict[int, Tensor]] = {}
        for rank, tensor in stored.items():
            groups.setdefault(rank // self.tp_size, {})[rank] = tensor
        if name in self.dims:
            return {group: self.parts(name, tensors) for group, tensors in groups.items()}
        return {group: Parts([[next(iter(tensors.values()))]]) for group, tensors in groups.items()}


_ALONE = Arrangement()
