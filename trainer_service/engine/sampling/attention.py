"""Attention of new tokens over cached ones, behind the interface through which transformers' models call any attention.

One forward takes the new tokens of many requests end to end, in one row without padding: pieces of prompts, or one
token of every sample. This function writes their keys and values to each request's own cache and lets each see its own
past, nothing else. `tokens_in_use` says whose tokens they are.

What is computed for a sample depends on its own tokens alone, so its numbers do not depend on who else is in the row.

Shape suffixes: H query heads, J key/value heads, G query heads that share one of them, B samples of a request, N new
tokens of each, P tokens of a shared prompt, S cached tokens, n slots, C tokens a slot has room for, D key head size, E
value head size.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from trainer_service.engine.device import computed_in
from trainer_service.engine.packed.attention import (
    UNDERSTOOD,
    VECTOR,
    check_understood,
    in_float32_on_cpu,
    repeated_heads,
)
from trainer_service.engine.sampling.cache import BLOCK, Block, Call, Views
from trainer_service.engine.sampling.slots import Group, Reach

ATTENTION = "gradwire_cached"
"""What the function is called among transformers' attention implementations."""
_ROWS = 4
"""Queries of a key head are padded to a multiple of this: on the CPU products of fewer rows add up in another order."""


@dataclass(frozen=True)
class Part:
    """A piece of a prompt, or one token of each of several samples that share one, in a forward.

    Attributes:
        num_tokens: B · N of them.
        own: Cache they are written to.
        views: Of `own`.
        prompt: Cache of the prompt that all samples share, read only; None where `own` holds it.
    """

    num_tokens: int
    own: Block
    views: Views
    prompt: Views | None

    @classmethod
    def of(cls, own: Block, count: int, prompt: Block | None = None) -> "Part":
        """`count` new tokens of each sample of a block, which makes room for them."""
        own.reserve(count)
        views = own.views(count, with_room=prompt is None)
        return cls(own.num_samples * count, own, views, None if prompt is None else prompt.views(0))


class Tokens:
    """All tokens of a forward: those of the parts, those of the groups, and rows without a meaning behind them.

    Args:
        parts: In the order of the tokens.
        groups: Likewise.
        num_padding: Rows behind them; attention gives them zeros.
        rows: Where each of them stands in the forward, where that is not one row but one of a single token for each.
    """

    def __init__(self, parts: list[Part], groups: list[Group], num_padding: int, rows: Tensor | None = None) -> None:
        self.parts = parts
        self.groups = groups
        self.num_padding = num_padding
        self.sizes = [part.num_tokens for part in parts] + [len(group.slots) for group in groups] + [num_padding]
        self.rows = rows
        self.masks: dict[tuple[range, range, Reach], Tensor] = {}
        self.calls: list[Call] = []
        """Of attention so far, one a layer or several; they come in the same order in every forward."""

    def mask(self, places: range, keys: range, reach: Reach, device: torch.device) -> Tensor:
        """Which keys the tokens at some places see, bool [N, S]."""
        key = (places, keys, reach)
        if key not in self.masks:
            place_N1 = torch.arange(places.start, places.stop, device=device)[:, None]
            key_S = torch.arange(keys.start, keys.stop, device=device)
            self.masks[key] = (key_S <= place_N1) & (key_S >= reach.first_seen(place_N1))
        return self.masks[key]


_in_use: Tokens | None = None
# A plain global: one thread drives the device.


@contextlib.contextmanager
def tokens_in_use(tokens: Tokens) -> Iterator[None]:
    """Attention within is about these tokens. Their caches hold them, where the forward succeeded."""
    global _in_use
    before, _in_use = _in_use, tokens
    try:
        yield
    finally:
        _in_use = before
    for part in tokens.parts:
        part.own.length += part.num_tokens // part.own.num_samples
    for group in tokens.groups:
        for slot in group.slots:
            slot.length += 1


def cached_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of the tokens in use over their caches, as transformers' AttentionInterface calls it.

    Args:
        module: The attention layer.
        query: [1, H, tokens, D]; where the tokens stand in rows of their own, here and below, [tokens, H, 1, D].
        key: [1, J, tokens, D].
        value: [1, J, tokens, E].
        attention_mask: None: the tokens in use say who sees whom.
        scaling: Of scores; None for 1/√D.
        dropout: 0.
        sliding_window: Tokens seen, oneself included; None for all.
        softcap: Scores s become softcap · tanh(s / softcap).
        s_aux: Sinks, one score a head that takes probability and gives nothing, [H].
        is_causal: Anything but False.
        kwargs: Nothing that changes scores.

    Returns:
        [1, tokens, H, E], and None for the weights.

    Raises:
        NotImplementedError: A model asks for something else; it cannot be served so.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    assert _in_use is not None, "no tokens are in use"
    tokens = _in_use
    in_shape = len(query) == 1 if tokens.rows is None else query.shape[2] == 1
    check_understood(kwargs, UNDERSTOOD, plain=causal and attention_mask is None and not dropout and in_shape)
    reach = Reach(sliding_window, _chunk_of(module))
    scores = Scores(scaling or query.shape[-1] ** -0.5, reach, softcap, s_aux)
    dtype = computed_in(query)
    with in_float32_on_cpu(query, key, value) as states:
        return _attend_all(tokens, states, scores).to(dtype), None


