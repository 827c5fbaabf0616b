"""Puts fused functions where a model's modules compute the same, found out by trying each module."""

import logging
from collections import Counter

from torch import nn

from trainer_service.engine.fused.gated_mlp import fused_gated_mlp
from trainer_service.engine.fused.linear import fused_linear
from trainer_service.engine.fused.module import Fused
from trainer_service.engine.fused.rms_norm import fused_norm
from trainer_service.engine.fused.rotary import fused_rotation

logger = logging.getLogger(__name__)

_KINDS = {
    "norms": fused_norm,
    "gated MLPs": fused_gated_mlp,
    "rotations": fused_rotation,
    "linear layers": fused_linear,
}


def fuse(model: nn.Module) -> None:
    """Fuses what can be of a freshly loaded model, in float32. What it computes stays, to float32's rounding.

    A module's class is changed, not its `forward`, which would refer to the module: one in a cycle outlives its model.
    """
    counts: Counter[str] = Counter()
    for module in model.modules():
        if isinstance(module, Fused):
            continue
        for kind, find in _KINDS.items():
            if (found := find(module)) is not None:
                module.__class__ = found
                counts[kind] += 1
    if counts:
        logger.info("Fused.", extra={"fields": dict(counts)})
