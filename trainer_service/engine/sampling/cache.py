"""Keys and values of the tokens a request has been through.

A request's samples begin alike: the prompt is held once, and each sample holds only what it generated itself. A single
sample has no need of that and simply goes on behind its prompt. A block is one tensor over all layers, so that a step
makes its views of it once and not once a layer.

Shape suffixes: L layers, B samples, J key/value heads, S tokens there is room for, D key head size, E value head size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_ROOM = 64
"""Tokens a block is made larger by, at least."""
_GROWTH = 1.5
"""A full block becomes this much larger: what is copied on the way is then a constant share."""


@dataclass(frozen=True)
class CacheShape:
    """What one token of one sample takes: layers, heads, head sizes, where and in which dtype."""

    num_layers: int
    num_heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of all layers."""
        return self.num_layers * self.num_heads * (self.key_size + self.value_size) * self.dtype.itemsize


class Block:
    """Keys and values of `num_samples` samples that have equally many tokens.

    Args:
        shape: Of one token.
        num_samples: B.
        room: Tokens there is room for at first.
    """

    def __init__(self, shape: CacheShape, num_samples: int, room: int) -> None:
        self._shape = shape
        self.num_samples = num_samples
        self.length = 0
        """Tokens held."""
        self._keys, self._values = self._allocate(room)

    def reserve(self, count: int) -> None:
        """Makes room for `count` more tokens."""
        room = self._keys.shape[3]
        if self.length + count <= room:
            return
        keys, values = self._allocate(max(self.length + count, int(room * _GROWTH)))
        keys[:, :, :, : self.length] = self._keys[:, :, :, : self.length]
        values[:, :, :, : self.length] = self._values[:, :, :, : self.length]
        self._keys, self._values = keys, values

    def views(self, count: int) -> "Views":
        """Where the next `count` tokens are written, and everything up to them, layer by layer."""
        stop = self.length + count
        return Views(
            self._keys[:, :, :, self.length : stop].unbind(),
            self._values[:, :, :, self.length : stop].unbind(),
            self._keys[:, :, :, :stop].unbind(),
            self._values[:, :, :, :stop].unbind(),
        )

    def keep(self, samples: list[int]) -> None:
        """Lets go of all samples but these."""
        index = torch.tensor(samples, device=self._keys.device)
        self._keys, self._values = self._keys.index_select(1, index), self._values.index_select(1, index)
        self.num_samples = len(samples)

    def _allocate(self, room: int) -> tuple[Tensor, Tensor]:
        shape = self._shape
        room = -(-room // _ROOM) * _ROOM
        sizes = (shape.num_layers, self.num_samples, shape.num_heads, room)
        options = {"dtype": shape.dtype, "device": shape.device}
        return torch.empty(*sizes, shape.key_size, **options), torch.empty(*sizes, shape.value_size, **options)


@dataclass(frozen=True)
class Views:
    """A block during one forward, each by layer: [B, J, tokens, D or E].

    Attributes:
        new_keys: Of the tokens of this forward, to be written.
        new_values: Likewise.
        keys: Of all tokens, those of this forward last.
        values: Likewise.
    """

    new_keys: tuple[Tensor, ...]
    new_values: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