AttentionInterface.register(ATTENTION, cached_attention)


def _attend_all(tokens: Tokens, states: tuple[Tensor, ...], scores: "Scores") -> Tensor:
    """What cached_attention returns, from its queries, keys and values."""
    layer, (query, key, value) = len(tokens.calls), states
    tokens.calls.append(Call(key.shape[1], key.shape[-1], value.shape[-1], key.dtype))
    if tokens.rows is not None:
        # [n, H, 1, D] → [1, H, n, D], in the order of the tokens.
        query, key, value = (each[tokens.rows, :, 0].transpose(0, 1)[None] for each in states)
    split = list(zip(*(each[0].split(tokens.sizes, dim=1) for each in (query, key, value)), strict=True))
    num_parts = len(tokens.parts)
    outputs = [_attend(tokens, part, layer, own, scores) for part, own in zip(tokens.parts, split, strict=False)]
    outputs += [
        _attend_slots(group, layer, own, scores) for group, own in zip(tokens.groups, split[num_parts:], strict=False)
    ]
    if tokens.num_padding:
        outputs.append(query.new_zeros(tokens.num_padding, query.shape[1], value.shape[-1]))
    found = torch.cat(outputs)
    if tokens.rows is None:
        return found[None]
    return torch.empty_like(found).index_copy_(0, tokens.rows, found)[:, None]


def _chunk_of(module: nn.Module) -> int | None:
    """Tokens of the chunks that a layer's attention goes by, as configurations say it for transformers' own masks."""
    config, layer = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None or layer is None or kinds[layer] != "chunked_attention":
        return None
    return getattr(config, "attention_chunk_size", None)


@dataclass(frozen=True)
class Scores:
    """How scores are made; see cached_attention."""

    scaling: float
    reach: Reach
    softcap: float | None
    sinks_H: Tensor | None

    @property
    def plain(self) -> bool:
        """Whether torch's kernels know them."""
        return not self.softcap and self.sinks_H is None


def _attend(tokens: Tokens, part: Part, layer: int, states: tuple[Tensor, ...], scores: Scores) -> Tensor:
    """[B · N, H, E] of one request, from its queries, keys and values, which are cached."""
    query_HBN, key_JBN, value_JBN = states
    views, num_samples = part.views, part.own.num_samples
    views.new_keys[layer].copy_(key_JBN.unflatten(1, (num_samples, -1)).transpose(0, 1))
    views.new_values[layer].copy_(value_JBN.unflatten(1, (num_samples, -1)).transpose(0, 1))
    if part.prompt is None:
        return _attend_prompt(tokens, part.own.length, query_HBN, views.keys[layer][0], views.values[layer][0], scores)
    return _attend_shared(
        query_HBN,
        (part.prompt.keys[layer], views.keys[layer]),
        (part.prompt.values[layer], views.values[layer]),
        scores,
    )


