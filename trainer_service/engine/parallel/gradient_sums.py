"""Sums the gradients that ranks make of their shares. Those of a model in parts are summed by FSDP2's own backward."""

from collections.abc import Iterable

import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor


def sum_gradients(parameters: Iterable[nn.Parameter], world_size: int) -> None:
    """Sums gradients of parameters that are whole on every rank, in one collective. Others were summed by backward."""
    replicated = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
    if world_size == 1 or not replicated:
        return
    # A rank that had nothing to do has no gradients.
    flat = torch.cat(
        [
            torch.zeros_like(parameter).flatten() if parameter.grad is None else parameter.grad.flatten()
            for parameter in replicated
        ]
    )
    distributed.all_reduce(flat)
    for parameter, summed in zip(replicated, flat.split([one.numel() for one in replicated]), strict=True):
        parameter.grad = summed.view_as(parameter)
