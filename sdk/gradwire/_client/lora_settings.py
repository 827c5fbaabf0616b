"""The LoRA settings of a run to be: checked, and taken from a state that it is to load."""

import logging
from collections.abc import Mapping
from typing import Any

from gradwire._wire.arguments import check_flag, check_number, check_whole_number
from gradwire.errors import error
from gradwire.types.params import MAX_LORA_RANK, MAX_SEED
from gradwire.v1.checkpoint_pb2 import Checkpoint
from gradwire.v1.run_pb2 import Run

logger = logging.getLogger(__name__)


def lora_settings(
    lora_rank: int, lora_alpha: float | None, seed: int | None, layers: Mapping[str, bool | None]
) -> dict[str, Any]:
    """Fields of a CreateRunRequest; what is None is left out, and takes the trainer's default.

    Raises:
        InvalidArgumentError: INVALID_FIELD: one is of another type, or out of range.
    """
    check_whole_number("lora_rank", lora_rank, at_least=0, at_most=MAX_LORA_RANK)
    if lora_alpha is not None:
        check_number("lora_alpha", lora_alpha, above=0)
    if seed is not None:
        check_whole_number("seed", seed, at_least=0, at_most=MAX_SEED)
    for name, value in layers.items():
        if value is not None:
            check_flag(name, value)
    given = {"lora_rank": lora_rank, "lora_alpha": lora_alpha, "seed": seed, **layers}
    return {name: value for name, value in given.items() if value is not None}


def tell_of_kinds_left_out(layers: Mapping[str, bool | None], run: Run) -> None:
    """Logs which kinds of layers were asked for in vain.

    Args:
        layers: The settings that choose kinds, as they were given.
        run: The run that was made.
    """
    if run.lora.adapted:
        for name, asked in layers.items():
            if asked is not False and not getattr(run.lora, name):
                logger.warning("%s has no effect on %s: its model has nothing of that kind to adapt.", name, run.run_id)


def lora_arguments(state: Checkpoint) -> dict[str, Any]:
    """Arguments of create_training_client that make a run which can load a state."""
    if not state.lora_rank:
        return {}
    if not state.HasField("lora"):
        raise error(
            "CHECKPOINT_MISMATCH",
            f"{state.path} was saved by a LoRA run of rank {state.lora_rank} and does not say which layers it adapts: "
            "it is of an older version, or its run was started from an adapter that no settings make. To go on, call "
            "create_training_client with the lora_… settings or the adapter_path of that run, and load_state or "
            "load_state_with_optimizer on the client.",
            path=state.path,
        )
    names = ("lora_alpha", "train_mlp", "train_attn", "train_unembed")
    return {"lora_rank": state.lora_rank, **{name: getattr(state.lora, name) for name in names}}
