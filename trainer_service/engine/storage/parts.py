"""Tensors that several ranks wrote in parts, read by any number of them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainer_service.engine.parallel.sharding import first_row, part

MAX_WORLD_SIZE = 1 << 20
"""Ranks that a state may say wrote it."""


def file_name(group: str, rank: int, world_size: int) -> str:
    """The file that a rank's tensors of a group go to."""
    return f"{group}.safetensors" if world_size == 1 else f"{group}-{rank + 1:05}-of-{world_size:05}.safetensors"


class Parts:
    """A tensor in parts, which together along the first dim are the whole.

    Args:
        parts: In their order; views of files, which are read where they are looked at.

    Raises:
        ValueError: They are not parts of one tensor.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        first = parts[0]
        if any(one.dtype != first.dtype or one.shape[1:] != first.shape[1:] for one in parts):
            raise ValueError(f"has parts that do not fit together: {[tuple(one.shape) for one in parts]}")
        if len(parts) > 1 and not all(one.ndim for one in parts):
            raise ValueError("has a number in several parts")
        self.parts = list(parts)
        """In their order."""
        self.dtype = first.dtype
        self.shape = list(first.shape)
        """Of the whole."""
        if first.ndim:
            self.shape[0] = sum(map(len, parts))

    def like(self, tensor: Tensor) -> Tensor:
        """What belongs to this rank, where `tensor` is in parts; otherwise the whole."""
        if not isinstance(tensor, DTensor):
            return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)
        start = first_row(tensor)
        return self._rows(start, start + len(part(tensor)))

    def _rows(self, start: int, stop: int) -> Tensor:
        found: list[Tensor] = []
        begin = 0
        for one in self.parts:
            end = begin + len(one)
            if begin < stop and start < end:
                found.append(one[max(start, begin) - begin : min(stop, end) - begin])
            begin = end
        if not found:
            return self.parts[0][:0]
        return found[0] if len(found) == 1 else torch.cat(found)
