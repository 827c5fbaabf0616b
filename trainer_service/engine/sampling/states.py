"""What recurrent layers and convolutions remember of samples that are decoded together: a row each.

transformers' cache keeps such states by layer, samples side by side, and layers update them in place. So rows of all
samples stand in one tensor a state, and a step hands the tensors as they are to a cache made for it. The keys and
values of attention layers are not that cache's: they go through attention.py.

Shape suffixes: n samples, N new tokens of one prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from trainer_service.engine.sampling.cache import StateShape

_KINDS = ("conv_states", "recurrent_states")
"""Of transformers' cache layers: tensors by number, the first dim of which is samples."""
ROWS = 16
"""Forwards have a multiple of this many rows. On the CPU a matrix product of few rows, or of some odd number of them,
adds up in another order than others, whose rows come out the same however many there are, and as in training: so the
numbers of a sample do not depend on its company."""


@dataclass(eq=False)
class StateRow:
    """One sample's.

    Attributes:
        pool: Where it is.
        number: Which row there.
    """

    pool: "States"
    number: int

    def free(self) -> None:
        """Gives the row up."""
        self.pool.remove(self)


class States:
    """Rows of one model's samples, those in use first.

    Args:
        shapes: Of one sample.
        device: Where they are.
    """

    def __init__(self, shapes: Sequence[StateShape], device: torch.device) -> None:
        self._shapes = shapes
        self._device = device
        self.rows: list[StateRow] = []
        self._tensors = self._zeros(0)

    def add(self, prompt: Sequence[Tensor]) -> StateRow:
        """A row that begins as a prompt left off, [1, …] each."""
        count = len(self.rows)
        if count == self._room:
            grown = self._zeros(count + max(ROWS, count // 2 // ROWS * ROWS))
            for new, old in zip(grown, self._tensors, strict=True):
                new[:count] = old
            self._tensors = grown
        for own, state in zip(self._tensors, prompt, strict=True):
            own[count] = state[0]
        row = StateRow(self, count)
        self.rows.append(row)
        return row

    def remove(self, row: StateRow) -> None:
        """Frees a row; the last one takes its place."""
        last = self.rows.pop()
        if last is not row:
            for own in self._tensors:
                own[row.number] = own[last.number]
            last.number = row.number
            self.rows[last.number] = last
        if not self.rows:
            self._tensors = self._zeros(0)

    def tensors(self) -> list[Tensor]:
        """All rows, and some without a meaning behind them up to a multiple of ROWS, to be updated in place."""
        count = len(self.rows) + -len(self.rows) % ROWS
        return [own[:count] for own in self._tensors]

    @property
    def _room(self) -> int:
        return len(self._tensors[0])

    def _zeros(self, room: int) -> list[Tensor]:
        return [torch.zeros(room, *shape.size, dtype=shape.dtype, device=self._device) for shape in self._shapes]


def states_of(cache: DynamicCache) -> list[tuple[StateShape, Tensor]]:
    """The states a cache holds, in the order of its layers."""
    found = []
    for number, layer in enumerate(cache.layers):
        for kind in _KINDS:
            for index, state in (getattr(layer, kind, None) or {}).items():
                if isinstance(state, Tensor):
                    found.append((StateShape(number, kind, index, state.shape[1:], state.dtype), state))
    return found


def cache_over(config: Any, states: Sequence[tuple[StateShape, Tensor]], num_tokens: int | Tensor) -> DynamicCache:
    """A cache for one forward, which has those states and hands keys and values through as they come.

    Args:
        config: The model's.
        states: Updated in place; none at the beginning of a prompt.
        num_tokens: Tokens the model is to believe that came before, each of the new ones less those before it here.
    """
    cache = DynamicCache(config=config)
    for shape, state in states:
        layer: Any = cache.layers[shape.layer]
        getattr(layer, shape.kind)[shape.index] = state
        getattr(layer, f"is_{shape.kind}_initialized")[shape.index] = True
        layer.has_previous_state[shape.index] = True
        if shape.kind == "conv_states":
            layer.conv_kernel_size[shape.index] = state.shape[-1]
        layer.device, layer.dtype = state.device, state.dtype
    for layer in cache.layers:
        if hasattr(layer, "update"):
            layer.update = _as_they_come
            layer.get_seq_length = lambda: num_tokens
    return cache


def _as_they_come(key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return key, value


def write_back(cache: DynamicCache, states: Sequence[tuple[StateShape, Tensor]]) -> None:
    """Copies what layers put in the place of a state, rather than into it."""
    for shape, state in states:
        found = getattr(cache.layers[shape.layer], shape.kind)[shape.index]
        if found is not state:
            state.copy_(found)
