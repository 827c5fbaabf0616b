"""How a pack, or rows of sequences, goes through a model, as its architecture allows.

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

from trainer_service.engine.fused.install import fuse
from trainer_service.engine.models.embedding import add_rows_in_place
from trainer_service.engine.models.experts import use_experts
from trainer_service.engine.models.lora import low_rank_of
from trainer_service.engine.models.positions import Boundary
from trainer_service.engine.packed import recurrences
from trainer_service.engine.packed.attention import ATTENTION
from trainer_service.engine.packed.logprobs import Head, linear_logprobs, target_logprobs
from trainer_service.engine.packed.vocabulary import VocabularyPart
from trainer_service.engine.parallel.sharding import forward_of, group_of
from trainer_service.engine.parallel.tensor_parallel import spread


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
        why_not_packed: Why sequences are not packed; empty where they are.
        why_not_padded: Of what is not packed, why sequences go one at a time; empty where they go in padded rows.
        experts: Name of the implementation that computes routed experts; empty where it is the model's own.
        why_not_shared: Why common beginnings are computed for each sequence; empty where they are computed once.
        boundaries: Sequences that pass one are not computed beside those that do not.
        head: How hidden states become logits; None where only the model itself knows, and full logits are made.
        held_bytes_per_token: What a forward's graph holds a token, logits apart.
        checkpointed_bytes_per_token: The same with activation checkpointing; 0 where the architecture cannot.
    """

    attention: str
    experts: str = ""
    why_not_packed: str = ""
    why_not_padded: str = ""
    why_not_shared: str = ""
    boundaries: tuple[Boundary, ...] = ()
    head: HeadTraits | None = None
    held_bytes_per_token: int = 0
    checkpointed_bytes_per_token: int = 0

    @property
    def packed(self) -> bool:
        """Whether sequences go end to end."""
        return not self.why_not_packed

    @property
    def padded(self) -> bool:
        """Whether sequences go side by side, padded to the longest."""
        return not self.packed and not self.why_not_padded

    def side_of(self, length: int) -> tuple[int, ...]:
        """Equal for sequences that may go into one forward."""
        return tuple(boundary.side_of(length) for boundary in self.boundaries)

    @property
    def batching(self) -> str:
        """How sequences are batched, in a few words, for GetServerInfo."""
        if not self.packed and not self.padded:
            return f"one sequence at a time: {self.why_not_packed}, and {self.why_not_padded}"
        if self.padded:
            found = f"rows of similar length, padded: {self.why_not_packed}"
        elif self.why_not_shared:
            found = f"packed, no shared beginnings: {self.why_not_shared}"
        else:
            found = "packed, shared beginnings once"
        for boundary in self.boundaries:
            found += f"; beyond {boundary.length} tokens {'by length' if boundary.grows else 'apart'}"
        return found if self.head is not None else f"{found}, full logits"


def prepare(model: PreTrainedModel, traits: Traits) -> None:
    """Readies a freshly loaded model of the architecture that `traits` were found for."""
    if traits.packed:
        use_attention(model, ATTENTION)
    if traits.experts:
        use_experts(model, traits.experts)
    add_rows_in_place(model)
    fuse(model)
    recurrences.take_over(model)
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
    num_rows: int,
    keep_logits: bool,
    compute_dtype: torch.dtype,
    checkpointing: bool,
) -> Tensor:
    """Logprobs of the rows' targets.

    Args:
        model: Prepared.
        traits: Its architecture's.
        tokens_T: Token ids, int64: a pack, which is in use (attention.pack_in_use), or padded rows end to end.
        positions_T: Of the tokens in their sequences, int64.
        targets_RK: Token ids, int64, [R] or [R, K].
        token_of_row_R: See logprobs.linear_logprobs.
        num_rows: Into how many rows the tokens are cut; 1 for a pack.
        keep_logits: See logprobs.linear_logprobs.
        compute_dtype: See logprobs.linear_logprobs.
        checkpointing: Compute layers' activations again in backward in place of holding them.

    Returns:
        float32 with grad where grad is enabled, shaped as targets_RK.
    """
    inputs: dict[str, Any] = {"input_ids": tokens_T.view(num_rows, -1), "use_cache": False}
    if traits.packed:
        inputs["position_ids"] = positions_T[None]
    with checkpointed(model) if checkpointing else contextlib.nullcontext():
        if traits.head is None:
            # Not through a call, which of a sharded model is what this runs in.
            logits_TV = model.forward(**inputs).logits.flatten(0, 1)
            return target_logprobs(logits_TV, targets_RK, token_of_row_R)
        hidden_TD = model.base_model(**inputs).last_hidden_state.flatten(0, 1)
    if num_rows > 1 and token_of_row_R is not None:
        # Nothing is asked about what rows are padded with.
        hidden_TD, token_of_row_R = hidden_TD[token_of_row_R], None
    if (group := group_of(model)) is not None:
        hidden_TD = spread(hidden_TD, group)
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
    vocabulary = None
    if (group := group_of(model)) is not None:
        size = len(linear.weight)
        vocabulary = VocabularyPart(group.group, group.rank * size, size)
    return Head(linear.weight, getattr(linear, "bias", None), traits.scale, traits.softcap, low_rank, vocabulary)


def checkpointable_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """The outermost ones: what is within is computed again with it, in a backward that would not checkpoint it."""
    found = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    within = {inner for layer in found for inner in layer.modules() if inner is not layer}
    return [layer for layer in found if layer not in within]


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
