"""Keys and values of samples that are decoded together.

Samples of about the same length stand in one tensor, a slot each, and one call of attention serves them all. How large
a slot is follows from its sample's own length, and what lies behind the sample's tokens is masked, so that nobody's
numbers depend on who else is there.

Shape suffixes: L layers, n slots, J key/value heads, C tokens a slot has room for, D key head size, E value head size.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trainer_service.engine.sampling.cache import BLOCK, Block, CacheShape, capacity


@dataclass(eq=False)
class Slot:
    """One sample's place.

    Attributes:
        pool: Where it is.
        number: Which place there.
        length: Tokens held.
    """

    pool: "Pool"
    number: int
    length: int

    def held(self) -> tuple[Tensor, Tensor]:
        """Keys and values, [L, J, tokens, D or E]."""
        place = (slice(None), self.number, slice(None), slice(self.length))
        return self.pool.keys[place], self.pool.values[place]

    def free(self) -> None:
        """Gives the place up."""
        self.pool.remove(self)


class Pool:
    """Slots of one capacity, those in use first.

    Args:
        shape: Of a token.
        size: C, tokens a slot has room for.
        multiple: There is room for a multiple of so many slots.
    """

    def __init__(self, shape: CacheShape, size: int, *, multiple: int) -> None:
        self._shape = shape
        self._multiple = multiple
        self.size = size
        self.slots: list[Slot] = []
        self.keys, self.values = shape.zeros(0, size)

    @property
    def num_rows(self) -> int:
        """Slots in use, and free ones behind them up to the multiple."""
        return -(-len(self.slots) // self._multiple) * self._multiple

    def add(self, keys: Tensor, values: Tensor) -> Slot:
        """A slot that begins with a copy of these, [L, J, tokens, D or E]."""
        count = len(self.slots)
        if count == self.keys.shape[1]:
            room = count + max(1, count // 2 // self._multiple) * self._multiple
            old_keys, old_values = self.keys, self.values
            self.keys, self.values = self._shape.zeros(room, self.size)
            self.keys[:, :count], self.values[:, :count] = old_keys, old_values
        slot = Slot(self, count, keys.shape[2])
        _copy((keys, values), slot)
        self.slots.append(slot)
        return slot

    def remove(self, slot: Slot) -> None:
        """Frees a slot; the last one takes its place."""
        last = self.slots.pop()
        if last is not slot:
            held = last.held()
            last.number = slot.number
            _copy(held, last)
            self.slots[last.number] = last
        if not self.slots:
            self.keys, self.values = self._shape.zeros(0, self.size)


class Slots:
    """All slots of one model.

    Args:
        shape: Of a token.
        multiple: See Pool.
    """

    def __init__(self, shape: CacheShape, *, multiple: int = 8) -> None:
        self._shape = shape
        self._multiple = multiple
        self._pools: dict[int, Pool] = {}

    def add(self, prompt: Block) -> Slot:
        """A slot that begins with what the first sample of a block has been through."""
        return self.add_copy(*prompt.held())

    def add_copy(self, keys: Tensor, values: Tensor) -> Slot:
        """A slot that begins with a copy of these, [L, J, tokens, D or E]."""
        return self._pool(keys.shape[2]).add(keys, values)

    def reserve(self, slot: Slot) -> None:
        """Makes room for one more token."""
        if slot.length < slot.pool.size:
            return
        new = self._pool(slot.length + 1).add(*slot.held())
        slot.free()
        # The caller's slot is the one that goes on.
        new.pool.slots[new.number] = slot
        slot.pool, slot.number = new.pool, new.number

    def groups(self) -> list["Group"]:
        """All slots, by capacity, as a forward takes them."""
        return [Group.of(pool) for pool in self.pools()]

    def pools(self) -> list[Pool]:
        """Those in use, by capacity."""
        return [pool for _, pool in sorted(self._pools.items()) if pool.slots]

    def _pool(self, length: int) -> Pool:
        size = capacity(length)
        if size not in self._pools:
            self._pools[size] = Pool(self._shape, size, multiple=self._multiple)
        return self._pools[size]


def _copy(held: tuple[Tensor, Tensor], slot: Slot) -> None:
    for here, there in zip(slot.held(), held, strict=True):
        here.copy_(there)


@dataclass(frozen=True)
class Reach:
    """How far back a token sees.

    Attributes:
        window: Tokens it sees, itself included; None for all.
        chunk: It sees those of its own chunk of so many; None for all.
    """

    window: int | None = None
    chunk: int | None = None

    def first_seen(self, place: Any) -> Any:
        """The first place that tokens at some places see, an int or a tensor as those; may be below 0."""
        if self.chunk is not None:
            return place - place % self.chunk
        return 0 if self.window is None else place - self.window + 1


@dataclass(frozen=True)
class Group:
    """One more token of every slot of a pool, during one forward.

    Attributes:
        slots: n of them, in the order of the tokens.
        keys: By layer, [n, J, C, D]; the new ones are written there.
        values: Likewise, [n, J, C, E].
        index_nJ: Where the new ones go, counted over slots, heads and places.
        lengths_n: Tokens of each slot, the new one included.
    """

    slots: list[Slot]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    index_nJ: Tensor
    lengths_n: Tensor
    _masks: dict[Reach, Tensor] = field(default_factory=dict)
    _biases: dict[tuple[Reach, torch.dtype], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, pool: Pool) -> "Group":
        """A pool's."""
        count, num_heads, device = len(pool.slots), pool.keys.shape[2], pool.keys.device
        lengths_n = torch.tensor([slot.length for slot in pool.slots], device=device)
        heads_nJ = torch.arange(count * num_heads, device=device).view(count, num_heads)
        index_nJ = (heads_nJ * pool.size + lengths_n[:, None]).flatten()
        keys, values = pool.keys[:, :count].unbind(), pool.values[:, :count].unbind()
        return cls(list(pool.slots), keys, values, index_nJ, lengths_n + 1)

    def start(self, reach: Reach) -> int:
        """First place that may be seen; whole blocks before it are left out."""
        shortest = max(1, self.keys[0].shape[2] - BLOCK + 1)
        return max(0, reach.first_seen(shortest - 1)) // BLOCK * BLOCK

    def mask(self, reach: Reach) -> Tensor:
        """Which places from `start` on each slot's new token sees, bool [n, 1, 1, C]."""
        if reach not in self._masks:
            key_C = torch.arange(self.start(reach), self.keys[0].shape[2], device=self.lengths_n.device)
            place_n1 = self.lengths_n[:, None] - 1
            seen_nC = (key_C <= place_n1) & (key_C >= reach.first_seen(place_n1))
            self._masks[reach] = seen_nC[:, None, None]
        return self._masks[reach]

    def bias(self, reach: Reach, like: Tensor) -> Tensor:
        """The mask as it is added to scores: 0 or −inf, in the dtype of `like`."""
        key = (reach, like.dtype)
        if key not in self._biases:
            mask = self.mask(reach)
            bias = torch.zeros(mask.shape, dtype=like.dtype, device=like.device)
            self._biases[key] = bias.masked_fill_(~mask, float("-inf"))
        return self._biases[key]
