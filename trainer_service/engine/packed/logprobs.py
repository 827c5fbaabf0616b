"""From hidden states to log-probabilities of targets, without all logits at once.

The head (the last linear layer) is the widest of a model: logits of T tokens take T · V floats, hundreds of times their
hidden states. They are computed a chunk of tokens at a time. Backward needs them again: they are kept where they fit,
and overwritten by their own gradient, or else computed once more. Where the head is frozen backward needs none of it:
d logprob / d hidden = (W[target] − softmax · W) is found in the forward, whatever gradient comes later.

Everything after the matrix product is float32. Shape suffixes: T tokens of one pack, D hidden size, V vocabulary, C
tokens of a chunk, R rows (a row is answered by one token; with shared beginnings a token answers several), K targets a
row, L rank of what an adapter adds to the head.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 25
"""Logits at a time: 128 MiB in float32. With smaller chunks the head's gradient is read and written too often."""
_CPU_CHUNK_ELEMENTS = 1 << 23
"""On a CPU, where logits are not overwritten in place: hardly slower, and what is needed beside them is smaller."""
_FRUGAL_CHUNK_ELEMENTS = 1 << 21
"""Where memory comes first, on a CPU."""
_FEW = 0.9
"""Below this part of tokens with a gradient, the others are left out of backward."""


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to a head's weight: scale · b · a.

    Attributes:
        a: [L, D].
        b: [V, L].
        scale: Of the product.
    """

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True)
class Head:
    """The linear layer from hidden states to logits, and what the model does to logits after it.

    Attributes:
        weight: [V, D]. Its gradient, where it has one, is added to `weight.grad` directly: no copy of that size.
        bias: [V] or None.
        scale: Logits are multiplied by this.
        softcap: Then a logit z becomes softcap · tanh(z / softcap); None leaves it.
        low_rank: Added to the weight; None adds nothing.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    low_rank: LowRank | None = None


