"""A head that several ranks have, each the rows of its part of the vocabulary.

Each rank makes the logits of its rows. With their log-sum-exps l_1, l_2, … and a target that one rank has,

    logsumexp(z) = logsumexp(l_1, l_2, …),  logprob_k = z_k − logsumexp(z)

so a token costs a number from each rank, and a target one. In the backward each rank has the gradient of its rows, and
a summand of that of the hidden states.

Shape suffixes: T tokens of a pack, R rows it answers, K targets a row.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed


@dataclass(frozen=True, eq=False)
class VocabularyPart:
    """The part that this rank has.

    Attributes:
        group: The ranks that have the whole, in the order of the vocabulary.
        start: The first token of this rank's.
        size: How many it has, as every other does.
    """

    group: Any
    start: int
    size: int

    def own(self, targets_RK: Tensor) -> tuple[Tensor, Tensor]:
        """Where targets are among this rank's rows, 0 where they are elsewhere; and which are here, bool."""
        rows_RK = targets_RK - self.start
        here_RK = (rows_RK >= 0) & (rows_RK < self.size)
        return rows_RK.masked_fill(~here_RK, 0), here_RK

    def put_together(self, lse_T: Tensor, found_RK: Tensor) -> tuple[Tensor, Tensor]:
        """The log-sum-exp over the vocabulary and the targets' logits, of all ranks, on all of them.

        Args:
            lse_T: Over this rank's rows.
            found_RK: Of targets that are here; 0 for others.
        """
        num_tokens = len(lse_T)
        own = torch.cat([lse_T, found_RK.flatten()])
        ranks = [torch.empty_like(own) for _ in range(distributed.get_world_size(self.group))]
        distributed.all_gather(ranks, own, group=self.group)
        all_ranks = torch.stack(ranks)
        return (
            torch.logsumexp(all_ranks[:, :num_tokens], dim=0),
            all_ranks[:, num_tokens:].sum(0).view(found_RK.shape),
        )


@dataclass(frozen=True)
class Targets:
    """Targets, as rows of a head that may be one rank's part.

    Attributes:
        rows_RK: Where they are among its rows; 0 for those that are elsewhere.
        here_RK: Which are here, bool; None for all.
        vocabulary: Of the head.
    """

    rows_RK: Tensor
    here_RK: Tensor | None = None
    vocabulary: VocabularyPart | None = None

    @classmethod
    def of(cls, targets_RK: Tensor, vocabulary: VocabularyPart | None) -> "Targets":
        """Targets, int64, of a head that has all of the vocabulary or that part."""
        return cls(targets_RK) if vocabulary is None else cls(*vocabulary.own(targets_RK), vocabulary)

    def only_here(self, values_RK: Tensor) -> Tensor:
        """Values of those that are here, and zeros."""
        return values_RK if self.here_RK is None else values_RK.masked_fill(~self.here_RK, 0.0)

    def put_together(self, lse_T: Tensor, found_RK: Tensor) -> tuple[Tensor, Tensor]:
        """Log-sum-exps and targets' logits over the whole vocabulary, given those of this head's rows."""
        if self.vocabulary is None:
            return lse_T, found_RK
        return self.vocabulary.put_together(lse_T, self.only_here(found_RK))
