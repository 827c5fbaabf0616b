"""Adapters of experts as older transformers had them, each with layers of its own, made ones of stacked weights.

Two layers that are one stacked weight now (gate and up) become one adapter of twice the rank, whose second matrix is
theirs in blocks along its diagonal. The matrices are put together by peft.
"""

import math
from collections.abc import Collection
from typing import Any

from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from torch import Tensor
from transformers import PreTrainedModel

from trainer_service.engine.models.adapter_config import KEY, module_of
from trainer_service.engine.models.lora_layer import ADAPTER


def stack_experts(
    base: PreTrainedModel, fields: dict[str, Any], weights: dict[str, Tensor], stacked: Collection[str]
) -> dict[str, Tensor]:
    """The matrices of stacked weights, and what says so in the configuration.

    Args:
        base: The base model.
        fields: Of the adapter's configuration; changed where there is such a thing.
        weights: The adapter's matrices, by their names in its file.
        stacked: Names of the model's stacked weights.

    Returns:
        The adapter's matrices; unchanged where none are of older experts, or some are scaled each in its own way.
    """
    if fields.get("rank_pattern") or fields.get("alpha_pattern") or isinstance(fields.get("target_modules"), str):
        return weights
    try:
        made = convert_peft_adapter_state_dict_for_transformers(base, LoraConfig(), dict(weights), ADAPTER)
    except (ValueError, RuntimeError):
        # Matrices that cannot be put together; whoever asked says that they do not fit.
        return weights
    modules = {module_of(key) for key in made if KEY.fullmatch(key)}
    names = sorted(name for name in stacked if name.rpartition(".")[0] in modules)
    if made.keys() == weights.keys() or not names or any(KEY.fullmatch(key) is None for key in made):
        return weights
    rank, alpha = fields.get("r", LoraConfig.r), fields.get("lora_alpha", LoraConfig.lora_alpha)
    ranks: dict[str, int] = {}
    for name in names:
        owner, _, parameter = name.rpartition(".")
        module = base.get_submodule(owner)
        within = [one for one, _ in module.named_parameters(recurse=False) if f"{owner}.{one}" in stacked]
        depth = len(within) - 1 - within.index(parameter)
        key = f"base_model.model.{owner}{'.base_layer' * depth}.lora_A.weight"
        if key not in made:
            return weights
        ranks[name] = len(made[key]) // len(base.get_parameter(name))
    fields["target_parameters"] = names
    fields["target_modules"] = sorted(modules - {name.rpartition(".")[0] for name in names})
    fields["rank_pattern"] = {name: own for name, own in ranks.items() if own != rank}
    # The scale stays: it is alpha over the rank, or over its root.
    root = math.sqrt if fields.get("use_rslora") else float
    fields["alpha_pattern"] = {name: alpha * root(own / rank) for name, own in ranks.items() if own != rank}
    return made
