"""How ranks on the CPU gather layers and sum gradients: FSDP2's two collectives, with fewer bytes sent and copied.

gloo reduces and scatters by reducing everything to everybody, on a copy: twice the bytes, a third buffer. Here each
rank sends every other its part, and adds up what it gets, in the order of the ranks. Buffers are used again, which
spares the caches new memory for each layer.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

_GATHERED = 2
"""Buffers in turn: while one is being taken apart, backward has the next layer gathered into another."""


def use_gloo_collectives(root: nn.Module, modules: Sequence[FSDPModule]) -> None:
    """Has a model's modules communicate this way.

    Args:
        root: Of the modules. It is gathered once for all layers, and is the largest: it keeps no buffers.
        modules: All of them.
    """
    gather, add = _for_layers()
    for module in modules:
        if module is root:
            module.set_custom_reduce_scatter(_Sum(keep=False))
        else:
            module.set_custom_all_gather(gather)
            module.set_custom_reduce_scatter(add)


@functools.cache
def _for_layers() -> "tuple[_Gather, _Sum]":
    """Of all models of this process, which go through them one after the other: buffers are there once."""
    return _Gather(), _Sum(keep=True)


class _Buffers:
    """Flat tensors of some sizes, to be used again."""

    def __init__(self) -> None:
        self._free: dict[tuple[int, torch.dtype], list[Tensor]] = {}

    def take(self, size: int, dtype: torch.dtype, *, spare: int = 0) -> Tensor:
        """One that is free, the one given first; a new one while no more than `spare` are."""
        free = self._free.get((size, dtype), [])
        return free.pop(0) if len(free) > spare else torch.empty(size, dtype=dtype)

    def give(self, tensor: Tensor) -> None:
        self._free.setdefault((tensor.numel(), tensor.dtype), []).append(tensor)


class _Gather(AllGather):
    """Gathers a layer's parts."""

    def __init__(self) -> None:
        self._buffers = _Buffers()

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        assert device.type == "cpu"
        # What was gathered before the last one has been taken apart since.
        taken = self._buffers.take(int(size[0]), dtype, spare=_GATHERED - 1)
        self._buffers.give(taken)
        return taken

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: distributed.ProcessGroup, async_op: bool = False
    ) -> Any:
        return distributed.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)


class _Sum(ReduceScatter):
    """Sums a layer's gradients, of which each rank gets its part.

    Args:
        keep: Keep buffers for the next layer.
    """

    def __init__(self, *, keep: bool) -> None:
        self._keep = keep
        self._buffers = _Buffers()

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """For what is summed, and for the sum, which stays taken: it becomes the gradient."""
        assert device.type == "cpu"
        return self._buffers.take(int(size[0]), dtype)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: distributed.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        assert op == distributed.ReduceOp.SUM
        assert not async_op
        parts = self._buffers.take(input_tensor.numel(), input_tensor.dtype)
        distributed.all_to_all_single(parts, input_tensor, group=group)
        first, *others = parts.view(group.size(), -1)
        output_tensor.copy_(first)
        for part in others:
            output_tensor.add_(part)
        if self._keep:
            self._buffers.give(parts)
            self._buffers.give(input_tensor)
