"""Samples of models with attention of their own: a row each, over the model's attention and keys and values kept here.

Such a model takes the new token of every sample in a batch, and a mask that says which of a row's keys are padding. It
is handed keys that are padded on the left, as for transformers' own `generate`: the new token is the last of its row in
every one, so that windows and biases by distance come out as for the sample alone. How many keys a row has follows from
the sample's own length (slots.py), so nobody's numbers depend on who else is there.

Shape suffixes: n rows, L layers, J key/value heads, C tokens a slot has room for, S of them that are handed over, D key
head size, E value head size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from trainer_service.engine.sampling.cache import CacheShape, Call
from trainer_service.engine.sampling.slots import Pool
from trainer_service.engine.sampling.states import ROWS, states_of

_STEP = 2 * ROWS
"""Rows that are computed again are padded to a multiple of so many tokens."""


class RowsCache(Cache):
    """A pool's slots as a model's cache, for one more token of each.

    Args:
        pool: There is room for the token; beyond its slots rows without a meaning make up a multiple of ROWS.
        max_tokens: Longest sequence there is, so that no more keys are handed over; 0 for no limit.
    """

    def __init__(self, pool: Pool, *, max_tokens: int) -> None:
        num_rows, num_heads, device = pool.num_rows, pool.keys.shape[2], pool.keys.device
        lengths = [slot.length for slot in pool.slots]
        self.lengths_n = torch.tensor(lengths + [0] * (num_rows - len(lengths)), device=device)
        """Tokens of each row before the new one."""
        size, width = pool.size, min(pool.size, max(max_tokens or pool.size, max(lengths) + 1))
        first_nJ = torch.arange(num_rows * num_heads, device=device).view(num_rows, num_heads) * size
        place_nS = self.lengths_n[:, None] + torch.arange(1 - width, 1, device=device)
        new = (first_nJ + self.lengths_n[:, None]).flatten()
        # What lies before a row's first token is padding: any finite numbers, such as those in its free places.
        handed = (first_nJ[:, :, None] + (place_nS % size)[:, None]).flatten()
        self.mask_nS = (place_nS >= 0).long()
        """Which keys are of tokens, and not padding: 1 or 0."""
        keys, values = pool.keys[:, :num_rows].unbind(), pool.values[:, :num_rows].unbind()
        layers: Any = [_Layer(held, new, handed, width) for held in zip(keys, values, strict=True)]
        super().__init__(layers=layers)


class _Layer(DynamicLayer):
    """One layer's keys [n, J, C, D] and values [n, J, C, E]; `new` and `handed` count over rows, heads and places."""

    def __init__(self, held: tuple[Tensor, Tensor], new: Tensor, handed: Tensor, width: int) -> None:
        super().__init__()
        self._held, self._new, self._handed, self._width = held, new, handed, width

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Caches the new token's, [n, J, 1, D] and [n, J, 1, E]; returns those of all S, it last."""
        found = []
        for held, new in zip(self._held, (key_states, value_states), strict=True):
            rows = held.view(-1, held.shape[-1])
            rows.index_copy_(0, self._new, new.flatten(0, 2).to(held.dtype))
            found.append(rows.index_select(0, self._handed).view(*held.shape[:2], self._width, -1))
        return found[0], found[1]

    def get_seq_length(self) -> int:
        """Tokens that the model is to believe came before."""
        return self._width - 1


def shape_of(cache: DynamicCache, device: torch.device) -> CacheShape:
    """What a token takes in the model's own cache, after one.

    Raises:
        NotImplementedError: It keeps something else than keys and values, or those of several shapes.
    """
    layers: list[Any] = list(cache.layers)
    if states_of(cache) or not layers or not all(isinstance(getattr(layer, "keys", None), Tensor) for layer in layers):
        raise NotImplementedError("a cache of something else than keys and values")
    calls = [Call(one.keys.shape[1], one.keys.shape[-1], one.values.shape[-1], one.keys.dtype) for one in layers]
    return CacheShape.of(calls, (), device)


def held_by(cache: Cache) -> tuple[Tensor, Tensor]:
    """Keys [L, J, tokens, D] and values [L, J, tokens, E] of the one sequence in a cache of the model's own."""
    layers: list[Any] = list(cache.layers)
    return torch.stack([layer.keys[0] for layer in layers]), torch.stack([layer.values[0] for layer in layers])


def forward_again(forward: Callable[..., Tensor], samples: list[list[int]], *, with_index: bool) -> Tensor:
    """Computes all of some samples again, in rows padded on the right. Logits behind each, float32 [samples, V].

    Args:
        forward: Makes logits of rows of tokens, [rows, tokens, V].
        samples: Tokens of each.
        with_index: Whether it takes places to make them of alone, as `logits_to_keep`.
    """
    # How long a row is follows from its sample's length alone, as its numbers must not depend on who else is there.
    by_width: dict[int, list[int]] = {}
    for number, tokens in enumerate(samples):
        by_width.setdefault(-(-len(tokens) // _STEP) * _STEP, []).append(number)
    found: dict[int, Tensor] = {}
    for width, members in by_width.items():
        for numbers in (members[start : start + ROWS] for start in range(0, len(members), ROWS)):
            rows = [samples[number] + [0] * (width - len(samples[number])) for number in numbers]
            last = [len(samples[number]) - 1 for number in numbers]
            # The head's rows are a multiple of ROWS too.
            extra = {"logits_to_keep": torch.tensor(last + [0] * (ROWS - len(last)))} if with_index else {}
            logits = forward(rows, use_cache=False, **extra)
            logits_nV = logits[range(len(rows)), range(len(rows)) if with_index else last].float()
            found.update(zip(numbers, logits_nV.split(1), strict=True))
    return torch.cat([found[number] for number in range(len(samples))])
