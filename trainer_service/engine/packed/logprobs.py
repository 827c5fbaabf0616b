"""From hidden states to log-probabilities of targets, without all logits at once.

The head (the last linear layer) is the widest of a model: logits of T tokens take T · V floats, hundreds of times their
hidden states. They are computed one chunk of tokens at a time. Backward needs them again: if they fit, they are kept
and overwritten by their own gradient; otherwise they are recomputed. A frozen head does not need them in backward.

Logits of a token with hidden state h, with what an adapter adds to the head, and its target k:

    u = scale · (W·h + bias + s · b·a·h)
    z = softcap · tanh(u / softcap), or u
    logprob_k = z_k − logsumexp(z)

A token may have several targets, each with a gradient g_k from above. Since d logprob_k / dz = onehot(k) − softmax(z),

    dz = Σ_k g_k · onehot(k) − (Σ_k g_k) · softmax(z)
    du = dz · slope, with slope = 1 − (z / softcap)², or 1
    dh = scale · Wᵀ·du,  dW = scale · du·hᵀ,  dbias = scale · du

summed over tokens in the last two; the adapter's b and a get theirs like W. If the head is frozen, only dh is
needed. Its terms are known in the forward, whatever gradient comes later:

    dh = scale · (Σ_k g_k · slope_k · W[k] − (Σ_k g_k) · Σ_v softmax(z)_v · slope_v · W[v])

Everything after the matrix product is float32. Shape suffixes: T tokens of one pack, D hidden size, V vocabulary, C
tokens of a chunk, R rows (a row is answered by one token; with shared beginnings a token answers several), K targets
per row, L rank of what an adapter adds to the head.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer_service.engine import products
from trainer_service.engine.packed.chunks import Chunk, Rows
from trainer_service.engine.packed.vocabulary import Targets, VocabularyPart
from trainer_service.engine.row_sums import logsumexp, row_sums

_CHUNK_ELEMENTS = 1 << 25
"""Logits per chunk: 128 MiB in float32. Smaller chunks read and write the head's gradient too often."""
_CPU_CHUNK_ELEMENTS = 1 << 23
"""Logits per chunk on a CPU, where they are not overwritten in place: hardly slower, with smaller temporaries."""
_FRUGAL_CHUNK_ELEMENTS = 1 << 21
"""Logits per chunk on a CPU if memory matters most."""


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to a head's weight: scale · b · a.

    Attributes:
        a: [L, D].
        b: [V, L].
        scale: Factor of the product.
    """

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True)
class Head:
    """The linear layer from hidden states to logits, and what the model does to logits after it.

    Attributes:
        weight: [V, D]. Its gradient, if it has one, is added to `weight.grad` directly, without a copy of that size.
        bias: [V] or None.
        scale: Logits are multiplied by this.
        softcap: Then a logit z becomes softcap · tanh(z / softcap); None leaves it.
        low_rank: Added to the weight; None adds nothing.
        vocabulary: Which part of a vocabulary V is, where ranks have one each: the gradients of hidden states and a
            are then this rank's summands. None where it is whole.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    low_rank: LowRank | None = None
    vocabulary: VocabularyPart | None = None


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
        token_of_row_R: The token that answers each row, int64; None if row r is token r.
        keep_logits: Keep all logits for the backward, T · V floats, instead of recomputing them.
        frugal: Use as little memory as possible, at some cost in time.
        compute_dtype: Dtype of the matrix products.

    Returns:
        float32 with grad, of the targets' shape. Its graph allows one backward.
    """
    columns_RK = targets_RK if targets_RK.ndim == 2 else targets_RK[:, None]
    rows = Rows.of(token_of_row_R, len(hidden_TD))
    # detached: its gradient is added in backward, behind autograd's back.
    weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
    plain = Head(weight, bias, head.scale, head.softcap, vocabulary=head.vocabulary)
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
class _CastHead:
    """A head in the dtype of the matrix products. Created anew in forward and backward: a copy is too large to keep.

    Attributes:
        head: Detached, in its own dtype.
        weight_VD: In the dtype of the products.
        b_VL: Also in that dtype; None without a low-rank part.
    """

    head: Head
    weight_VD: Tensor
    b_VL: Tensor | None

    @classmethod
    def of(cls, head: Head, dtype: torch.dtype, b_VL: Tensor | None = None) -> "_CastHead":
        return cls(head, head.weight.to(dtype), None if b_VL is None else b_VL.to(dtype))

    @property
    def vocab_size(self) -> int:
        return len(self.weight_VD)

    def chunk_tokens(self, elements: int) -> int:
        """How many tokens have that many logits; at least one."""
        return max(1, elements // self.vocab_size)

    def logits(self, hidden_CD: Tensor, low_CL: Tensor | None = None, out_CV: Tensor | None = None) -> Tensor:
        """z of a chunk, float32; `low_CL` is s · a·h, of the low-rank part. `out_CV` is for
        float32: where they are put."""
        weight_VD, head = self.weight_VD, self.head
        if weight_VD.dtype == torch.float32:
            if out_CV is None:
                logits_CV = products.linear(hidden_CD, weight_VD)
            else:
                logits_CV = torch.mm(hidden_CD, weight_VD.T, out=out_CV)
        else:
            logits_CV = _mm(hidden_CD, weight_VD.T)
        if low_CL is not None and self.b_VL is not None:
            if low_CL.dtype == torch.float32:
                logits_CV.addmm_(low_CL, self.b_VL.T)
            else:
                logits_CV.add_(_mm(low_CL, self.b_VL.T))
        if head.bias is not None:
            logits_CV.add_(head.bias.float())
        if head.scale != 1.0:
            logits_CV.mul_(head.scale)
        if head.softcap:
            logits_CV.div_(head.softcap).tanh_().mul_(head.softcap)
        return logits_CV

    def all_logits(self, hidden_TD: Tensor, low_TL: Tensor | None, chunks: Iterable[Chunk]) -> Tensor:
        """z of all tokens, float32. In half precision by chunks, each of which is made in another place first."""
        if self.weight_VD.dtype == torch.float32:
            return self.logits(hidden_TD, low_TL)
        logits_TV = torch.empty(len(hidden_TD), self.vocab_size, dtype=torch.float32, device=hidden_TD.device)
        for chunk in chunks:
            logits_TV[chunk.tokens] = self.logits(hidden_TD[chunk.tokens], _at(low_TL, chunk))
        return logits_TV


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        hidden_TD: Tensor,
        low_TL: Tensor | None,
        b_VL: Tensor | None,
        targets_RK: Tensor,
        rows: Rows,
        trained: Head,
        head: Head,
        keep_logits: bool,
        chunk_elements: int,
        compute_dtype: torch.dtype,
    ) -> Tensor:
        with torch.autocast(hidden_TD.device.type, enabled=False):
            cast, hidden_cast_TD = _CastHead.of(head, compute_dtype, b_VL), hidden_TD.to(compute_dtype)
            float32 = {"dtype": torch.float32, "device": hidden_TD.device}
            keep = keep_logits and any(ctx.needs_input_grad[:3])
            chunk_tokens = cast.chunk_tokens(chunk_elements)
            logits_TV = cast.all_logits(hidden_cast_TD, low_TL, rows.chunks(chunk_tokens)) if keep else None
            lse_T = torch.empty(rows.num_tokens, **float32)
            found_RK = torch.empty(targets_RK.shape, **float32)
            targets = Targets.of(targets_RK, head.vocabulary)
            for chunk in rows.chunks(chunk_tokens):
                if logits_TV is None:
                    logits_CV = cast.logits(hidden_cast_TD[chunk.tokens], _at(low_TL, chunk))
                else:
                    logits_CV = logits_TV[chunk.tokens]
                lse_T[chunk.tokens] = logsumexp(logits_CV)
                found_RK[chunk.rows] = chunk.at_targets(logits_CV, targets.rows_RK)
            lse_T, found_RK = targets.put_together(lse_T, found_RK)
            logprobs_RK = found_RK.sub_(lse_T[rows.token_of_row, None])
            ctx.save_for_backward(hidden_cast_TD, targets_RK, lse_T, low_TL, b_VL)
            ctx.logits_TV, ctx.rows, ctx.trained, ctx.head = logits_TV, rows, trained, head
            ctx.hidden_dtype, ctx.compute_dtype = hidden_TD.dtype, compute_dtype
            # Kept logits are overwritten in place, so larger chunks take no more memory.
            ctx.chunk_elements = _CHUNK_ELEMENTS if logits_TV is not None else chunk_elements
            return logprobs_RK

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_RK: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_TD, targets_RK, lse_T, low_TL, b_VL = ctx.saved_tensors
        logits_TV, ctx.logits_TV = ctx.logits_TV, None
        cast = _CastHead.of(ctx.head, ctx.compute_dtype, b_VL)
        gradients = _Gradients(ctx.trained, cast, hidden_TD, low_TL)
        sum_T = ctx.rows.sum_by_token(grad_RK.sum(-1))
        targets = Targets.of(targets_RK, ctx.head.vocabulary)
        own_RK = targets.only_here(grad_RK)
        for chunk in ctx.rows.chunks_with_gradient(grad_RK, cast.chunk_tokens(ctx.chunk_elements)):
            hidden_CD, low_CL = hidden_TD[chunk.tokens], _at(low_TL, chunk)
            logits_CV = cast.logits(hidden_CD, low_CL) if logits_TV is None else logits_TV[chunk.tokens]
            slope_CV = _slope(logits_CV, cast.head.softcap) if cast.head.softcap else None
            # dz of the derivation above, in place of z.
            gradient_CV = logits_CV.sub_(lse_T[chunk.tokens, None]).exp_().mul_(-sum_T[chunk.tokens, None])
            chunk.add_at_targets(gradient_CV, targets.rows_RK, own_RK)
            if slope_CV is not None:
                gradient_CV.mul_(slope_CV)
            if cast.head.scale != 1.0:
                gradient_CV.mul_(cast.head.scale)
            gradients.add(chunk, gradient_CV, hidden_CD, low_CL)
        grad_TD = gradients.hidden_TD.to(ctx.hidden_dtype)
        return grad_TD, gradients.low_TL, gradients.b_VL, *(None,) * 7


class _Gradients:
    """Gradients that backward gathers chunk by chunk; it adds the head's own to their parameters.

    Args:
        trained: The head, as it trains.
        cast: The same, as it computes.
        hidden_TD: The hidden states.
        low_TL: s · a·h of each token; None without a low-rank part.

    Attributes:
        hidden_TD: Gradient of the hidden states, float32.
        low_TL: Gradient of low_TL, in its dtype.
        b_VL: Gradient of the low-rank part's b, float32.
    """

    def __init__(self, trained: Head, cast: _CastHead, hidden_TD: Tensor, low_TL: Tensor | None) -> None:
        self._trained, self._cast = trained, cast
        self.hidden_TD = torch.zeros(hidden_TD.shape, dtype=torch.float32, device=hidden_TD.device)
        self.low_TL = None if low_TL is None else torch.zeros_like(low_TL)
        self.b_VL = None if cast.b_VL is None else torch.zeros_like(cast.b_VL, dtype=torch.float32)

    def add(self, chunk: Chunk, gradient_CV: Tensor, hidden_CD: Tensor, low_CL: Tensor | None) -> None:
        """Adds the gradients of a chunk, given scale · du of its tokens, and the inputs of their logits."""
        weight_VD, b_VL = self._cast.weight_VD, self._cast.b_VL
        weight, bias = self._trained.weight, self._trained.bias
        cast_CV = gradient_CV.to(weight_VD.dtype)
        self.hidden_TD[chunk.tokens] = products.input_gradient(cast_CV, weight_VD).float()
        if weight.requires_grad:
            _add_grad(weight, cast_CV, hidden_CD)
        if low_CL is not None:
            assert b_VL is not None
            assert self.b_VL is not None
            assert self.low_TL is not None
            self.low_TL[chunk.tokens] = cast_CV @ b_VL
            self.b_VL += (cast_CV.T @ low_CL).float()
        if bias is not None and bias.requires_grad:
            total_V = gradient_CV.sum(0)
            bias.grad = total_V if bias.grad is None else bias.grad.add_(total_V)


class _FrozenLogprobs(torch.autograd.Function):
    """The same for a frozen head: the forward computes what dh needs."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        hidden_TD: Tensor,
        targets_RK: Tensor,
        rows: Rows,
        head: Head,
        chunk_elements: int,
        compute_dtype: torch.dtype,
    ) -> Tensor:
        with torch.autocast(hidden_TD.device.type, enabled=False):
            cast, hidden_cast_TD = _CastHead.of(head, compute_dtype), hidden_TD.to(compute_dtype)
            float32 = {"dtype": torch.float32, "device": hidden_TD.device}
            lse_T = torch.empty(rows.num_tokens, **float32)
            found_RK = torch.empty(targets_RK.shape, **float32)
            targets = Targets.of(targets_RK, head.vocabulary)
            expected_TD = torch.empty(hidden_TD.shape, **float32) if ctx.needs_input_grad[0] else None
            chunk_tokens = cast.chunk_tokens(chunk_elements)
            scratch_CV = None
            if compute_dtype == torch.float32 and not products.serves(hidden_cast_TD, cast.weight_VD):
                # On a CPU, fresh memory costs as much as a pass over it, so all chunks share one buffer for logits.
                scratch_CV = torch.empty(min(chunk_tokens, rows.num_tokens), cast.vocab_size, **float32)
            for chunk in rows.chunks(chunk_tokens):
                hidden_CD = hidden_cast_TD[chunk.tokens]
                place = None if scratch_CV is None else scratch_CV[: len(hidden_CD)]
                logits_CV = cast.logits(hidden_CD, out_CV=place)
                found_RK[chunk.rows] = chunk.at_targets(logits_CV, targets.rows_RK)
                slope_CV = None
                if expected_TD is not None and head.softcap:
                    slope_CV = _slope(logits_CV, head.softcap)
                # softmax(z) · sum, in place of z.
                max_C = logits_CV.amax(-1)
                weights_CV = logits_CV.sub_(max_C[:, None]).exp_()
                sum_C = row_sums(weights_CV)
                lse_T[chunk.tokens] = max_C + sum_C.log()
                if expected_TD is not None:
                    if slope_CV is not None:
                        weights_CV.mul_(slope_CV)
                    product_CD = products.input_gradient(weights_CV.to(compute_dtype), cast.weight_VD).float()
                    expected_TD[chunk.tokens] = product_CD.div_(sum_C[:, None])
            own_lse_T = lse_T
            lse_T, found_RK = targets.put_together(lse_T, found_RK)
            if expected_TD is not None and head.vocabulary is not None:
                # Of this rank's rows, as large as they are in the whole.
                expected_TD.mul_((own_lse_T - lse_T).exp_()[:, None])
            slope_RK = _slope(found_RK, head.softcap) if expected_TD is not None and head.softcap else None
            logprobs_RK = found_RK.sub_(lse_T[rows.token_of_row, None])
            ctx.save_for_backward(targets_RK, expected_TD, slope_RK)
            ctx.rows, ctx.head, ctx.hidden_dtype = rows, head, hidden_TD.dtype
            return logprobs_RK

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_RK: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        targets_RK, expected_TD, slope_RK = ctx.saved_tensors
        head, rows = ctx.head, ctx.rows
        grad_TD = expected_TD * -rows.sum_by_token(grad_RK.sum(-1))[:, None]
        targets = Targets.of(targets_RK, head.vocabulary)
        own_RK = targets.only_here(grad_RK if slope_RK is None else grad_RK * slope_RK)
        whole = rows.chunk(slice(0, rows.num_tokens))
        for column in range(targets_RK.shape[1]):
            own_RD = head.weight[targets.rows_RK[whole.rows, column]].float() * own_RK[whole.rows, column, None]
            if isinstance(whole.token_of_row, slice):
                grad_TD += own_RD
            else:
                grad_TD.index_add_(0, whole.token_of_row, own_RD)
        return (grad_TD * head.scale).to(ctx.hidden_dtype), *(None,) * 5


