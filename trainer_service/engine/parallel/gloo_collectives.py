"""How ranks on the CPU sum gradients in parts: a collective for FSDP2 that sends and copies less than its own.

gloo reduces and scatters by reducing everything to everybody, on a copy: twice the bytes, and one buffer more. Here
each rank sends every other its part, and adds up what it gets, in the order of the ranks.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter


def use_sums_in_order(root: nn.Module, modules: Sequence[FSDPModule]) -> None:
    """Has a model's modules sum their gradients this way.

    Args:
        root: Of the modules, which is far larger than the others where there are many.
        modules: All of them.
    """
    for module in modules:
        module.set_custom_reduce_scatter(SumInOrder(keep=False) if module is root else _of_layers())


@functools.cache
def _of_layers() -> "SumInOrder":
    """For all models of this process, which sum one layer after the other: buffers are there once."""
    return SumInOrder(keep=True)


class SumInOrder(ReduceScatter):
    """Sums a module's gradients, of which each rank gets its part. On the CPU it is done when a call returns.

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
        parts = self._take(input_tensor.numel(), input_tensor.dtype)
        distributed.all_to_all_single(parts, input_tensor, group=group)
        first, *others = parts.view(group.size(), -1)
        output_tensor.copy_(first)
        for part in others:
            output_tensor.add_(part)
        if self._keep:
            self._free.setdefault((parts.numel(), parts.dtype), []).extend([parts, input_tensor])

    def _take(self, size: int, dtype: torch.dtype) -> Tensor:
        free = self._free.get((size, dtype))
        return free.pop() if free else torch.empty(size, dtype=dtype)
