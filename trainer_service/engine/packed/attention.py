"""Attention over a pack, behind the interface through which transformers' models call any attention function.

One function here serves every architecture that uses this interface: it takes queries, keys and values of all tokens of
a pack and lets each segment see only its ancestors and itself. `pack_in_use` sets the pack, in the forward and again in
the backward, where activation checkpointing repeats forwards.

Shape suffixes: H query heads, J key/value heads, T tokens of the pack, D head size, E value head size, G segments of a
piece, L tokens of a segment, M tokens of its ancestors.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from trainer_service.engine.device import computed_in
from trainer_service.engine.packed.packing import Pack, Piece

ATTENTION = "gradwire_packed"
"""Name of the function among transformers' attention implementations."""

UNDERSTOOD = frozenset(
    {
        "position_ids",
        "output_attentions",
        "use_cache",
        "cache_position",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
    }
)
"""Keyword arguments that models pass and that do not affect scores."""

VECTOR = 16
"""Numbers that a CPU takes at once. Exponentials of scores that fill no vector come out otherwise, so keys are filled
up to a multiple of this, here and where samples are made: a token's numbers are then the same in both, to the bit."""


@dataclass
class PackAttention:
    """A pack, as attention needs it.

    Attributes:
        pieces: The pieces of the pack.
        windows: Sliding windows that layers have asked for; None is full attention.
        num_recurrences: How many functions that carry something from token to token have been called.
        layouts: Where tokens stand for those (recurrences.py), by kind.
    """

    pieces: tuple[Piece, ...]
    windows: list[int | None] = field(default_factory=list)
    num_recurrences: int = 0
    layouts: dict[str, Any] = field(default_factory=dict)
    _masks: dict[tuple[int, int, int | None], Tensor | None] = field(default_factory=dict)
    _cu_seqlens: Tensor | None = None

    @classmethod
    def of(cls, pack: Pack) -> "PackAttention":
        """The attention of a pack."""
        return cls(pack.pieces)

    @property
    def flat(self) -> bool:
        """Whether no piece continues another."""
        return not any(piece.ancestors for piece in self.pieces)

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        """Of its segments, in order."""
        return tuple(piece.length for piece in self.pieces for _ in range(piece.count))

    def mask(self, piece: Piece, window: int | None, like: Tensor) -> Tensor | None:
        """What is added to a piece's scores, 0 or −inf, [L, M + L], filled up; None if plain causal attention
        is enough."""
        num_before = sum(self.pieces[number].length for number in piece.ancestors)
        if window is not None and num_before + piece.length <= window:
            window = None
        key = (piece.length, num_before, window)
        if key not in self._masks:
            self._masks[key] = None if window is None and not num_before else _mask(*key, like)
        return self._masks[key]

    def cu_seqlens(self, device: torch.device) -> Tensor:
        """Where segments begin and end, int32, for kernels that take them."""
        if self._cu_seqlens is None:
            bounds = [0]
            for piece in self.pieces:
                bounds += range(piece.start + piece.length, piece.stop + 1, piece.length)
            self._cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
        return self._cu_seqlens


_in_use: PackAttention | None = None
# A plain global: one thread drives the device, but backward may run on a thread of torch's own.


@contextlib.contextmanager
def pack_in_use(attention: PackAttention | None) -> Iterator[None]:
    """Makes attention in the body run over this pack; None leaves the model's own attention."""
    global _in_use
    before, _in_use = _in_use, attention
    try:
        yield
    finally:
        _in_use = before


def pack_now() -> PackAttention | None:
    """The pack in use."""
    return _in_use


