"""Token embeddings whose gradient goes where it belongs, row by row.

torch makes a gradient of the whole table for the few rows a forward read, and then adds it: for a small model on a CPU
the largest tensor of a backward that checkpoints its activations.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def add_rows_in_place(model: nn.Module) -> None:
    """Has a model's input embeddings add their gradient to `weight.grad` directly, where they are a plain table."""
    table: Any = getattr(model, "get_input_embeddings", lambda: None)()
    # Subclasses scale or otherwise change what they look up, and other options change the gradient.
    if type(table) is nn.Embedding and table.max_norm is None and not table.scale_grad_by_freq and not table.sparse:
        # The class is changed, not `forward`: that would refer to the table, and a table in a cycle outlives its model.
        table.__class__ = _Table


class _Table(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        if not (self.weight.requires_grad and torch.is_grad_enabled()):
            return F.embedding(input, self.weight)
        found = _Rows.apply(self.weight, input, self)
        assert isinstance(found, Tensor)
        return found


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_VD: Tensor, tokens: Tensor, table: nn.Embedding) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(tokens)
        ctx.table = table
        return F.embedding(tokens, weight_VD)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (tokens,) = ctx.saved_tensors
        weight, padding_idx = ctx.table.weight, ctx.table.padding_idx
        tokens_T, grad_TD = tokens.reshape(-1), grad.reshape(-1, grad.shape[-1]).to(weight.dtype)
        if padding_idx is not None:
            # As in torch, the padding token is not trained.
            grad_TD = grad_TD.masked_fill((tokens_T == padding_idx)[:, None], 0)
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        weight.grad.index_add_(0, tokens_T, grad_TD)
        return None, None, None