def linear_logprobs(
    hidden_TD: Tensor,
    head: Head,
    targets_RK: Tensor,
    token_of_row_R: Tensor | None = None,
    *,
    keep_logits: bool = False,
    frugal: bool = False,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """log softmax(head(hidden))[target].

    Args:
        hidden_TD: Floating point.
        head: See Head.
        targets_RK: Token ids, int64, [R] or [R, K].
        token_of_row_R: The token that answers each row, int64; None where row r is token r.
        keep_logits: Keep all logits for the backward, T · V floats, in place of computing them again.
        frugal: Take as little memory as can be, for some time more.
        compute_dtype: Of the matrix products.

    Returns:
        float32 with grad, shaped as the targets. Its graph serves one backward.
    """
    columns_RK = targets_RK if targets_RK.ndim == 2 else targets_RK[:, None]
    rows = _Rows.of(token_of_row_R, len(hidden_TD))
    # detached: its gradient is added in backward, behind autograd's back.
    weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
    plain = Head(weight, bias, head.scale, head.softcap)
    elements = _CHUNK_ELEMENTS
    if hidden_TD.device.type == "cpu":
        elements = min(elements, _FRUGAL_CHUNK_ELEMENTS if frugal else _CPU_CHUNK_ELEMENTS)
    if not head.weight.requires_grad and head.low_rank is None:
        logprobs_RK = _FrozenLogprobs.apply(hidden_TD, columns_RK, rows, plain, elements, compute_dtype)
    else:
        low_TL = b_VL = None
        if (low_rank := head.low_rank) is not None:
            with torch.autocast(hidden_TD.device.type, enabled=False):
                low_TL = (hidden_TD.to(compute_dtype) @ low_rank.a.to(compute_dtype).T).mul(low_rank.scale)
            b_VL = low_rank.b
        logprobs_RK = _LinearLogprobs.apply(
            hidden_TD, low_TL, b_VL, columns_RK, rows, head, plain, keep_logits, elements, compute_dtype
        )
    assert isinstance(logprobs_RK, Tensor)
    return logprobs_RK.view(targets_RK.shape)


@dataclass(frozen=True)
class _Rows:
    """Which rows a chunk of tokens answers.

    Attributes:
        order_R: Rows sorted by their token; None where row r is token r.
        token_R: Token of each row in that order.
        bounds: Where each token's rows begin in that order, [T + 1], on the host.
    """

    order_R: Tensor | None
    token_R: Tensor | None
    bounds: list[int]

    @classmethod
    def of(cls, token_of_row_R: Tensor | None, num_tokens: int) -> "_Rows":
        if token_of_row_R is None:
            return cls(None, None, [])
        token_R, order_R = torch.sort(token_of_row_R, stable=True)
        tokens = torch.arange(num_tokens + 1, device=token_R.device)
        return cls(order_R, token_R, torch.searchsorted(token_R, tokens).tolist())

    def of_chunk(self, chunk: slice) -> tuple[Any, Any]:
        """(index of the chunk's rows, their tokens counted from the chunk's first)."""
        if self.order_R is None or self.token_R is None:
            return chunk, slice(None)
        rows = slice(self.bounds[chunk.start], self.bounds[chunk.stop])
        return self.order_R[rows], self.token_R[rows] - chunk.start

    def sum_by_token(self, values_R: Tensor, num_tokens: int) -> Tensor:
        """Σ over the rows of each token, [T]."""
        if self.order_R is None or self.token_R is None:
            return values_R
        return values_R.new_zeros(num_tokens).index_add_(0, self.token_R, values_R[self.order_R])


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        hidden_TD: Tensor,
        low_TL: Tensor | None,
        b_VL: Tensor | None,
        targets_RK: Tensor,
        rows: _Rows,
        trained: Head,
        head: Head,
        keep_logits: bool,
        chunk_elements: int,
        compute_dtype: torch.dtype,
    ) -> Tensor:
        with torch.autocast(hidden_TD.device.type, enabled=False):
            num_tokens, num_targets = len(hidden_TD), len(head.weight)
            weight_VD, hidden_cast_TD = head.weight.to(compute_dtype), hidden_TD.to(compute_dtype)
            b_cast_VL = None if b_VL is None else b_VL.to(compute_dtype)
            float32 = {"dtype": torch.float32, "device": hidden_TD.device}
            keep = keep_logits and any(ctx.needs_input_grad[:3])
            logits_TV = torch.empty(num_tokens, num_targets, **float32) if keep else None
            lse_T = torch.empty(num_tokens, **float32)
            logprobs_RK = torch.empty(targets_RK.shape, **float32)
            for chunk in _chunks(num_tokens, num_targets, chunk_elements):
                low = None if low_TL is None or b_cast_VL is None else (low_TL[chunk], b_cast_VL)
                logits_CV = _logits(
                    hidden_cast_TD[chunk], weight_VD, head, None if logits_TV is None else logits_TV[chunk], low
                )
                lse_T[chunk] = lse_C = torch.logsumexp(logits_CV, dim=-1)
                index, tokens = rows.of_chunk(chunk)
                logprobs_RK[index] = logits_CV[tokens].gather(-1, targets_RK[index]) - lse_C[tokens, None]
            ctx.save_for_backward(hidden_cast_TD, targets_RK, lse_T, low_TL, b_VL)
            ctx.logits_TV, ctx.rows, ctx.trained, ctx.head = logits_TV, rows, trained, head
            ctx.hidden_dtype, ctx.compute_dtype = hidden_TD.dtype, compute_dtype
            # Kept logits are overwritten where they are, so that larger chunks take no more memory.
            ctx.chunk_elements = _CHUNK_ELEMENTS if logits_TV is not None else chunk_elements
            return logprobs_RK

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_RK: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_TD, targets_RK, lse_T, low_TL, b_VL = ctx.saved_tensors
        logits_TV, ctx.logits_TV = ctx.logits_TV, None
        low = None if low_TL is None else _LowRankGradients(low_TL, b_VL.to(low_TL.dtype))
        grad_TD = _backward_trained(ctx, grad_RK, hidden_TD, targets_RK, lse_T, logits_TV, low)
        grad_low_TL, grad_b_VL = (None, None) if low is None else (low.grad_low_TL, low.grad_b_VL)
        return grad_TD.to(ctx.hidden_dtype), grad_low_TL, grad_b_VL, *(None,) * 7


class _LowRankGradients:
    """Gradients of a head's low-rank part, gathered chunk by chunk.

    Args:
        low_TL: scale · hidden · aᵀ.
        b_VL: In the same dtype.
    """

    def __init__(self, low_TL: Tensor, b_VL: Tensor) -> None:
        self.low_TL, self.b_VL = low_TL, b_VL
        self.grad_low_TL = torch.zeros_like(low_TL)
        self.grad_b_VL = torch.zeros_like(b_VL, dtype=torch.float32)

    def add(self, place: Any, gradient_CV: Tensor) -> None:
        """Of the tokens at `place`, given the gradient of their logits."""
        self.grad_low_TL[place] = gradient_CV @ self.b_VL
        self.grad_b_VL += (gradient_CV.T @ self.low_TL[place]).float()


