"""Sums the gradients that ranks make of their shares. Those of a model in parts are summed by FSDP2's own backward."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from trainer_service.engine.parallel.sharding import whole
from trainer_service.engine.parallel.tensor_parallel import TensorParallel, cut_of
from trainer_service.engine.rank_channels import Ranks

_PIECE = 1 << 18
"""Elements whose squares are added up in float32."""


def sum_gradients(parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
    """Sums gradients of parameters that are not in parts, in one collective. Others were summed by backward.

    With tensor parallel in two: over all ranks where each has a summand, over those with the same part of a layer where
    the rest of a group has other parts, or the same sum.
    """
    replicated = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
    if ranks.world_size == 1 or not replicated:
        return
    everywhere = [parameter for parameter in replicated if (cut := cut_of(parameter)) is None or cut.summand]
    if everywhere:
        _sum(everywhere, None)
    among_peers = [parameter for parameter in replicated if parameter not in {*everywhere}]
    if among_peers and (cut := cut_of(among_peers[0])) is not None:
        assert isinstance(cut.group, TensorParallel)
        _sum(among_peers, cut.group.peers)


def total_norm(parameters: Sequence[nn.Parameter], ranks: Ranks) -> float:
    """L2 norm of the gradients of parameters that have one, each counted once. Every rank calls this."""
    cuts = {p: cut for p in parameters if (cut := cut_of(p)) is not None and cut.dim is not None}
    norm = _norm([p.grad for p in parameters if p not in cuts])
    if not cuts:
        return norm
    # Those of the first group, so that all ranks add up the same numbers.
    norms = ranks.execution.gather(_norm([p.grad for p in cuts]))
    return math.hypot(norm, *(norms[rank] for rank in next(iter(cuts.values())).group.first))


def _norm(gradients: Sequence[Tensor | None]) -> float:
    found = [gradient for gradient in gradients if gradient is not None]
    if any(gradient.is_cuda or isinstance(gradient, DTensor) for gradient in found):
        return float(whole(torch.nn.utils.get_total_norm(found)))
    # On a CPU torch's norm adds up all squares of a tensor one behind the other, in float32, which costs an embedding
    # four digits, and takes longer than products of pieces, whose sum is made in float64.
    pieces = [piece for gradient in found for piece in gradient.reshape(-1).split(_PIECE)]
    return float(torch.stack([torch.dot(piece, piece) for piece in pieces]).double().sum().sqrt()) if pieces else 0.0


def _sum(parameters: Sequence[nn.Parameter], group: distributed.ProcessGroup | None) -> None:
    # A rank that had nothing to do has no gradients.
    flat = torch.cat(
        [
            torch.zeros_like(parameter).flatten() if parameter.grad is None else parameter.grad.flatten()
            for parameter in parameters
        ]
    )
    distributed.all_reduce(flat, group=group)
    for parameter, summed in zip(parameters, flat.split([one.numel() for one in parameters]), strict=True):
        parameter.grad = summed.view_as(parameter)
