"""Loads a causal language model for training."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from gradwire.errors import GradwireError, invalid_field
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trainer_service.engine.device import Device
from trainer_service.engine.models.positions import context_length, forget_longest_sequence
from trainer_service.engine.parallel.cut_layers import loading_rules

_CAUSAL = re.compile(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration)$")
_MULTIMODAL = "ForConditionalGeneration"


@dataclass(frozen=True)
class ModelDescription:
    """A loaded model, as GetServerInfo describes it.

    Attributes:
        base_model: Hub id or folder, as the trainer was given it.
        architecture: Such as "LlamaForCausalLM".
        vocab_size: Number of token ids that both the embedding and the head know.
        max_context_length: Longest sequence taken, tokens.
        num_parameters: Tied ones counted once.
        dtype: Of the parameters, such as "float32".
        device: Name of the device, for people.
    """

    base_model: str
    architecture: str
    vocab_size: int
    max_context_length: int
    num_parameters: int
    dtype: str
    device: str


def load_model(
    base_model: str,
    folder: Path,
    device: Device,
    *,
    fsdp_size: int = 1,
    dp_replicate_size: int = 1,
    tp_size: int = 1,
    config: Any = None,
    check: Callable[[nn.Module], object] | None = None,
) -> PreTrainedModel:
    """The model in float32 on the device: dropout off, every parameter that text reads trainable, no gradients yet.

    A model of more than text is loaded whole, as the class it was saved by: what it makes of images and sound does not
    train and is exported as it was.

    Args:
        base_model: What it is called in refusals.
        folder: Where its files are.
        device: Where it goes.
        fsdp_size: Ranks that share each parameter; with more than one rank, each reads its part (parallel/sharding.py).
        dp_replicate_size: Times that all parts are there.
        tp_size: Ranks that compute each layer together, each with its part of it.
        config: In place of the folder's own; parameters it has no use for are left out.
        check: Refuses it, by the shapes of its parameters, before anything is read.

    Raises:
        InvalidArgumentError: INVALID_FIELD: not a causal language model, parameters missing, or files that cannot be
            read. With tp_size: layers that cannot be cut so.
    """
    load: Any = _class_of(base_model, folder)
    in_parts = fsdp_size * dp_replicate_size * tp_size > 1
    try:
        if check is not None:
            check(_on_meta(load, folder))
        # Refused before anything is read.
        rules = loading_rules(_on_meta(load, folder), tp_size) if tp_size > 1 else None
        # With output_loading_info it returns a pair.
        loaded: Any = load.from_pretrained(
            folder,
            dtype=torch.float32,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **({} if config is None else {"config": config}),
            **({"distributed_config": _in_parts(fsdp_size, dp_replicate_size, tp_size, rules)} if in_parts else {}),
        )
    except (ValueError, OSError, KeyError, ImportError) as exc:
        if isinstance(exc, GradwireError):
            raise
        raise _refused(base_model, f"cannot be loaded as a causal language model: {_first_line(exc)}") from exc
    except Exception as exc:
        # safetensors' own error class derives from Exception alone.
        if type(exc).__name__ != "SafetensorError":
            raise
        raise _refused(base_model, f"has a safetensors file that cannot be read: {_first_line(exc)}") from exc
    model, report = loaded
    missing = sorted({*report["missing_keys"], *(str(key) for key in report.get("mismatched_keys", ()))})
    if missing:
        raise _refused(
            base_model,
            f"lacks {len(missing)} parameters of {type(model).__name__}, for example {missing[0]}; training would "
            "start from random numbers there.",
        )
    # Dropout would make two runs with the same log differ.
    model.eval()
    model.requires_grad_(False)
    for part in _text_parts(model):
        part.requires_grad_(True)
    forget_longest_sequence(model)
    return model if in_parts else model.to(device.torch_device)


def _on_meta(load: Any, folder: Path) -> Any:
    """The model without anything that its parameters hold."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        return load.from_config(config) if load is AutoModelForCausalLM else load(config)


def _in_parts(fsdp_size: int, dp_replicate_size: int, tp_size: int, rules: dict[str, str] | None) -> Any:
    # Only here, since transformers has it only lately.
    from transformers import DistributedConfig

    return DistributedConfig(fsdp_size=fsdp_size, dp_replicate_size=dp_replicate_size, tp_size=tp_size, tp_plan=rules)


def describe(model: PreTrainedModel, *, base_model: str, device: Device, max_context_length: int) -> ModelDescription:
    """What clients are told about a loaded model.

    Args:
        model: The loaded model.
        base_model: As the trainer was given it.
        device: Where it runs.
        max_context_length: The trainer's own limit, tokens; 0 for none.
    """
    own_limit = context_length(model.config.get_text_config())
    limits = [limit for limit in (own_limit, max_context_length) if limit]
    return ModelDescription(
        base_model=base_model,
        architecture=type(model).__name__,
        vocab_size=_vocab_size(model),
        # A recurrent model has no limit of its own.
        max_context_length=min(limits) if limits else 1 << 20,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype="float32",
        device=device.name,
    )


def _vocab_size(model: PreTrainedModel) -> int:
    weights = [
        getattr(module, "weight", None) for module in (model.get_input_embeddings(), model.get_output_embeddings())
    ]
    sizes = [len(weight) for weight in weights if isinstance(weight, torch.Tensor)]
    return min(sizes) if sizes else int(model.config.get_text_config().vocab_size)


def _text_parts(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that a model of more than text goes through where there is nothing but text; else the model."""
    if model.config.get_text_config() is model.config:
        return [model]
    parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    return [part for part in parts if part is not None]


def _class_of(base_model: str, folder: Path) -> type:
    """What loads a model folder: transformers' choice for causal language models, or a class for more than text."""
    try:
        config = json.loads((folder / "config.json").read_text())
        architectures = config.get("architectures") or []
    except (OSError, ValueError, AttributeError) as exc:
        raise _refused(base_model, f"has a config.json that cannot be read: {_first_line(exc)}") from exc
    if architectures and not any(_CAUSAL.search(name) for name in architectures):
        raise _refused(
            base_model, f"is a {architectures[0]}, which is no causal language model; it must be a …ForCausalLM."
        )
    name = architectures[0] if architectures else ""
    if name.endswith(_MULTIMODAL) and not config.get("is_encoder_decoder"):
        # Where there is no such class, transformers' choice says in its own words why it cannot be loaded.
        return getattr(transformers, name, AutoModelForCausalLM)
    return AutoModelForCausalLM


def _refused(base_model: str, why: str) -> GradwireError:
    return invalid_field("base_model", f'"{base_model}" {why}', base_model=base_model)


def _first_line(exc: BaseException) -> str:
    lines = str(exc).strip().splitlines()
    return lines[0] if lines else type(exc).__name__
