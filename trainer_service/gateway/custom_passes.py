"""A custom loss of an unmodified client at one forward.

Such a client sends a forward, computes its loss, and sends a cross_entropy over the same data, whose weights are minus
the gradients. Here the forward keeps its graph; the second pass is recognised by its data and becomes the backward of
that graph, with minus its weights. Both give the same gradients, and the second saves a forward.
"""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from gradwire._wire.codec import Batch

_MAX_KEPT = 64
"""The most forwards that wait for their second pass; older ones are given up."""


def digest_of(batch: Batch) -> bytes:
    """A digest of what two passes over the same data have in common: tokens, their positions and targets."""
    digest = hashlib.sha256()
    for array in (batch.tokens_T, batch.cu_seqlens, batch.loss_fn_inputs["target_tokens"]):
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


@dataclass(frozen=True)
class KeptForward:
    """A forward that keeps its graph."""

    run_seq_id: int
    """Its number in the run."""
    attach: int
    """Of which hold on the run the graph is."""


class KeptForwards:
    """The forwards of one model whose graph waits for a second pass."""

    def __init__(self) -> None:
        self._kept: OrderedDict[bytes, list[KeptForward]] = OrderedDict()

    def keep(self, digest: bytes, forward: KeptForward) -> None:
        """Notes a forward that is about to keep its graph."""
        self._kept.setdefault(digest, []).append(forward)

    def take(self, digest: bytes, *, attach: int) -> KeptForward | None:
        """Takes out the oldest forward over this data whose graph is there."""
        forwards = [forward for forward in self._kept.pop(digest, []) if forward.attach == attach]
        if not forwards:
            return None
        if forwards[1:]:
            self._kept[digest] = forwards[1:]
        return forwards[0]

    def give_up(self, *, all_of_them: bool) -> list[int]:
        """Numbers, in the run, of forwards whose graphs are to be dropped: all, or those beyond what is kept."""
        given_up: list[int] = []
        while self._kept and (all_of_them or sum(map(len, self._kept.values())) > _MAX_KEPT):
            digest, forwards = self._kept.popitem(last=False)
            given_up.append(forwards[0].run_seq_id)
            if forwards[1:]:
                self._kept[digest] = forwards[1:]
                self._kept.move_to_end(digest, last=False)
        return given_up


def surrogate_loss(batch: Batch, logprobs_TK: npt.NDArray[np.float32]) -> float:
    """cross_entropy of this batch, −Σ weight · logprob; a target without a weight counts as 0."""
    weights_TK = batch.loss_fn_inputs["weights"].astype(np.float64)
    counts_TK = weights_TK != 0
    return -float(np.sum(weights_TK[counts_TK] * logprobs_TK.astype(np.float64)[counts_TK]))
