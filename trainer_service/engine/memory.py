"""How the device's memory is divided; decided once, when the model is loaded."""

from dataclasses import dataclass

from trainer_service.engine.device import Device
from trainer_service.engine.models.runner import Traits
from trainer_service.worker_config import EngineSettings

_ACTIVATIONS = 0.5
"""Fraction of what the model leaves; the rest is for further runs and temporary needs."""
_ADAPTERS = 0.25
"""Fraction of the same for adapters, with their gradients and optimizer."""
_ONE_PASS = 0.25
"""Fraction of the memory for activations that is for the pass under way; graphs of custom losses may hold the rest."""
_GATHERED = 0.25
"""Fraction of what the model leaves up to which "auto" has whole parameters and gradients while a batch is computed."""
_SAMPLED = 0.5
"""Fraction of the rest up to which "auto" has a whole model on each rank to sample from."""
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
        keeps_gathered: Whether what ranks gather of a model stays until the end of a batch.
        samples_in_parts: Whether what is sampled from stays in parts, and is gathered layer by layer.
    """

    max_pack_tokens: int
    max_held_graph_bytes: int
    max_device_adapter_bytes: int | None
    pass_bytes: int
    logits_bytes: int
    keeps_gathered: bool = False
    samples_in_parts: bool = False


def training_bytes(num_parameters: int) -> int:
    """What parameters take that train, with their gradients and optimizer state."""
    return _FLOATS_PER_PARAMETER * _FLOAT_BYTES * num_parameters


def parameter_bytes(num_parameters: int) -> int:
    """What parameters take in float32."""
    return _FLOAT_BYTES * num_parameters


def gathered_bytes(num_parameters: int) -> int:
    """What whole parameters take and their gradients before they are summed, of a model in parts."""
    return 2 * _FLOAT_BYTES * num_parameters


def plan_memory(
    device: Device,
    traits: Traits,
    settings: EngineSettings,
    *,
    model_bytes: int,
    gathered_bytes: int = 0,
    sampled_bytes: int = 0,
) -> MemoryPlan:
    """Budgets for a model, the same at every start on the same machine.

    Args:
        device: Its total memory counts.
        traits: Give the memory per token.
        settings: Settings that replace what is decided here.
        model_bytes: What comes first: a model's parameters, and what they need to train if they do.
        gathered_bytes: Of a model in parts, what would be gathered of it during a batch; 0 where it is whole.
        sampled_bytes: Of a model in parts, what it takes whole to sample from; 0 where it is whole.
    """
    free = device.total_bytes() - model_bytes
    keeps_gathered = settings.fsdp_reshard_after_forward == "never"
    if settings.fsdp_reshard_after_forward == "auto":
        keeps_gathered = 0 < gathered_bytes <= _GATHERED * free
    if keeps_gathered:
        free -= gathered_bytes
    fits = settings.sampling_reshard_after_forward == "never"
    if settings.sampling_reshard_after_forward == "auto":
        fits = sampled_bytes <= _SAMPLED * free
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
        keeps_gathered=keeps_gathered,
        samples_in_parts=sampled_bytes > 0 and not fits,
    )


def held_bytes_per_token(traits: Traits, checkpointing: bool) -> int:
    """Bytes that a forward's graph holds per token, without logits."""
    if checkpointing and traits.checkpointed_bytes_per_token:
        return traits.checkpointed_bytes_per_token
    return traits.held_bytes_per_token