def _attend_prompt(
    tokens: Tokens, first: int, query_HND: Tensor, keys_JSD: Tensor, values_JSE: Tensor, scores: Scores
) -> Tensor:
    """A prompt's new tokens, from place `first` on, over those before and themselves, [N, H, E]."""
    num_new, reach = query_HND.shape[1], scores.reach
    query_BHND = F.pad(query_HND, (0, 0, 0, -num_new % VECTOR))[None]
    places = range(first, first + query_BHND.shape[2])
    # Blocks that no new token sees need not be read. Room behind the tokens is on a CPU, where the number of keys
    # decides in which parts they are summed up, see cache.capacity.
    stop = keys_JSD.shape[1] if first or query_HND.device.type == "cpu" else places.stop
    seen = range(max(0, reach.first_seen(first)) // BLOCK * BLOCK, stop)
    keys_JSD, values_JSE = keys_JSD[:, seen.start : seen.stop], values_JSE[:, seen.start : seen.stop]
    causal = scores.plain and first == 0 and reach.first_seen(places.stop - 1) <= 0
    mask_NS = None if causal else tokens.mask(places, seen, reach, query_HND.device)
    # With a mask torch falls back to a slow kernel unless keys come repeated.
    keys, values = (repeated_heads(held[None], len(query_HND)) for held in (keys_JSD, values_JSE))
    if scores.plain:
        output_BHNE = F.scaled_dot_product_attention(
            query_BHND, keys, values, attn_mask=mask_NS, is_causal=causal, scale=scores.scaling
        )
    else:
        weights_BHNS = _weights(_raw(query_BHND @ keys.transpose(-1, -2), scores), mask_NS, scores)
        output_BHNE = weights_BHNS.to(values.dtype) @ values
    return output_BHNE[0, :, :num_new].transpose(0, 1)


def _attend_slots(group: Group, layer: int, states: tuple[Tensor, ...], scores: Scores) -> Tensor:
    """One new token of every slot over its own past, [n, H, E]."""
    query_HnD, key_JnD, value_JnE = states
    keys, values = group.keys[layer], group.values[layer]
    for held, new in ((keys, key_JnD), (values, value_JnE)):
        held.view(-1, held.shape[-1]).index_copy_(0, group.index_nJ, new.transpose(0, 1).flatten(0, 1).to(held.dtype))
    reach, num_heads = scores.reach, keys.shape[1]
    if start := group.start(reach):
        keys, values = keys[:, :, start:], values[:, :, start:]
    # [H, n, D] → [n, J, G, D]: query heads that share a key head stand in as its queries, so no key is copied for them.
    query_nJGD = query_HnD.transpose(0, 1).unflatten(1, (num_heads, -1))
    if scores.plain:
        count = query_nJGD.shape[2]
        output_nJGE = F.scaled_dot_product_attention(
            F.pad(query_nJGD, (0, 0, 0, -count % _ROWS)),
            keys,
            values,
            attn_mask=group.bias(reach, query_nJGD),
            scale=scores.scaling,
        )
        return output_nJGE[:, :, :count].flatten(1, 2)
    raw_nJGC = _raw(query_nJGD @ keys.transpose(-1, -2), scores)
    weights_nHC = _weights(raw_nJGC.flatten(1, 2)[:, :, None], group.mask(reach), scores).squeeze(2)
    return (weights_nHC.to(values.dtype).unflatten(1, (num_heads, -1)) @ values).flatten(1, 2)


def _attend_shared(
    query_HBD: Tensor, keys: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor], scores: Scores
) -> Tensor:
    """One new token of each sample, over the prompt they share and each its own tokens, [B, H, E].

    The prompt's keys are read once for all samples.
    """
    prompt_keys_JPD, own_keys_BJSD = keys[0][0], keys[1]
    prompt_values_JPE, own_values_BJSE = values[0][0], values[1]
    num_samples, num_heads, num_prompt = query_HBD.shape[1], len(prompt_keys_JPD), prompt_keys_JPD.shape[1]
    start = max(0, scores.reach.first_seen(num_prompt + own_keys_BJSD.shape[2] - 1))
    prompt_keys_JPD, prompt_values_JPE = prompt_keys_JPD[:, start:], prompt_values_JPE[:, start:]
    own_start = max(0, start - num_prompt)
    own_keys_BJSD, own_values_BJSE = own_keys_BJSD[:, :, own_start:], own_values_BJSE[:, :, own_start:]
    num_prompt = prompt_keys_JPD.shape[1]
    # [H, B, D] → [J, B, G, D]: query heads that share a key head stand side by side.
    query_JBGD = query_HBD.unflatten(0, (num_heads, -1)).transpose(1, 2)
    over_prompt_JBGP = (query_JBGD.flatten(1, 2) @ prompt_keys_JPD.transpose(-1, -2)).unflatten(1, (num_samples, -1))
    over_own_BJGS = query_JBGD.transpose(0, 1) @ own_keys_BJSD.transpose(-1, -2)
    raw = _raw(torch.cat([over_prompt_JBGP.transpose(0, 1), over_own_BJGS], dim=-1), scores)
    weights_BJG = _weights(raw.flatten(1, 2)[:, :, None], None, scores).squeeze(2).unflatten(1, (num_heads, -1))
    weights_BJG = weights_BJG.to(own_values_BJSE.dtype)
    from_prompt = weights_BJG[..., :num_prompt].transpose(0, 1).flatten(1, 2) @ prompt_values_JPE
    from_own = weights_BJG[..., num_prompt:] @ own_values_BJSE
    return (from_prompt.unflatten(1, (num_samples, -1)).transpose(0, 1) + from_own).flatten(1, 2)


def _raw(products: Tensor, scores: Scores) -> Tensor:
    products = products * scores.scaling
    return torch.tanh(products / scores.softcap) * scores.softcap if scores.softcap else products


def _weights(raw_BHNS: Tensor, mask_NS: Tensor | None, scores: Scores) -> Tensor:
    raw = raw_BHNS.float()
    if mask_NS is not None:
        raw = raw.masked_fill(~mask_NS, float("-inf"))
    if scores.sinks_H is None:
        return torch.softmax(raw, dim=-1)
    sinks = scores.sinks_H.float().view(1, -1, 1, 1).expand(*raw.shape[:-1], 1)
    return torch.softmax(torch.cat([raw, sinks], dim=-1), dim=-1)[..., :-1]
