"""Log-probabilities of targets, without a [T, V] buffer beyond the logits and their gradient.

Shape suffixes: T tokens of one microbatch, V vocabulary, K targets a token.
"""

from typing import Any

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 24
"""Logits taken to float32 at a time: 64 MiB of temporaries, enough to keep every core busy."""


def target_logprobs(logits_TV: Tensor, targets_TK: Tensor) -> Tensor:
    """log softmax(logits)[target], computed in float32 whatever the logits' dtype.

    Args:
        logits_TV: Floating point, [T, V].
        targets_TK: Token ids, int64, [T] or [T, K].

    Returns:
        float32 with grad, shaped as the targets.
    """
    columns_TK = targets_TK if targets_TK.ndim == 2 else targets_TK[:, None]
    logprobs_TK: Tensor = _TargetLogprobs.apply(logits_TV, columns_TK)  # pyright: ignore[reportAssignmentType]
    return logprobs_TK.view(targets_TK.shape)


class _TargetLogprobs(torch.autograd.Function):
    """logits[target] − logsumexp(logits); saves the logits and one number a token."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, targets_TK: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        lse_T = torch.empty(len(logits_TV), dtype=torch.float32, device=logits_TV.device)
        for rows in _chunks(logits_TV):
            lse_T[rows] = torch.logsumexp(logits_TV[rows].float(), dim=-1)
        ctx.save_for_backward(logits_TV, targets_TK, lse_T)
        return logits_TV.gather(-1, targets_TK).float() - lse_T[:, None]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TK: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # d logprob_k / d logits = onehot(target_k) − softmax(logits)
        logits_TV, targets_TK, lse_T = ctx.saved_tensors
        grad_logits_TV = torch.empty_like(logits_TV)
        for rows in _chunks(logits_TV):
            chunk = torch.sub(logits_TV[rows].float(), lse_T[rows, None]).exp_()
            chunk.mul_(-grad_TK[rows].sum(-1, keepdim=True))
            chunk.scatter_add_(-1, targets_TK[rows], grad_TK[rows])
            grad_logits_TV[rows] = chunk
        return grad_logits_TV, None


def _chunks(logits_TV: Tensor) -> list[slice]:
    rows = max(1, _CHUNK_ELEMENTS // logits_TV.shape[1])
    return [slice(start, min(start + rows, len(logits_TV))) for start in range(0, len(logits_TV), rows)]
