"""How ranks on the CPU gather parameters and sum gradients: FSDP2's two collectives, with less sent and copied.

torch's own on gloo gather into buffers of their own and copy from there, and reduce and scatter by reducing everything
to everybody. Here each rank sends every other what it needs, from where it lies to where it belongs. What ranks sum is
added up in their order. A gather of 14 MB between two ranks takes 6 ms in place of 16, a sum 10 in place of 18.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter


def use_gloo_collectives(root: nn.Module, modules: Sequence[FSDPModule]) -> None:
    """Has a model's modules communicate this way.

    Args:
        root: Of the modules, which is far larger than the others where there are many.
        modules: All of them.
    """
    for module in modules:
        module.set_custom_all_gather(Gather())
        module.set_custom_reduce_scatter(SumInOrder(keep=False) if module is root else _sum_of_layers())


@functools.cache
def _sum_of_layers() -> "SumInOrder":
    """For all models of this process, which sum one layer after the other: buffers are there once."""
    return SumInOrder(keep=True)


class Gather(AllGather):
    """Gathers parts. It is done when a call returns."""

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Room for the whole. New each time: it may be read later than the next is gathered."""
        return torch.empty(int(size[0]), dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: distributed.ProcessGroup, async_op: bool = False
    ) -> None:
        assert not async_op
        places = output_tensor.view(group.size(), -1)
        assert places[group.rank()].data_ptr() == input_tensor.data_ptr()
        _exchange(group, lambda _: input_tensor, lambda rank: places[rank])


class SumInOrder(ReduceScatter):
    """Sums a module's gradients, of which each rank gets its part. It is done when a call returns.

    Args:
        keep: Keep buffers for the next module, which spares the caches new memory for each.
    """

    def __init__(self, *, keep: bool) -> None:
        self._keep = keep
        self._free: dict[tuple[int, torch.dtype], list[Tensor]] = {}

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Room for what is summed, or for this rank's part of the sum, which stays taken: it becomes the gradient."""
        assert device.type == "cpu"
        return self._take(int(size[0]), dtype)

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
        got = self._take(input_tensor.numel(), input_tensor.dtype)
        own, others = input_tensor.view(group.size(), -1), got.view(group.size(), -1)
        _exchange(group, lambda rank: own[rank], lambda rank: others[rank])
        parts = [own[rank] if rank == group.rank() else others[rank] for rank in range(group.size())]
        torch.add(parts[0], parts[1], out=output_tensor)
        for part in parts[2:]:
            output_tensor.add_(part)
        if self._keep:
            self._free.setdefault((got.numel(), got.dtype), []).extend([got, input_tensor])

    def _take(self, size: int, dtype: torch.dtype) -> Tensor:
        free = self._free.get((size, dtype))
        return free.pop() if free else torch.empty(size, dtype=dtype)


def _exchange(
    group: distributed.ProcessGroup, sent: Callable[[int], Tensor], received: Callable[[int], Tensor]
) -> None:
    """Each rank sends one tensor to every other, and waits for theirs."""
    others = [(group.rank() + distance) % group.size() for distance in range(1, group.size())]
    works = [distributed.isend(sent(rank), group=group, group_dst=rank) for rank in others]
    works += [distributed.irecv(received(rank), group=group, group_src=rank) for rank in reversed(others)]
    for work in works:
        assert work is not None
        work.wait()
