"""A pack on the device, and how it goes through the model.

Shape suffixes: T tokens of the pack, R rows of the batch it answers, K targets per row (absent if targets are [T]).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from trainer_service.engine.device import Device
from trainer_service.engine.losses.loss import LossInputs
from trainer_service.engine.memory import MemoryPlan, gathered_bytes, held_bytes_per_token, plan_memory
from trainer_service.engine.models import runner
from trainer_service.engine.models.runner import Traits
from trainer_service.engine.packed.attention import PackAttention, pack_in_use
from trainer_service.engine.parallel.shares import Place
from trainer_service.engine.rank_channels import Channel, Ranks
from trainer_service.worker_config import Checkpointing, EngineSettings

_FLOAT_BYTES = 4


@dataclass(frozen=True)
class Columns:
    """A batch on the device, copied there column by column."""

    tokens_T: Tensor
    targets_TK: Tensor
    inputs: Mapping[str, Tensor]


@dataclass(frozen=True)
class Forwards:
    """How every microbatch of an engine goes through a model.

    Attributes:
        device: Where models and microbatches are.
        traits: What the architecture allows.
        memory: How much memory each use may take.
        checkpointing: See EngineSettings.
        vocab_size: Width of the head.
    """

    device: Device
    traits: Traits
    memory: MemoryPlan
    checkpointing: Checkpointing
    vocab_size: int

    def checkpoints(self, num_tokens: int) -> bool:
        """Whether a forward of that many tokens recomputes its activations in the backward."""
        if self.checkpointing != "auto":
            return self.checkpointing == "on"
        return num_tokens * self.traits.held_bytes_per_token > self.memory.pass_bytes

    def keeps_logits(self, num_tokens: int) -> bool:
        """Whether a forward of that many tokens keeps its logits for the backward."""
        fits = num_tokens * self.vocab_size * _FLOAT_BYTES <= self.memory.logits_bytes
        return fits and not self.checkpoints(num_tokens)

    def held_bytes(self, num_tokens: int) -> int:
        """Memory that the graph of a forward of that many tokens holds."""
        logits = self.vocab_size * _FLOAT_BYTES if self.keeps_logits(num_tokens) else 0
        return num_tokens * (held_bytes_per_token(self.traits, self.checkpoints(num_tokens)) + logits)


@dataclass(frozen=True)
class ModelSize:
    """What of a model decides how much of it fits.

    Attributes:
        num_gathered: Parameters that a rank gathers; 0 where it has all.
        model_bytes: What this rank's part takes before anything runs; see plan_memory.
        whole_bytes: What all its parameters take, as they are kept.
        vocab_size: Logits a token.
    """

    num_gathered: int = 0
    model_bytes: int = 0
    whole_bytes: int = 0
    vocab_size: int = 0


def plan_forwards(device: Device, traits: Traits, settings: EngineSettings, ranks: Ranks, size: ModelSize) -> Forwards:
    """Forwards with their memory divided alike on all ranks, all of which call this; see plan_memory."""
    plan = plan_memory(
        device,
        traits,
        settings,
        model_bytes=size.model_bytes,
        gathered_bytes=gathered_bytes(size.num_gathered),
        sampled_bytes=0 if ranks.fsdp_size == 1 or ranks.tp_size > 1 else size.whole_bytes,
    )
    memory = MemoryPlan(**ranks.execution.tell(asdict(plan)))
    return Forwards(device, traits, memory, settings.activation_checkpointing, size.vocab_size)


class Microbatch:
    """One pack, ready to run.

    Args:
        place: The rows of the batch it answers, and what other ranks run meanwhile.
        columns: The batch.
        forwards: How it goes through a model.
    """

    def __init__(self, place: Place, columns: Columns, forwards: Forwards) -> None:
        pack = self.pack = place.pack
        self.number = place.number
        """Of its pack in the batch; None for one that answers nothing."""
        self.round = place.round
        """What all ranks run meanwhile."""
        self._forwards = forwards
        self._attention = PackAttention.of(pack) if forwards.traits.packed else None
        self.rows_R = self._put(pack.rows_R)
        self.tokens_T = columns.tokens_T[self._put(pack.token_rows_T)]
        self._positions_T = self._put(pack.positions_T)
        self._token_of_row_R = None if pack.token_of_row_R is None else self._put(pack.token_of_row_R)
        self._targets_RK = columns.targets_TK[self.rows_R]
        self._inputs = {name: values[self.rows_R] for name, values in columns.inputs.items()}

    @property
    def held_bytes(self) -> int:
        """Memory that its graph holds; where ranks differ, the most that one of theirs does."""
        return self._forwards.held_bytes(self.round.longest)

    def logprobs(self, model: PreTrainedModel) -> Tensor:
        """Logprobs of the rows' targets, float32, with a graph if grad is enabled."""
        forwards, num_tokens = self._forwards, self.round.longest
        with forwards.device.autocast(), pack_in_use(self._attention):
            return runner.run(
                model,
                forwards.traits,
                tokens_T=self.tokens_T,
                positions_T=self._positions_T,
                targets_RK=self._targets_RK,
                token_of_row_R=self._token_of_row_R,
                num_rows=self.pack.num_rows,
                keep_logits=forwards.keeps_logits(num_tokens),
                compute_dtype=forwards.device.compute_dtype,
                checkpointing=torch.is_grad_enabled() and forwards.checkpoints(num_tokens),
            )

    def backward(self, output: Tensor, gradient: Tensor | None = None) -> None:
        """Backward of what was computed from `logprobs`."""
        with pack_in_use(self._attention):
            output.backward(gradient)

    def loss_inputs(self, logprobs_RK: Tensor) -> LossInputs:
        """The inputs of a built-in loss."""
        return LossInputs(logprobs_RK, self._inputs, self._put(self.pack.cu_seqlens))

    def _put(self, array: npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(self._forwards.device.torch_device, non_blocking=True)


def gather(pieces: list[tuple[Microbatch, Tensor]], like: Tensor, channel: Channel) -> npt.NDArray[np.float32]:
    """Per-row values of all microbatches, of all ranks, in the batch's order, on the host.

    Args:
        pieces: This rank's microbatches, each with the values of its rows.
        like: A tensor with the whole's shape, on the device.
        channel: To the other ranks, all of which call this.
    """
    whole = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
    for microbatch, values in pieces:
        whole[microbatch.rows_R] = values.detach()
    found: npt.NDArray[Any] = whole.cpu().numpy()
    channel.put_together(found)
    return found
