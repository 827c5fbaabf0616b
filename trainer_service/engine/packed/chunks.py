"""A pack cut into chunks of tokens, each with the rows it answers and their targets.

Shape suffixes: T tokens of the pack, C tokens of a chunk, R rows (a row is answered by one token; with shared
beginnings a token answers several), K targets per row, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_FEW = 0.9
"""If fewer than this fraction of tokens have a gradient, backward skips the others."""


@dataclass(frozen=True)
class Chunk:
    """Tokens whose logits are computed together, and the rows they answer.

    Attributes:
        tokens: Where they are in the pack: a slice, or int64 numbers.
        rows: Where their rows are: a slice, or int64 numbers.
        token_of_row: Which of the tokens answers each of the rows: int64, or slice(None) if each has one row.
    """

    tokens: Any
    rows: Any
    token_of_row: Any

    def at_targets(self, values_CV: Tensor, targets_RK: Tensor) -> Tensor:
        """The value of each of its rows at each of the row's targets."""
        return values_CV[self.token_of_row].gather(-1, targets_RK[self.rows])

    def add_at_targets(self, values_CV: Tensor, targets_RK: Tensor, added_RK: Tensor) -> None:
        """Adds in place to the values that `at_targets` reads."""
        targets, added = targets_RK[self.rows], added_RK[self.rows]
        if isinstance(self.token_of_row, slice):
            values_CV.scatter_add_(-1, targets, added)
        else:
            values_CV.index_put_((self.token_of_row[:, None].expand_as(targets), targets), added, accumulate=True)

    def only(self, counts_C: Tensor) -> "Chunk":
        """The chunk with only those tokens, and their rows."""
        kept_C = counts_C.nonzero()[:, 0]
        kept_T = kept_C + self.tokens.start
        if isinstance(self.token_of_row, slice):
            return Chunk(kept_T, kept_T, self.token_of_row)
        new_number_C = torch.cumsum(counts_C, 0) - 1
        kept_R = counts_C[self.token_of_row].nonzero()[:, 0]
        return Chunk(kept_T, self.rows[kept_R], new_number_C[self.token_of_row[kept_R]])


@dataclass(frozen=True)
class Rows:
    """The tokens of a pack, and the rows they answer.

    Attributes:
        num_tokens: T.
        order_R: Rows sorted by their token; None if row r is token r.
        token_R: Token of each row in that order.
        bounds: Where each token's rows begin in that order, [T + 1], on the host.
        token_of_row: Token of each row in their own order: int64, or slice(None) if row r is token r.
    """

    num_tokens: int
    order_R: Tensor | None
    token_R: Tensor | None
    bounds: list[int]
    token_of_row: Any

    @classmethod
    def of(cls, token_of_row_R: Tensor | None, num_tokens: int) -> "Rows":
        """The rows of a pack; `token_of_row_R` as in linear_logprobs."""
        if token_of_row_R is None:
            return cls(num_tokens, None, None, [], slice(None))
        token_R, order_R = torch.sort(token_of_row_R, stable=True)
        tokens = torch.arange(num_tokens + 1, device=token_R.device)
        return cls(num_tokens, order_R, token_R, torch.searchsorted(token_R, tokens).tolist(), token_of_row_R)

    def chunk(self, tokens: slice) -> Chunk:
        """A chunk of adjacent tokens."""
        if self.order_R is None or self.token_R is None:
            return Chunk(tokens, tokens, slice(None))
        rows = slice(self.bounds[tokens.start], self.bounds[tokens.stop])
        return Chunk(tokens, self.order_R[rows], self.token_R[rows] - tokens.start)

    def chunks(self, chunk_tokens: int) -> Iterator[Chunk]:
        """All tokens, at most that many at a time."""
        return (self.chunk(tokens) for tokens in self._slices(chunk_tokens))

    def chunks_with_gradient(self, grad_RK: Tensor, chunk_tokens: int) -> Iterator[Chunk]:
        """Like `chunks`, but without tokens that have no gradient, if enough of them have none."""
        # A token counts if any of its targets has a gradient, even where they cancel.
        counts_T = self.sum_by_token((grad_RK != 0).any(-1).float()) > 0
        slices = list(self._slices(chunk_tokens))
        # All at once: on CUDA, reading a number waits for the device.
        numbers_counted = torch.stack([counts_T[tokens].sum() for tokens in slices]).tolist()
        for tokens, num_counted in zip(slices, numbers_counted, strict=True):
            if not num_counted:
                continue
            chunk = self.chunk(tokens)
            yield chunk.only(counts_T[tokens]) if num_counted < _FEW * (tokens.stop - tokens.start) else chunk

    def sum_by_token(self, values_R: Tensor) -> Tensor:
        """Σ over the rows of each token, [T]."""
        if self.order_R is None or self.token_R is None:
            return values_R
        return values_R.new_zeros(self.num_tokens).index_add_(0, self.token_R, values_R[self.order_R])

    def _slices(self, chunk_tokens: int) -> Iterator[slice]:
        for start in range(0, self.num_tokens, chunk_tokens):
            yield slice(start, min(start + chunk_tokens, self.num_tokens))
