"""Tensor parallel: the ranks of a group compute each layer together, each with its part of the layer's weights.

Ranks of a group are adjacent and run the same packs, so what goes between layers is the same on all of them, bit for
bit. A weight cut along its outputs takes inputs that every rank has, and each rank finds a summand of their gradient,
which is summed in the backward (`spread`). One cut along its inputs makes a summand of the outputs: those are summed in
the forward (`summed`).
"""

import functools
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from trainer_service.engine.rank_channels import Ranks

_CUT = "_gradwire_cut"
_SPREAD = "_gradwire_spread"


@dataclass(frozen=True, eq=False)
class RankGroup:
    """Ranks that have a parameter among them, each its part.

    Attributes:
        rank: This one in the group, from 0.
        size: Ranks of the group.
        group: They talk here.
        mesh: Ranks that have the same part as this one, which lies in parts on them (FSDP).
        first: The ranks of the first of such groups, in order.
    """

    rank: int
    size: int
    group: distributed.ProcessGroup
    mesh: DeviceMesh
    first: tuple[int, ...]

    def own(self, length: int) -> slice:
        """This rank's part of a dim of that length, which the group's size divides."""
        size = length // self.size
        return slice(self.rank * size, (self.rank + 1) * size)


@dataclass(frozen=True, eq=False)
class TensorParallel(RankGroup):
    """This rank's group.

    Attributes:
        peers: The ranks of `mesh`.
    """

    peers: distributed.ProcessGroup


@dataclass(frozen=True, eq=False)
class Cut:
    """How a parameter lies on a group.

    Attributes:
        group: The group.
        dim: The dim that it is cut along; None where it is whole on every rank.
        summand: Whether the gradient that a rank makes of one that is whole is a summand of its gradient.
    """

    group: RankGroup
    dim: int | None = None
    summand: bool = False


def tensor_parallel(ranks: Ranks) -> TensorParallel | None:
    """This rank's group; None where each rank computes layers by itself. Every rank calls this."""
    if ranks.tp_size == 1:
        return None
    return _arranged(ranks.rank, ranks.dp_replicate_size, ranks.fsdp_size, ranks.tp_size, ranks.timeout_s)


@functools.cache
def _arranged(rank: int, dp_replicate_size: int, fsdp_size: int, tp_size: int, timeout_s: float) -> TensorParallel:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    sizes, names = (dp_replicate_size, fsdp_size, tp_size), ("dp_replicate", "fsdp", "tp")
    mesh = init_device_mesh(kind, sizes, mesh_dim_names=names)
    # All ranks make all of them, in this order.
    timeout, world_size = timedelta(seconds=timeout_s), mesh.size()
    groups: list[Any] = [
        distributed.new_group([*range(first, first + tp_size)], timeout=timeout)
        for first in range(0, world_size, tp_size)
    ]
    peers: list[Any] = [
        distributed.new_group([*range(place, world_size, tp_size)], timeout=timeout) for place in range(tp_size)
    ]
    return TensorParallel(
        rank=rank % tp_size,
        size=tp_size,
        group=groups[rank // tp_size],
        mesh=mesh["fsdp"] if dp_replicate_size == 1 else mesh["dp_replicate", "fsdp"],
        first=tuple(range(tp_size)),
        peers=peers[rank % tp_size],
    )


def mark_cut(parameter: nn.Parameter, cut: Cut) -> None:
    """Says how a parameter lies on a group."""
    setattr(parameter, _CUT, cut)


def cut_of(parameter: Tensor) -> Cut | None:
    """How a parameter lies on a group; None where it is no group's."""
    return getattr(parameter, _CUT, None)


def whole_shape(parameter: Tensor) -> torch.Size:
    """Of all of a parameter."""
    cut, shape = cut_of(parameter), list(parameter.shape)
    if cut is not None and cut.dim is not None:
        shape[cut.dim] *= cut.group.size
    return torch.Size(shape)


def joined(own: Tensor, cut: Cut | None) -> Tensor:
    """What a group's ranks have of a tensor, put together on each of them, all of which call this."""
    if cut is None or cut.dim is None:
        return own
    own = own.contiguous()
    found = [torch.empty_like(own) for _ in range(cut.group.size)]
    distributed.all_gather(found, own, group=cut.group.group)
    return torch.cat(found, cut.dim)


def spread(x: Tensor, group: TensorParallel) -> Tensor:
    """What every rank of a group has, for each to make something else of: its gradient is the sum of theirs."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x
    # Several layers read the same: its gradient is then summed over them first, and over ranks once.
    found: Tensor | None = getattr(x, _SPREAD, None)
    if found is None:
        found = spread_anew(x, group)
        setattr(x, _SPREAD, found)
    return found


def spread_anew(parameter: Tensor, group: TensorParallel) -> Tensor:
    """The same of what stays from pass to pass."""
    found = _Spread.apply(parameter, group)
    assert isinstance(found, Tensor)
    return found


def summed(x: Tensor, group: TensorParallel) -> Tensor:
    """The sum of what a group's ranks made, on each of them."""
    found = _Summed.apply(x, group)
    assert isinstance(found, Tensor)
    return found


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorParallel) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.group = group
        # No view, which would hold what it is kept on: neither would ever be freed.
        return x.data

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _sum(grad, ctx.group), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorParallel) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _sum(x, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None


def _sum(x: Tensor, group: TensorParallel) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total, group=group.group)
    return total
