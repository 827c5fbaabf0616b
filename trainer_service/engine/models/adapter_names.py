"""Names of what an adapter adapts, as peft's configuration says them and reads them back.

In models with routed experts, peft takes some last parts of names for those of older transformers, in which each expert
had layers of its own: it would adapt the experts in place of the dense and shared layers meant. Such a layer is named
by its parameter, which peft takes as it stands.
"""

import contextlib
import functools
import warnings
from collections.abc import Collection, Iterable
from typing import Any, Literal

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

_WEIGHT = ".weight"
_ANY_MODULE = r".*\."
"""Begins the patterns that peft itself writes; a pattern matches any module's with and without it."""


def shortest(names: Iterable[str], among: Iterable[str]) -> list[str]:
    """Last parts of names, as few as say as much: people and servers of adapters expect them.

    Args:
        names: Names to say.
        among: All names there are.
    """
    wanted = set(names)
    others = [name for name in among if name not in wanted]
    taken = {".".join(parts[start:]) for parts in (name.split(".") for name in others) for start in range(len(parts))}
    made: set[str] = set()
    for name in wanted:
        parts = name.split(".")
        ends = (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))
        made.add(next((end for end in ends if end not in taken), name))
    return sorted(made)


def name_for_files(config: LoraConfig, base: PreTrainedModel, names: Iterable[str], stacked: Collection[str]) -> None:
    """Has a configuration name what is adapted so that plain peft adapts the same.

    Args:
        config: The adapter's; changed.
        base: The base model.
        names: What is adapted: modules, and parameters among `stacked`.
        stacked: Names of parameters.
    """
    names = set(names)
    modules = names - set(stacked)
    ends = {name.rpartition(".")[2] for name in modules}
    ends = {end for end in ends if how_peft_adapts(base.config.model_type, end) == "parameter"}
    by_parameter = {name for name in modules if name.rpartition(".")[2] in ends}
    parameters = [f"{name}{_WEIGHT}" for name in by_parameter] + sorted(names - modules)
    # The names say it all.
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.target_modules = shortest(modules - by_parameter, (name for name, _ in base.named_modules()))
    all_parameters = [name for name, _ in base.named_parameters(remove_duplicate=False)]
    config.target_parameters = shortest(parameters, all_parameters) or None
    for patterns in (config.rank_pattern or {}, config.alpha_pattern or {}):
        for pattern in list(patterns):
            plain = pattern.removeprefix(_ANY_MODULE).replace(r"\.", ".")
            patterns[plain] = patterns.pop(pattern)
            if plain.rpartition(".")[2] in ends:
                patterns[f"{plain}{_WEIGHT}"] = patterns[plain]


def read_parameters(fields: dict[str, Any], parameters: Iterable[str], modules: Collection[str]) -> None:
    """Resolves target_parameters: those that are a module's weight become target_modules, the rest whole names.

    Args:
        fields: Of a configuration, target_modules being a list or absent; changed.
        parameters: Names of the parameters that can be adapted.
        modules: Names of the linear layers that can be adapted.
    """
    ends = fields.pop("target_parameters", None) or ()
    found = [name for name in parameters if any(name == end or name.endswith(f".{end}") for end in ends)]
    by_module = [name.removesuffix(_WEIGHT) for name in found if name.removesuffix(_WEIGHT) in modules]
    if stacked := sorted(name for name in found if name.removesuffix(_WEIGHT) not in modules):
        fields["target_parameters"] = stacked
    if by_module:
        fields["target_modules"] = sorted({*fields.get("target_modules", ()), *by_module})
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = fields.get(field) or {}
        for pattern in list(patterns):
            if pattern.endswith(_WEIGHT):
                patterns.setdefault(pattern.removesuffix(_WEIGHT), patterns.pop(pattern))


def plain_pattern(pattern: str) -> str:
    """One of peft's patterns without what it may begin with."""
    return pattern.removeprefix(_ANY_MODULE)


@functools.cache
def how_peft_adapts(model_type: str, name: str) -> Literal["module", "parameter", ""]:
    """What of a linear layer plain peft must be named to adapt it; "" where it does not whatever it is named.

    It is asked, with a model that has nothing but that layer. In recurrent models, for example, it refuses layers whose
    weights some kernels read without calling them.

    Args:
        model_type: The model's, as its configuration says it.
        name: The last part of the layer's name.
    """
    trials: dict[Literal["module", "parameter"], LoraConfig] = {
        "module": LoraConfig(r=1, target_modules=[name]),
        "parameter": LoraConfig(r=1, target_modules=[], target_parameters=[f"{name}{_WEIGHT}"]),
    }
    for what, config in trials.items():
        model: Any = nn.Module()
        model_config: Any = PreTrainedConfig()
        model_config.model_type = model_type
        model.config = model_config
        model.add_module(name, nn.Linear(1, 1))
        with contextlib.suppress(ValueError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if isinstance(inject_adapter_in_model(config, model).get_submodule(name), LoraLayer):
                return what
    return ""
