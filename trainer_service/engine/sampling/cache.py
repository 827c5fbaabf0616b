"""Keys and values of a prompt, and of samples that share one.

A block is one tensor over all layers, so that a step makes its views of it once and not once a layer.

Shape suffixes: L layers, B samples, J key/value heads, S tokens there is room for, D key head size, E value head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 512
"""Keys that torch's attention on the CPU goes through at a time."""
_CAPACITIES = (64, 128, 192, 384, BLOCK)
_GROWTH = 1.5
"""A full block becomes this much larger: what is copied on the way is then a constant share."""


def capacity(length: int) -> int:
    """How many keys attention is given for `length`, the rest of them masked.

    On the CPU a token's numbers are then, to the last bit, nearly always those of a pass over its whole sequence, as
    training makes it: attention goes through BLOCK keys at a time, the matrix products in it through 192, and masked
    zeros at the end of a block add nothing. From 193 to 383 the products halve what there is, which no capacity has.
    """
    return next((size for size in _CAPACITIES if length <= size), -(-length // BLOCK) * BLOCK)


@dataclass(frozen=True)
class StateShape:
    """One of a sample's states, as large for any number of tokens (states.py).

    Attributes:
        layer: Number of the layer.
        kind: What transformers' cache layer calls it.
        index: Which of that kind.
        size: For one sample.
        dtype: Its.
    """

    layer: int
    kind: str
    index: int
    size: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True)
class Call:
    """What a call of attention caches a token: key/value heads, key and value head sizes."""

    num_heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype


@dataclass(frozen=True)
class CacheShape:
    """What one token of one sample takes: calls of attention, heads, head sizes, where and in which dtype.

    Beside that, `states` that do not grow; none for most models.
    """

    num_layers: int
    num_heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype
    device: torch.device
    states: tuple[StateShape, ...] = ()

    @classmethod
    def of(cls, calls: Sequence[Call], states: Sequence[StateShape], device: torch.device) -> "CacheShape":
        """Of a model whose forward calls attention so, and remembers these states beside.

        Raises:
            NotImplementedError: Keys and values are of several shapes.
        """
        if len(set(calls)) > 1:
            raise NotImplementedError("layers whose keys differ in shape")
        call = calls[0] if calls else Call(0, 0, 0, torch.float32)
        sizes = (call.num_heads, call.key_size, call.value_size)
        return cls(len(calls), *sizes, call.dtype, device, tuple(states))

    @property
    def state_bytes(self) -> int:
        """What the states of a sample take."""
        return sum(state.size.numel() * state.dtype.itemsize for state in self.states)

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of all layers."""
        return self.num_layers * self.num_heads * (self.key_size + self.value_size) * self.dtype.itemsize

    def zeros(self, num_samples: int, room: int) -> tuple[Tensor, Tensor]:
        """Room for keys and values of `room` tokens a sample, [L, B, J, S, D or E].

        Zeros, since what is masked is multiplied by 0, which only finite numbers survive.
        """
        sizes = (self.num_layers, num_samples, self.num_heads, room)
        options = {"dtype": self.dtype, "device": self.device}
        return torch.zeros(*sizes, self.key_size, **options), torch.zeros(*sizes, self.value_size, **options)


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

    @property
    def num_bytes(self) -> int:
        """Memory it takes."""
        return self._keys.nbytes + self._values.nbytes

    def reserve(self, count: int) -> None:
        """Makes room for `count` more tokens."""
        room = self._keys.shape[3]
        if self.length + count <= room:
            return
        keys, values = self._allocate(max(self.length + count, int(room * _GROWTH)))
        keys[:, :, :, : self.length] = self._keys[:, :, :, : self.length]
        values[:, :, :, : self.length] = self._values[:, :, :, : self.length]
        self._keys, self._values = keys, values

    def views(self, count: int, *, with_room: bool = False) -> "Views":
        """Where the next `count` tokens are written, and everything up to them, layer by layer.

        Args:
            count: Of tokens there was made room for.
            with_room: And, behind them, up to their `capacity`.
        """
        stop = self.length + count
        end = capacity(stop) if with_room else stop
        return Views(
            self._keys[:, :, :, self.length : stop].unbind(),
            self._values[:, :, :, self.length : stop].unbind(),
            self._keys[:, :, :, :end].unbind(),
            self._values[:, :, :, :end].unbind(),
        )

    def keep(self, samples: list[int]) -> None:
        """Lets go of all samples but these."""
        index = torch.tensor(samples, device=self._keys.device)
        self._keys, self._values = self._keys.index_select(1, index), self._values.index_select(1, index)
        self.num_samples = len(samples)

    def held(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the first sample, [L, J, tokens, D or E]."""
        return self._keys[:, 0, :, : self.length], self._values[:, 0, :, : self.length]

    def _allocate(self, room: int) -> tuple[Tensor, Tensor]:
        return self._shape.zeros(self.num_samples, capacity(room))


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
