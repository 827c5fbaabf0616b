"""How much of the device's memory goes to what; decided once, when the model is loaded."""

from dataclasses import dataclass

from trainer_service.engine.device import Device
from trainer_service.engine.models.runner import Traits
from trainer_service.worker_config import EngineSettings

_ACTIVATIONS = 0.5
"""Part of what parameters, gradients and optimizer leave; the rest is for further runs and passing needs."""
_ADAPTERS = 0.25
"""Part of the same for adapters, with their gradients and optimizer."""
_ONE_PASS = 0.25
"""Part of what activations get for the pass under way; the rest may be held by graphs of custom losses."""
_MIN_PACK_TOKENS, _MAX_PACK_TOKENS = 256, 8192
"""Smaller packs leave cores idle, larger ones are no faster."""
_MIN_ACTIVATION_BYTES = 256 << 20
_MIN_ADAPTER_BYTES = 256 << 20
_FLOAT_BYTES = 4
_FLOATS_PER_PARAMETER = 4
"""The parameter, its gradient and the optimizer's two moments."""


@dataclass(frozen=True)
class MemoryPlan:
    """How much memory each use may take.

    Attributes:
        max_pack_tokens: See EngineSettings.
        max_held_graph_bytes: See EngineSettings.
        max_device_adapter_bytes: See EngineSettings; None for no limit.
        pass_bytes: What the activations of one forward may take before "auto" checkpoints them.
        logits_bytes: What logits kept for backward may take.
    """

    max_pack_tokens: int
    max_held_graph_bytes: int
    max_device_adapter_bytes: int | None
    pass_bytes: int
    logits_bytes: int


def plan_memory(device: Device, traits: Traits, settings: EngineSettings, *, num_parameters: int) -> MemoryPlan:
    """Budgets for a model, the same at every start on the same machine.

    Args:
        device: Says how much memory there is.
        traits: Say how much a token holds.
        settings: What the trainer's owner has decided.
        num_parameters: Parameters, their gradients and the optimizer's state come first.
    """
    free = device.total_bytes() - _FLOATS_PER_PARAMETER * _FLOAT_BYTES * num_parameters
    activations = max(_MIN_ACTIVATION_BYTES, int(free * _ACTIVATIONS))
    pass_bytes = int(activations * _ONE_PASS)
    token_bytes = held_bytes_per_token(traits, settings.activation_checkpointing == "on")
    fitting = pass_bytes // max(1, token_bytes)
    adapters = None if device.torch_device.type == "cpu" else max(_MIN_ADAPTER_BYTES, int(free * _ADAPTERS))
    return MemoryPlan(
        max_pack_tokens=settings.max_pack_tokens or min(max(fitting, _MIN_PACK_TOKENS), _MAX_PACK_TOKENS),
        max_held_graph_bytes=settings.max_held_graph_bytes or activations - pass_bytes,
        max_device_adapter_bytes=settings.max_device_adapter_bytes or adapters,
        pass_bytes=pass_bytes,
        logits_bytes=pass_bytes // 2,
    )


def held_bytes_per_token(traits: Traits, checkpointing: bool) -> int:
    """What a forward's graph holds a token, bytes, logits apart."""
    if checkpointing and traits.checkpointed_bytes_per_token:
        return traits.checkpointed_bytes_per_token
    return traits.held_bytes_per_token
