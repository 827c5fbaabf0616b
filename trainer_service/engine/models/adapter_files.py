"""Adapters as folders that plain peft opens: adapter_config.json and adapter_model.safetensors."""

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from gradwire.errors import GradwireError, invalid_field
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from trainer_service.adapter_folders import CONFIG, WEIGHTS, read_adapter_config
from trainer_service.engine.models import adapter_config
from trainer_service.engine.models.adapter_config import module_of
from trainer_service.engine.models.adapter_names import read_parameters
from trainer_service.engine.models.lora import fill, inner, layers_as_named, wrap
from trainer_service.engine.models.lora_experts import adapted_weights
from trainer_service.engine.models.lora_layer import ADAPTER
from trainer_service.engine.models.lora_targets import Targets
from trainer_service.engine.models.older_experts import stack_experts
from trainer_service.engine.parallel.sharding import group_of, whole_parameter
from trainer_service.engine.tensor_files import DTYPES, read_tensors

_FREE = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "init_lora_weights", "lora_dropout", "megatron_core", "qalora_group_size", "loftq_config"),
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out"),
    *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
}
"""Fields of an adapter's configuration that may have any value. The others must have peft's default: plain LoRA."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LEAVES_BASE_ALONE = (True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights with which an adapter belongs to the base model as it is."""


def write_adapter(model: PeftModel, folder: Path | None) -> None:
    """Writes the files of an adapter. Raises OSError where that fails. Every rank calls this.

    Args:
        model: Trains it.
        folder: Where they go; None on ranks that only help.
    """
    # Of one that is cut what each rank has is gathered.
    tensors: dict[str, Any] | None = None
    if group_of(inner(model)) is not None:
        tensors = {name: whole_parameter(p) for name, p in model.named_parameters() if p.requires_grad}
    if folder is None:
        return
    try:
        # Embeddings do not train here; by itself peft would save them along with an adapter of the head.
        model.save_pretrained(str(folder), state_dict=tensors, save_embedding_layers=False)
    except SafetensorError as exc:
        # What safetensors raises when a write fails.
        raise OSError(str(exc)) from exc
    # A template for people to fill in.
    (folder / "README.md").unlink(missing_ok=True)


def load_adapter(base: PreTrainedModel, targets: Targets, folder: Path, *, base_model: str) -> PeftModel:
    """A model that computes what base model and adapter do, and trains the adapter.

    Args:
        base: The base model, frozen.
        targets: What of it an adapter can be put beside.
        folder: The adapter's, made by anybody's peft.
        base_model: Name of the base model.

    Raises:
        InvalidArgumentError: INVALID_FIELD: it is no plain LoRA adapter of this model.
    """
    fields = _read_config(folder)
    weights = _read_weights(folder)
    stacked = {name.rpartition(".")[0] for name in targets.stacked}
    modules = targets.all - targets.stacked
    adapted = {module_of(name) for name in weights}
    if not adapted <= modules | stacked:
        weights = stack_experts(base, fields, weights, targets.stacked)
        adapted = {module_of(name) for name in weights}
    # Where its file names what this model has, so does its configuration; if not, peft may know older names.
    as_named = adapted <= modules | stacked
    names = [name for name, _ in base.named_modules()]
    try:
        adapter_config.use_names(fields, adapted - stacked, names if as_named else [*names, *adapted])
        if as_named:
            read_parameters(fields, [*targets.stacked, *(f"{name}.weight" for name in modules)], modules)
        adapter_config.check_ranks(
            fields, weights, {name: base.get_parameter(name).shape[0] for name in targets.stacked}
        )
    except ValueError as exc:
        raise _refused(f"does not fit this model: its {exc}.") from exc
    try:
        # Its weights come from the file, dropout is off, and it trains: the rest is peft's default.
        config = LoraConfig(**fields, task_type="CAUSAL_LM")
    except ValueError as exc:
        raise _refused(f"has an {CONFIG} that cannot be read: {_first_line(exc)}") from exc
    try:
        model = wrap(base, targets, config, base_model=base_model, as_named=as_named)
    except ValueError as exc:
        # peft's, about layers that are not there.
        raise _refused(f"does not fit this model: {_first_line(exc)}") from exc
    for name, _ in adapted_weights(inner(model)):
        if name not in targets.all:
            raise _refused(f"adapts {name}, which is no linear layer or expert that this model's forward calls.")
    try:
        with layers_as_named(inner(model)) if as_named else nullcontext():
            found: Any = set_peft_model_state_dict(model, weights, adapter_name=ADAPTER)
    except RuntimeError as exc:
        raise _refused(f"has matrices of other sizes than this model: {_last_line(exc)}") from exc
    fill(model, base)
    missing = [key for key in found.missing_keys if ".lora_" in key]
    for keys, what in ((missing, "lacks {} tensors"), (found.unexpected_keys, "has {} unknown tensors")):
        if keys:
            raise _refused(f"{what.format(len(keys))}, for example {keys[0]}.")
    return model