def _at(values_TL: Tensor | None, chunk: Chunk) -> Tensor | None:
    return None if values_TL is None else values_TL[chunk.tokens]


def _mm(left: Tensor, right: Tensor) -> Tensor:
    """A product of half-precision matrices in float32, also accumulated in float32 if the device can."""
    return torch.mm(left, right, out_dtype=torch.float32) if left.is_cuda else (left @ right).float()


def _slope(logits: Tensor, softcap: float) -> Tensor:
    """d (softcap · tanh(z / softcap)) / dz, from its value."""
    return 1 - (logits / softcap).square()


def _add_grad(weight: Tensor, grad_CV: Tensor, hidden_CD: Tensor) -> None:
    if grad_CV.dtype == torch.float32:
        products.add_weight_gradient(grad_CV, hidden_CD, weight)
    else:
        product_VD = _mm(grad_CV.T, hidden_CD)
        weight.grad = product_VD if weight.grad is None else weight.grad.add_(product_VD)


def target_logprobs(logits_TV: Tensor, targets_RK: Tensor, token_of_row_R: Tensor | None = None) -> Tensor:
    """The same from logits, for models whose head does more than a Head can describe. Materialises logits and their
    gradient.

    Args:
        logits_TV: Floating point.
        targets_RK: As in linear_logprobs.
        token_of_row_R: As in linear_logprobs.
    """
    columns_RK = targets_RK if targets_RK.ndim == 2 else targets_RK[:, None]
    logits_TV = logits_TV.float()
    lse_T = logsumexp(logits_TV)
    if token_of_row_R is None:
        found_RK = logits_TV.gather(-1, columns_RK) - lse_T[:, None]
    else:
        found_RK = logits_TV[token_of_row_R[:, None], columns_RK] - lse_T[token_of_row_R, None]
    return found_RK.view(targets_RK.shape)