def packed_attention(
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
    """Causal attention within the pack in use, as transformers' AttentionInterface calls it.

    Args:
        module: The attention layer.
        query: [1, H, T, D].
        key: [1, J, T, D].
        value: [1, J, T, E].
        attention_mask: None: the pack says who sees whom.
        scaling: Multiplies scores; None for 1/√D.
        dropout: Must be 0, as always in training here.
        sliding_window: How many tokens a token sees, itself included; None for all.
        softcap: Scores s become softcap · tanh(s / softcap).
        s_aux: Sinks, one score per head that takes probability but has no value, [H].
        is_causal: Must not be False.
        kwargs: Must not affect scores.

    Returns:
        [1, T, H, E], and None for the weights.

    Raises:
        NotImplementedError: A model asks for something else; it cannot be packed.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = causal and attention_mask is None and not dropout and len(query) == 1
    check_understood(kwargs, UNDERSTOOD, plain=plain)
    assert _in_use is not None, "no pack is in use"
    pack = _in_use
    pack.windows.append(sliding_window)
    if _varlen_serves(query, key, value, softcap, s_aux) and pack.flat:
        return _varlen(pack, query[0], key[0], value[0], scaling, sliding_window)[None], None
    dtype = computed_in(query)
    with in_float32_on_cpu(query, key, value) as (query, key, value):
        queries, keys, values = (_by_piece(tokens[0], pack.pieces) for tokens in (query, key, value))
        outputs = []
        for number, (piece, query_HT) in enumerate(zip(pack.pieces, queries, strict=True)):
            output_GHL = _attend(
                _segments(query_HT, piece),
                _with_ancestors(keys, piece, number),
                _with_ancestors(values, piece, number),
                mask=pack.mask(piece, sliding_window, query),
                scaling=scaling,
                softcap=softcap,
                s_aux=s_aux,
            )
            # [G, H, L, E] → [G · L, H, E]
            outputs.append(output_GHL.transpose(1, 2).flatten(0, 1))
    return (torch.cat(outputs) if len(outputs) > 1 else outputs[0])[None].to(dtype), None


AttentionInterface.register(ATTENTION, packed_attention)


def check_understood(kwargs: Mapping[str, Any], understood: frozenset[str], *, plain: bool) -> None:
    """Refuses what a model asks of attention beyond what our functions do.

    Args:
        kwargs: Further arguments of the call.
        understood: Those that may be ignored.
        plain: Whether the others ask for causal attention of one row and no more.

    Raises:
        NotImplementedError: Names them.
    """
    unknown = sorted(name for name, given in kwargs.items() if given is not None and name not in understood)
    if unknown or not plain:
        raise NotImplementedError(f"attention with {', '.join(unknown) or 'a mask, dropout, or without causality'}")


@contextlib.contextmanager
def in_float32_on_cpu(*tokens: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Queries, keys and values as attention takes them in the body: on a CPU in float32 at least.

    There bfloat16 gains a fifth for thousands of tokens, and its backward takes up to six times as long for a
    hundred. And it is by attention, which goes by whole segments here and token by token where samples are made, that
    they would differ.
    """
    if tokens[0].device.type != "cpu":
        yield tokens
        return
    with torch.autocast("cpu", enabled=False):
        yield tuple(each.to(torch.promote_types(each.dtype, torch.float32)) for each in tokens)


def _by_piece(tokens_HT: Tensor, pieces: tuple[Piece, ...]) -> tuple[Tensor, ...]:
    """Each piece's tokens, [H, G · L, D]. All of them as they are where there is one piece: the backward of a split
    copies."""
    if len(pieces) == 1:
        return (tokens_HT,)
    return tokens_HT.split([piece.count * piece.length for piece in pieces], dim=1)


def _segments(tokens_HT: Tensor, piece: Piece) -> Tensor:
    """[H, G · L, D] → [G, H, L, D]."""
    return tokens_HT.unflatten(1, (piece.count, piece.length)).transpose(0, 1)


def _with_ancestors(parts: tuple[Tensor, ...], piece: Piece, number: int) -> Tensor:
    """Keys or values that a piece sees, [G, J, M + L, D]."""
    own = _segments(parts[number], piece)
    if not piece.ancestors:
        return own
    before = torch.cat([parts[ancestor] for ancestor in piece.ancestors], dim=1)
    return torch.cat([before.expand(piece.count, *before.shape), own], dim=2)


def _attend(
    query_GHLD: Tensor,
    key_GJND: Tensor,
    value_GJNE: Tensor,
    *,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """[G, H, L, E]; without a mask, causal."""
    grouped, length = query_GHLD.shape[1] != key_GJND.shape[1], query_GHLD.shape[2]
    key_GJND, value_GJNE = filled(key_GJND), filled(value_GJNE)
    if not softcap and s_aux is None:
        # A few queries that stand alone behind others would come out otherwise too. What is filled up comes to nothing.
        query_GHLD = filled(query_GHLD)
        if grouped and mask is not None:
            # With a mask, torch falls back to a slow kernel unless keys are repeated.
            num_heads = query_GHLD.shape[1]
            key_GJND, value_GJNE = repeated_heads(key_GJND, num_heads), repeated_heads(value_GJNE, num_heads)
            grouped = False
        output_GHLE = F.scaled_dot_product_attention(
            query_GHLD,
            key_GJND,
            value_GJNE,
            attn_mask=None if mask is None else mask.to(query_GHLD.dtype),
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=grouped,
        )
        return output_GHLE[:, :, :length]
    key, value = (repeated_heads(tokens, query_GHLD.shape[1]) for tokens in (key_GJND, value_GJNE))
    scores = query_GHLD @ key.transpose(-1, -2) * (scaling or query_GHLD.shape[-1] ** -0.5)
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        mask = _mask(length, 0, None, query_GHLD)
    scores = scores.float() + mask[:length]
    if s_aux is not None:
        sinks = s_aux.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = torch.softmax(scores, dim=-1).to(value.dtype)
    return weights[..., : key.shape[2]] @ value


def filled(tokens_GJND: Tensor) -> Tensor:
    """Queries, keys or values, on a CPU with zeros behind them up to a multiple of VECTOR."""
    missing = _missing(tokens_GJND.shape[2], tokens_GJND)
    # Token by token: what is computed comes out in the layout of queries, and models view all of a token as one.
    return F.pad(tokens_GJND.transpose(1, 2), (0, 0, 0, 0, 0, missing)).transpose(1, 2) if missing else tokens_GJND


def _missing(length: int, like: Tensor) -> int:
    return -length % VECTOR if like.device.type == "cpu" else 0


def repeated_heads(tokens_GJND: Tensor, num_heads: int) -> Tensor:
    """Repeats each key/value head for every query head that reads it, [G, H, N, D]."""
    times = num_heads // tokens_GJND.shape[1]
    return tokens_GJND if times == 1 else tokens_GJND.repeat_interleave(times, dim=1)


def _mask(length: int, num_before: int, window: int | None, like: Tensor) -> Tensor:
    """[L, M + L], filled up as queries and keys are: a token sees its ancestors, itself and what is in between, at most
    `window` tokens.

    In the dtype of `like`, so that it is cast once per pack and not per layer; 0 and −inf are exact in any dtype.
    """
    last = num_before + length
    key = torch.arange(last + _missing(last, like), device=like.device)
    query = torch.arange(num_before, last + _missing(length, like), device=like.device)
    distance = query[:, None] - key
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, float("-inf"))


def _varlen_serves(query: Tensor, key: Tensor, value: Tensor, softcap: float | None, s_aux: Tensor | None) -> bool:
    """Whether torch's FlashAttention over variable lengths supports these."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    sizes = query.shape[-1] == value.shape[-1] <= 256 and query.shape[-1] % 8 == 0
    return varlen_enabled and query.is_cuda and half and sizes and not softcap and s_aux is None and key.is_cuda


varlen_enabled = True
"""Cleared if torch's kernel is missing or gives wrong results when tried on the device at load."""


def _varlen(
    pack: PackAttention,
    query_HTD: Tensor,
    key_JTD: Tensor,
    value_JTE: Tensor,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """[T, H, E]."""
    from torch.nn.attention.varlen import varlen_attn

    cu_seqlens = pack.cu_seqlens(query_HTD.device)
    longest = max(piece.length for piece in pack.pieces)
    output = varlen_attn(
        query_HTD.transpose(0, 1).contiguous(),
        key_JTD.transpose(0, 1).contiguous(),
        value_JTE.transpose(0, 1).contiguous(),
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query_HTD.shape[0] != key_JTD.shape[0],
    )
    assert isinstance(output, Tensor)
    return output