def _read_config(folder: Path) -> dict[str, Any]:
    """The fields of a plain LoRA's configuration; see adapter_config.check_fields."""
    try:
        raw = read_adapter_config(folder)
    except (ValueError, OSError) as exc:
        raise _refused(f"has an {CONFIG} that cannot be read: {_first_line(exc)}") from exc
    if raw.get("peft_type") != "LORA":
        raise _refused(f"is of peft_type {raw.get('peft_type')!s:.200}; it must be LORA.")
    known = {field.name: _default(field) for field in dataclasses.fields(LoraConfig)}
    for name, value in raw.items():
        if name not in known and value:
            # A field of a newer peft that this one does not know matters unless it is off.
            raise _refused(f"has {name[:200]} in {CONFIG}, which the trainer's peft does not know; upgrade peft there.")
        if name in known and name not in _FREE and value and value != known[name]:
            raise _refused(f"has {name}={value!r:.200} in {CONFIG}; only plain LoRA can be trained on here.")
    start = raw.get("init_lora_weights", True)
    if start not in _LEAVES_BASE_ALONE:
        raise _refused(
            f"was started with init_lora_weights={start!r:.200}, which changes the base model; convert it with peft's "
            "path_initial_model_for_weight_conversion.",
        )
    try:
        return adapter_config.check_fields(raw)
    except ValueError as exc:
        raise _refused(f"has an {CONFIG} whose {exc}.") from exc


def _read_weights(folder: Path) -> dict[str, Tensor]:
    try:
        weights = read_tensors(folder / WEIGHTS)
    except OSError as exc:
        raise _refused(f"has an {WEIGHTS} that cannot be read: {_first_line(exc)}") from exc
    except ValueError as exc:
        raise _refused(f"has an {WEIGHTS} that cannot be read: it {_first_line(exc)}.") from exc
    if unknown := [name for name in weights if not adapter_config.KEY.fullmatch(name)]:
        raise _refused(f"has {len(unknown)} unknown tensors, for example {unknown[0][:200]}.")
    for name, tensor in weights.items():
        if tensor.dtype not in _DTYPES:
            raise _refused(
                f"has {name} in {DTYPES[tensor.dtype]}; it must be {', '.join(DTYPES[one] for one in _DTYPES)}."
            )
        # What is too large for float32 becomes infinite in it.
        if not torch.isfinite(tensor.float()).all():
            raise _refused(f"has a tensor that is not finite, {name}.")
    return weights


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _refused(why: str) -> GradwireError:
    return invalid_field("adapter_path", f"names an adapter that {why}")


def _first_line(exc: BaseException) -> str:
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0][:500]


def _last_line(exc: BaseException) -> str:
    return (str(exc).strip().splitlines() or [type(exc).__name__])[-1].strip()[:500]