def _backward_trained(
    ctx: Any,
    grad_RK: Tensor,
    hidden_TD: Tensor,
    targets_RK: Tensor,
    lse_T: Tensor,
    logits_TV: Tensor | None,
    low: _LowRankGradients | None,
) -> Tensor:
    """d/d hidden; d/d weight and d/d bias are added where they belong."""
    head, rows = ctx.head, ctx.rows
    num_tokens = len(hidden_TD)
    sum_T = rows.sum_by_token(grad_RK.sum(-1), num_tokens)
    # A token counts if any of its targets has a gradient, even where they cancel.
    counts_T = rows.sum_by_token((grad_RK != 0).any(-1).float(), num_tokens) > 0
    weight_VD = head.weight.to(ctx.compute_dtype)
    grad_TD = torch.zeros(hidden_TD.shape, dtype=torch.float32, device=hidden_TD.device)
    chunks = list(_chunks(num_tokens, len(weight_VD), ctx.chunk_elements))
    # All at once: on CUDA each look at a number waits for the device.
    numbers_counted = torch.stack([counts_T[chunk].sum() for chunk in chunks]).tolist()
    for chunk, num_counted in zip(chunks, numbers_counted, strict=True):
        if not num_counted:
            continue
        counts_C = counts_T[chunk]
        index, tokens = rows.of_chunk(chunk)
        targets, grads, own_tokens = targets_RK[index], grad_RK[index], tokens
        if num_counted < _FEW * len(counts_C):
            # Only the tokens with a gradient, and their rows.
            kept_C = counts_C.nonzero()[:, 0]
            new_number_C = torch.cumsum(counts_C, 0) - 1
            if isinstance(tokens, slice):
                targets, grads = targets[kept_C], grads[kept_C]
            else:
                rows_counted = counts_C[tokens]
                targets, grads, own_tokens = (
                    targets[rows_counted],
                    grads[rows_counted],
                    new_number_C[tokens[rows_counted]],
                )
            place: Any = kept_C + chunk.start
        else:
            place = chunk
        hidden_CD = hidden_TD[place]
        parts = None if low is None else (low.low_TL[place], low.b_VL)
        logits_CV = _logits(hidden_CD, weight_VD, head, low=parts) if logits_TV is None else logits_TV[place]
        slope_CV = _slope(logits_CV, head.softcap) if head.softcap else None
        # d logprob_k / d logits = onehot(target_k) − softmax(logits), in place of the logits.
        gradient_CV = logits_CV.sub_(lse_T[place, None]).exp_().mul_(-sum_T[place, None])
        if isinstance(own_tokens, slice):
            gradient_CV.scatter_add_(-1, targets, grads)
        else:
            token_RK = own_tokens[:, None].expand_as(targets)
            gradient_CV.index_put_((token_RK, targets), grads, accumulate=True)
        if slope_CV is not None:
            gradient_CV.mul_(slope_CV)
        if head.scale != 1.0:
            gradient_CV.mul_(head.scale)
        cast_CV = gradient_CV.to(ctx.compute_dtype)
        grad_TD[place] = (cast_CV @ weight_VD).float()
        if ctx.trained.weight.requires_grad:
            _add_grad(ctx.trained.weight, cast_CV.T, hidden_CD)
        if low is not None:
            low.add(place, cast_CV)
        if ctx.trained.bias is not None and ctx.trained.bias.requires_grad:
            bias = ctx.trained.bias
            total_V = gradient_CV.sum(0)
            bias.grad = total_V if bias.grad is None else bias.grad.add_(total_V)
    return grad_TD


