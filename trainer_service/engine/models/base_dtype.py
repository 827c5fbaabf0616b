"""In how many bits a trainer keeps its base model: --base-dtype."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from trainer_service.engine.device import Device
from trainer_service.engine.models.export import stored_dtype
from trainer_service.engine.models.half import halved
from trainer_service.engine.models.lora_targets import Targets
from trainer_service.engine.models.quantized import check_base_dtype, quantize
from trainer_service.engine.rank_channels import Ranks
from trainer_service.worker_config import QUANTIZED, BaseDtype


class KeptBase:
    """How copies of a base model are kept.

    Args:
        asked: The setting.
        device: Where they are.
        folder: Of the model's files.
        ranks: Share them.

    Raises:
        InvalidArgumentError: INVALID_FIELD: it cannot be had here.
    """

    def __init__(self, asked: BaseDtype, device: Device, folder: Path, ranks: Ranks) -> None:
        check_base_dtype(asked, device.torch_device, world_size=ranks.world_size)
        self.dtype: BaseDtype = "float32" if asked == "auto" else asked
        """Of the matrices of every copy; but for float32 nothing of it trains."""
        # Nothing is lost then, and nothing comes out otherwise.
        lossless = device.compute_dtype == torch.bfloat16 and stored_dtype(folder) == "bfloat16"
        # Layers that are cut stay as they are (fleet/mesh.py).
        self._halves_shared = asked == "auto" and lossless and ranks.tp_size == 1

    @property
    def trains(self) -> bool:
        """Whether runs can train all parameters of a copy."""
        return self.dtype == "float32"

    def copy(self, model: PreTrainedModel, targets: Targets) -> PreTrainedModel:
        """A copy just loaded as it is kept: itself, or another in its place. Every rank must call this."""
        if self.dtype == "bfloat16":
            return halved(model, targets)
        if self.dtype in QUANTIZED:
            quantize(model, {*targets.attn, *targets.mlp} - targets.stacked, self.dtype)
        return model

    def shared_copy(self, model: PreTrainedModel, targets: Targets) -> PreTrainedModel:
        """The same of the copy beside which adapters train, which is frozen."""
        return halved(model, targets) if self._halves_shared else model
