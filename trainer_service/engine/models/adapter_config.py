"""What somebody else's adapter_config.json may say, looked at before peft acts on any of it.

peft reads names as regular expressions in many places, and one of a few characters can keep it busy for ever. None of
somebody else's is evaluated: names must be names, and where target_modules is an expression, the tensors that are there
say which layers the adapter has.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from trainer_service.engine.models.adapter_names import plain_pattern

ALL_LINEAR = "all-linear"
"""peft's word for every linear layer but the head."""
KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
"""Name of a matrix: the layer, and which of its two it is."""

_NAME = re.compile(r"[\w.-]+", re.ASCII)
_PATTERN = re.compile(r"\^?(?:[\w-]|\\?\.)+", re.ASCII)
"""Those of peft's patterns that are only a name. Without repetition, matching takes no time."""
_MAX_PATTERNS = 512
"""As many patterns as Python keeps compiled; beyond that, peft compiles each anew for every layer."""
_MAX_FLOAT32 = 3.4028234663852886e38
_MAX_SHOWN = 200


def check_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that make a plain LoRA, of the types that peft takes for granted; absent ones are left out.

    Args:
        raw: The JSON object.

    Raises:
        ValueError: One is something else; the text goes on from "whose".
    """
    made = {name: raw[name] for name in _FIELDS if raw.get(name) is not None}
    for name in ("rank_pattern", "alpha_pattern"):
        if isinstance(made.get(name), dict):
            made[name] = {plain_pattern(key) if isinstance(key, str) else key: one for key, one in made[name].items()}
    for name, value in made.items():
        sound, wanted = _FIELDS[name]
        if not sound(value):
            raise ValueError(f"{name} is {_shown(value)}; it must be {wanted}")
    if made.get("target_modules") == [] and not made.get("target_parameters"):
        raise ValueError("target_modules is []; it must name a layer")
    return made


def module_of(key: str) -> str:
    """The module that a matrix belongs to; of experts, the one that holds the weights of all."""
    found = KEY.fullmatch(key)
    assert found is not None, key
    return ".".join(part for part in found[1].split(".") if part != "base_layer")


def use_names(fields: dict[str, Any], adapted: Iterable[str], modules: Iterable[str]) -> None:
    """Leaves nothing but names of the model's in the fields that say which layers are adapted.

    Args:
        fields: As check_fields made them; changed.
        adapted: Modules that the adapter has matrices for, but for experts.
        modules: Names of the model's modules.

    Raises:
        ValueError: None of them are the model's; the text goes on from "whose".
    """
    if any(isinstance(fields.get(name), str) and fields[name] != ALL_LINEAR for name in _LAYERS[:2]):
        for name in _LAYERS:
            fields.pop(name, None)
        fields["target_modules"] = sorted(adapted)
    ends: set[str] = set()
    for module in modules:
        parts = module.split(".")
        ends.update(".".join(parts[start:]) for start in range(len(parts)))
    for name in _LAYERS[:2]:
        if isinstance(fields.get(name), list):
            kept = [one for one in fields[name] if one in ends]
            if name == "target_modules" and not kept and not fields.get("target_parameters"):
                raise ValueError(f"target_modules are {_shown(fields[name])}, of which this model has none")
            fields[name] = kept


def check_ranks(fields: Mapping[str, Any], weights: Mapping[str, Tensor], num_experts: Mapping[str, int]) -> None:
    """Refuses ranks beyond those of the matrices that are there, before peft makes room for them.

    Args:
        fields: As check_fields made them.
        weights: The adapter's matrices.
        num_experts: Of the model's stacked weights, by name.

    Raises:
        ValueError: The text goes on from "whose".
    """
    experts = {name.rpartition(".")[0]: number for name, number in num_experts.items()}
    largest = 0
    for key, tensor in weights.items():
        if key.endswith(".lora_A.weight") and tensor.ndim == 2:
            # Of experts, the matrices of all are in one.
            largest = max(largest, tensor.shape[0] // experts.get(module_of(key), 1))
    for rank in (fields.get("r", 0), *fields.get("rank_pattern", {}).values()):
        if rank > largest:
            raise ValueError(f"rank is {rank}, and its matrices have other sizes: {largest} at most")


def _is_rank(value: object) -> bool:
    return type(value) is int and 1 <= value < 1 << 31


def _is_alpha(value: object) -> bool:
    # Something that is not a number at all compares with nothing.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MAX_FLOAT32


def _patterns_of(sound: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: (
        isinstance(value, dict)
        and len(value) <= _MAX_PATTERNS
        and all(_PATTERN.fullmatch(key) and sound(one) for key, one in value.items())
    )


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) and _NAME.fullmatch(one) for one in value)


def _is_indexes(value: object) -> bool:
    return all(type(one) is int and 0 <= one < 1 << 31 for one in (value if isinstance(value, list) else [value]))


_LAYERS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_WANTED_PATTERNS = f"at most {_MAX_PATTERNS} layers' names, each with"
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "a whole number of at least 1"),
    "lora_alpha": (_is_alpha, "a number that float32 holds"),
    "rank_pattern": (_patterns_of(_is_rank), f"{_WANTED_PATTERNS} a whole number of at least 1"),
    "alpha_pattern": (_patterns_of(_is_alpha), f"{_WANTED_PATTERNS} a number that float32 holds"),
    "use_rslora": (lambda value: isinstance(value, bool), "true or false"),
    "fan_in_fan_out": (lambda value: isinstance(value, bool), "true or false"),
    "target_modules": (
        lambda value: isinstance(value, str) or _is_names(value),
        f'a list of layers\' names, "{ALL_LINEAR}" or an expression',
    ),
    "target_parameters": (_is_names, "a list of parameters' names"),
    "exclude_modules": (lambda value: isinstance(value, str) or _is_names(value), "a list of layers' names"),
    "layers_to_transform": (_is_indexes, "a layer's number or a list of them"),
    "layers_pattern": (lambda value: _is_names(value if isinstance(value, list) else [value]), "a module's name"),
}
"""For each field: whether a value of it is allowed, and what it must be."""


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"