class _FrozenLogprobs(torch.autograd.Function):
    """The same for a frozen head: d logprob / d hidden = W[target] − softmax · W, found in the forward."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        hidden_TD: Tensor,
        targets_RK: Tensor,
        rows: _Rows,
        head: Head,
        chunk_elements: int,
        compute_dtype: torch.dtype,
    ) -> Tensor:
        with torch.autocast(hidden_TD.device.type, enabled=False):
            weight_VD, hidden_cast_TD = head.weight.to(compute_dtype), hidden_TD.to(compute_dtype)
            float32 = {"dtype": torch.float32, "device": hidden_TD.device}
            logprobs_RK = torch.empty(targets_RK.shape, **float32)
            expected_TD = torch.empty(hidden_TD.shape, **float32) if ctx.needs_input_grad[0] else None
            slope_RK = torch.empty_like(logprobs_RK) if expected_TD is not None and head.softcap else None
            chunks = list(_chunks(len(hidden_TD), len(weight_VD), chunk_elements))
            scratch_CV = None
            if weight_VD.dtype == torch.float32:
                # Fresh memory costs a CPU as much as a pass over it, so all chunks' logits are made in the same place.
                scratch_CV = torch.empty(chunks[0].stop, len(weight_VD), **float32)
            for chunk in chunks:
                place = None if scratch_CV is None else scratch_CV[: chunk.stop - chunk.start]
                logits_CV = _logits(hidden_cast_TD[chunk], weight_VD, head, place)
                index, tokens = rows.of_chunk(chunk)
                found_RK = logits_CV[tokens].gather(-1, targets_RK[index])
                slope_CV = None
                if slope_RK is not None and head.softcap:
                    slope_RK[index], slope_CV = _slope(found_RK, head.softcap), _slope(logits_CV, head.softcap)
                max_C = logits_CV.amax(-1)
                weights_CV = logits_CV.sub_(max_C[:, None]).exp_()
                sum_C = weights_CV.sum(-1)
                logprobs_RK[index] = found_RK - (max_C + sum_C.log())[tokens, None]
                if expected_TD is not None:
                    if slope_CV is not None:
                        weights_CV.mul_(slope_CV)
                    expected_TD[chunk] = (weights_CV.to(compute_dtype) @ weight_VD).float().div_(sum_C[:, None])
            ctx.save_for_backward(targets_RK, expected_TD, slope_RK)
            ctx.rows, ctx.head, ctx.hidden_dtype = rows, head, hidden_TD.dtype
            return logprobs_RK

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_RK: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """d/d hidden: Σ_k g_k · W[target_k] − Σ_k g_k · softmax · W."""
        targets_RK, expected_TD, slope_RK = ctx.saved_tensors
        head, rows = ctx.head, ctx.rows
        grad_TD = expected_TD * -rows.sum_by_token(grad_RK.sum(-1), len(expected_TD))[:, None]
        own_RK = grad_RK if slope_RK is None else grad_RK * slope_RK
        index, tokens = rows.of_chunk(slice(0, len(expected_TD)))
        for column in range(targets_RK.shape[1]):
            own_RD = head.weight[targets_RK[index, column]].float() * own_RK[index, column, None]
            if isinstance(tokens, slice):
                grad_TD += own_RD
            else:
                grad_TD.index_add_(0, tokens, own_RD)
        return (grad_TD * head.scale).to(ctx.hidden_dtype), *(None,) * 5


def _logits(
    hidden_CD: Tensor,
    weight_VD: Tensor,
    head: Head,
    out_CV: Tensor | None = None,
    low: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Logits of a chunk, float32, in `out_CV` if given; `low` is the low-rank part's [C, L] and [V, L]."""
    if weight_VD.dtype == torch.float32:
        logits_CV = torch.mm(hidden_CD, weight_VD.T, out=out_CV) if out_CV is not None else hidden_CD @ weight_VD.T
    else:
        product_CV = _mm(hidden_CD, weight_VD.T)
        logits_CV = product_CV if out_CV is None else out_CV.copy_(product_CV)
    if low is not None:
        low_CL, b_VL = low
        if low_CL.dtype == torch.float32:
            logits_CV.addmm_(low_CL, b_VL.T)
        else:
            logits_CV.add_(_mm(low_CL, b_VL.T))
    if head.bias is not None:
        logits_CV.add_(head.bias.float())
    if head.scale != 1.0:
        logits_CV.mul_(head.scale)
    if head.softcap:
        logits_CV.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits_CV


def _mm(left: Tensor, right: Tensor) -> Tensor:
    """A product of half-precision matrices in float32, accumulated so where the device can."""
    return torch.mm(left, right, out_dtype=torch.float32) if left.is_cuda else (left @ right).float()


def _slope(logits: Tensor, softcap: float) -> Tensor:
    """d (softcap · tanh(z / softcap)) / dz, from its value."""
    return 1 - (logits / softcap).square()


def _add_grad(weight: Tensor, left: Tensor, right: Tensor) -> None:
    """weight.grad += left @ right, without a buffer of that size where there is a gradient already."""
    if left.dtype != torch.float32:
        product = _mm(left, right)
        weight.grad = product if weight.grad is None else weight.grad.add_(product)
    elif weight.grad is None:
        weight.grad = left @ right
    else:
        weight.grad.addmm_(left, right)


def _chunks(num_tokens: int, vocab_size: int, elements: int) -> Iterator[slice]:
    size = max(1, elements // vocab_size)
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))


def target_logprobs(logits_TV: Tensor, targets_RK: Tensor, token_of_row_R: Tensor | None = None) -> Tensor:
    """The same from logits, for models whose head does more than a Head says. Materialises logits and their gradient.

    Args:
        logits_TV: Floating point.
        targets_RK: As in linear_logprobs.
        token_of_row_R: As in linear_logprobs.
    """
    columns_RK = targets_RK if targets_RK.ndim == 2 else targets_RK[:, None]
    logits_TV = logits_TV.float()
    lse_T = torch.logsumexp(logits_TV, dim=-1)
    if token_of_row_R is None:
        found_RK = logits_TV.gather(-1, columns_RK) - lse_T[:, None]
    else:
        found_RK = logits_TV[token_of_row_R[:, None], columns_RK] - lse_T[token_of_row_R, None]
    return found_RK.view(targets_RK.shape)
