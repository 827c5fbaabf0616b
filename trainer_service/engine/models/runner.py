"""How a pack, or one sequence, goes through a model, as its architecture allows.

Shape suffixes: T tokens of one pack, D hidden size, R rows it answers, K targets a row (absent where targets are [R]).
"""

import contextlib
import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from trainer_service.engine.models.embedding import add_rows_in_place
from trainer_service.engine.models.lora import low_rank_of
from trainer_service.engine.packed.attention import ATTENTION
from trainer_service.engine.packed.logprobs import Head, linear_logprobs, target_logprobs
from trainer_service.engine.parallel.sharding import forward_of


@dataclass(frozen=True)
class HeadTraits:
    """What a model does between its output embedding and its logits; see logprobs.Head."""

    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class Traits:
    """What an architecture allows.

    Attributes:
        attention: Name of the attention implementation the model was loaded with.
        why_not_packed: Why sequences go one at a time; empty where they go packed.
        why_not_shared: Why common beginnings are computed for each sequence; empty where they are computed once.
        head: How hidden states become logits; None where only the model itself knows, and full logits are made.
        held_bytes_per_token: What a forward's graph holds a token, logits apart.
        checkpointed_bytes_per_token: The same with activation checkpointing; 0 where the architecture cannot.
    """

    attention: str
    why_not_packed: str = ""
    why_not_shared: str = ""
    head: HeadTraits | None = None
    held_bytes_per_token: int = 0
    checkpointed_bytes_per_token: int = 0

    @property
    def batching(self) -> str:
        """How sequences are batched, in a few words, for GetServerInfo."""
        if self.why_not_packed:
            return f"one sequence at a time: {self.why_not_packed}"
        shared = f"no shared beginnings: {self.why_not_shared}" if self.why_not_shared else "shared beginnings once"
        full = "" if self.head is not None else ", full logits"
        return f"packed, {shared}{full}"


def prepare(model: PreTrainedModel, traits: Traits) -> None:
    """Readies a freshly loaded model of the architecture that `traits` were found for."""
    if not traits.why_not_packed:
        use_attention(model, ATTENTION)
    add_rows_in_place(model)
    for layer in checkpointable_layers(model):
        # A layer checkpoints only in training mode, where it must not drop anything out.
        for name, value in vars(layer).items():
            if "drop" in name and isinstance(value, float):
                setattr(layer, name, 0.0)
        # This is where transformers' own gradient_checkpointing_enable puts it.
        recompute: Any = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        layer._gradient_checkpointing_func = recompute


def run(model: PreTrainedModel, traits: Traits, **inputs: Any) -> Tensor:
    """Logprobs of the rows' targets: see `forward`, which a sharded model runs as its own."""
    sharded = forward_of(model)
    return forward(model, traits, **inputs) if sharded is None else sharded(traits, **inputs)


def forward(
    model: PreTrainedModel,
    traits: Traits,
    *,
    tokens_T: Tensor,
    positions_T: Tensor,
    targets_RK: Tensor,
    token_of_row_R: Tensor | None,
    keep_logits: bool,
    compute_dtype: torch.dtype,
    checkpointing: bool,
) -> Tensor:
    """Logprobs of the rows' targets.

    Args:
        model: Prepared.
        traits: Its architecture's.
        tokens_T: Token ids, int64: a pack, which is in use (attention.pack_in_use), or one sequence.
        positions_T: Of the tokens in their sequences, int64.
        targets_RK: Token ids, int64, [R] or [R, K].
        token_of_row_R: See logprobs.linear_logprobs.
        keep_logits: See logprobs.linear_logprobs.
        compute_dtype: See logprobs.linear_logprobs.
        checkpointing: Compute layers' activations again in backward in place of holding them.

    Returns:
        float32 with grad where grad is enabled, shaped as targets_RK.
    """
    inputs: dict[str, Any] = {"input_ids": tokens_T[None], "use_cache": False}
    if not traits.why_not_packed:
        inputs["position_ids"] = positions_T[None]
    with checkpointed(model) if checkpointing else contextlib.nullcontext():
        if traits.head is None:
            # Not through a call, which of a sharded model is what this runs in.
            return target_logprobs(model.forward(**inputs).logits[0], targets_RK, token_of_row_R)
        hidden_TD = model.base_model(**inputs).last_hidden_state[0]
    return linear_logprobs(
        hidden_TD,
        head_of(model, traits.head),
        targets_RK,
        token_of_row_R,
        keep_logits=keep_logits,
        frugal=checkpointing,
        compute_dtype=compute_dtype,
    )


def head_of(model: PreTrainedModel, traits: HeadTraits) -> Head:
    """A model's head with the parameters it has now."""
    linear: Any = model.get_output_embeddings()
    low_rank = None
    if isinstance(linear, LoraLayer):
        low_rank = low_rank_of(linear)
        linear = linear.get_base_layer()
    return Head(linear.weight, getattr(linear, "bias", None), traits.scale, traits.softcap, low_rank)


def checkpointable_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextlib.contextmanager
def checkpointed(model: PreTrainedModel) -> Iterator[None]:
    layers = checkpointable_layers(model)
    for layer in layers:
        layer.gradient_checkpointing = layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = layer.training = False


def use_attention(model: PreTrainedModel, name: str) -> None:
    with quiet_transformers():
        model.set_attn_implementation(name)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hides what transformers warns of while a model is tried out: the trial finds it out."""
    library = logging.getLogger("transformers")
    before = library.level
    library.setLevel(logging.ERROR)
    try:
        yield
    finally:
        library.setLevel(before)
