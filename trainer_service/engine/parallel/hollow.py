"""Hollow models: all modules, and parameters that have a shape and take no memory."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from gradwire.errors import error
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel


def hollow_like(loaded: PreTrainedModel) -> PreTrainedModel:
    """A hollow model of the kind of one that lies in parts, with its buffers.

    Raises:
        UnimplementedError: NOT_IMPLEMENTED: made from its configuration it has other parameters.
    """
    plain = next(kind for kind in type(loaded).__mro__ if not issubclass(kind, FSDPModule))
    config: Any = loaded.config
    if hasattr(config, "distributed_config"):
        # Of how it was loaded. It does not belong in what is exported.
        del config.distributed_config
    with torch.device("meta"):
        hollow: Any = plain(config)  # pyright: ignore[reportCallIssue]
    hollow.tie_weights()
    shapes = {name: tuple(parameter.shape) for name, parameter in hollow.named_parameters()}
    wanted = {name: tuple(parameter.shape) for name, parameter in loaded.named_parameters()}
    if shapes != wanted:
        name = next(iter({*shapes.items()} ^ {*wanted.items()}))[0]
        raise error("NOT_IMPLEMENTED", f"{plain.__name__} cannot be put on many ranks: {name} comes out otherwise.")
    device = next(loaded.parameters()).device
    replace_parameters(hollow, {parameter: weightless(parameter, device) for parameter in hollow.parameters()})
    buffers = dict(loaded.named_buffers())
    for name, _ in list(hollow.named_buffers()):
        module, _, own = name.rpartition(".")
        hollow.get_submodule(module)._buffers[own] = buffers[name]
    for name in ("generation_config", "_weight_conversions", "name_or_path"):
        if name in vars(loaded):
            setattr(hollow, name, getattr(loaded, name))
    return hollow.eval()


def weightless(
    parameter: Tensor, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> nn.Parameter:
    """A parameter of the same shape that takes no memory, where that one is unless another device is given."""
    zero = torch.zeros((), dtype=dtype, device=device or parameter.device)
    return nn.Parameter(zero.expand(parameter.shape), requires_grad=False)


def copy_with(model: PreTrainedModel, parameters: Mapping[nn.Parameter, nn.Parameter]) -> PreTrainedModel:
    """Modules of its own, buffers shared; these parameters in place of the model's, and the rest shared."""
    tensors: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, tensors | {id(old): new for old, new in parameters.items()})


def replace_parameters(model: nn.Module, parameters: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Puts parameters in the place of others, wherever they are, so that what was tied stays it."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter in parameters:
                module._parameters[name] = parameters[parameter]
