"""LoRA: runs that each train a small adapter beside one frozen base model.

A run gets a model of its own: a copy of the base model's modules whose parameters are the base model's, tensor for
tensor, and whose linear layers and experts peft has wrapped. So there is nothing to switch between runs and nothing
that one could leave behind for another; a further run costs its adapter, and a few megabytes of Python objects.

What an adapter is, how it starts, its files and its configuration are peft's. The products are ours (lora_layer.py,
lora_experts.py).
"""

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from gradwire._wire.arguments import check_number
from gradwire.errors import invalid_field
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trainer_service.adapter_folders import DEFAULT_ALPHA
from trainer_service.engine.models.adapter_names import name_for_files
from trainer_service.engine.models.half import as_if_float32, make_float32
from trainer_service.engine.models.lora_experts import adapted_weights, take_over
from trainer_service.engine.models.lora_layer import ADAPTER, FusedLoraLinear
from trainer_service.engine.models.lora_targets import Targets
from trainer_service.engine.models.quantized import make_whole
from trainer_service.engine.packed.logprobs import LowRank
from trainer_service.engine.parallel.sharding import group_of, readable, record_of, reshard

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoraSettings:
    """Settings of a new adapter.

    Attributes:
        rank: R, at least 1.
        alpha: The low-rank part is scaled by alpha / rank.
        seed: Draws the first matrices; the second are zero, so that training starts from the base model.
        train_mlp: Adapt the feed-forward layers, experts among them.
        train_attn: Adapt the attention layers, and what mixes tokens in their place.
        train_unembed: Adapt the head, the layer that makes logits.
    """

    rank: int = 32
    alpha: float = DEFAULT_ALPHA
    seed: int = 0
    train_mlp: bool = True
    train_attn: bool = True
    train_unembed: bool = True


def new_adapter(base: PreTrainedModel, targets: Targets, settings: LoraSettings, *, base_model: str) -> PeftModel:
    """A model that computes what the base model does, and trains an adapter.

    Args:
        base: The base model, frozen.
        targets: Its layers that an adapter can be put beside.
        settings: Of the new adapter.
        base_model: Its name, for the adapter's configuration.

    Raises:
        InvalidArgumentError: INVALID_FIELD: a setting out of range, or nothing that would train.
    """
    names = _chosen(base, targets, settings)
    modules = [name for name in names if name not in targets.stacked]
    config = LoraConfig(
        r=settings.rank,
        # An int where it is one, as every other reader expects; peft only divides by it.
        lora_alpha=int(settings.alpha) if settings.alpha.is_integer() else settings.alpha,  # pyright: ignore[reportArgumentType]
        target_modules=modules,
        target_parameters=[name for name in names if name in targets.stacked] or None,
        fan_in_fan_out=bool(modules) and all(isinstance(base.get_submodule(name), Conv1D) for name in modules),
        task_type="CAUSAL_LM",
    )
    model = wrap(base, targets, config, base_model=base_model, seed=settings.seed)
    fill(model, base)
    adapted = {name for name, _ in adapted_weights(inner(model))}
    assert adapted == set(names), f"peft adapts {adapted ^ set(names)} against what was asked"
    return model


def wrap(
    base: PreTrainedModel,
    targets: Targets,
    config: LoraConfig,
    *,
    base_model: str,
    seed: int = 0,
    as_named: bool = True,
) -> PeftModel:
    """The base model, tensor for tensor, with a new adapter of that configuration: float32, on the base's device.

    Of a sharded one hollow, until `fill`.

    Args:
        base: The base model, frozen.
        targets: What of it an adapter can be put beside.
        config: What to adapt, and how.
        base_model: Its name, for the configuration.
        seed: Draws the first matrices.
        as_named: The configuration names layers of this very model; see layers_as_named.
    """
    config._register_custom_module({nn.Linear: FusedLoraLinear})
    copied = shared_copy(base)
    named = layers_as_named(copied) if as_named else nullcontext()
    with named, as_if_float32(copied), _quiet_peft(), torch.random.fork_rng(devices=[]):
        # peft makes adapters on the CPU, whatever the device, so the seed decides.
        torch.manual_seed(seed)
        model = get_peft_model(copied, config, autocast_adapter_dtype=True)
    assert isinstance(model, PeftModel)
    take_over(model)
    found: Any = model.peft_config[ADAPTER]
    # peft writes the folder that the model was loaded from, which may be inside a cache.
    found.base_model_name_or_path = base_model
    name_for_files(found, base, (name for name, _ in adapted_weights(inner(model))), targets.stacked)
    # Dropout is off, as in every other model here.
    model.eval()
    return model


def fill(model: PeftModel, base: PreTrainedModel) -> None:
    """Puts a sharded base model's parts into what `wrap` made of it. The adapter is whole, and is cut with them."""
    if (sharded := record_of(base)) is not None:
        sharded.fill(inner(model))


@contextmanager
def layers_as_named(model: PreTrainedModel) -> Iterator[None]:
    """Within, peft takes the names of layers literally.

    By itself it reads those of models with routed experts (by `model_type`) as older transformers' names, where every
    expert had layers of its own: it would adapt the experts in place of the dense and shared layers asked for.
    """
    config: Any = model.config
    before = config.model_type
    config.model_type = "as named"
    try:
        yield
    finally:
        config.model_type = before


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A model with modules of its own, and the same parameters and buffers; of a sharded one hollow, to be filled."""
    if (sharded := record_of(model)) is not None:
        return sharded.hollow_copy()
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def freeze(model: PreTrainedModel) -> None:
    """Makes a model the base of adapters: none of its parameters train."""
    for parameter in model.parameters():
        parameter.grad = None
        parameter.requires_grad_(False)


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose parameters never change: what trains is copied, and what does not is shared. It is whole."""
    if (sharded := record_of(model)) is not None:
        return sharded.whole_copy(model)
    frozen = [tensor for tensor in (*model.parameters(), *model.buffers()) if not tensor.requires_grad]
    made = copy.deepcopy(model, {id(tensor): tensor for tensor in frozen})
    freeze(made)
    return made


def inner(model: PeftModel) -> PreTrainedModel:
    """The transformers model that peft wrapped layers of."""
    found: Any = model.get_base_model()
    return found


def adapter_rank(model: PeftModel) -> int:
    """The rank in its configuration; single layers may have another."""
    config: Any = model.peft_config[ADAPTER]
    return int(config.r)


def settings_of(model: PeftModel, targets: Targets) -> LoraSettings | None:
    """What makes a new adapter of the same layers, rank and scale; None where nothing does, as for some of peft's own.

    The seed is not in it: what the adapter started from is gone.
    """
    layers = dict(adapted_weights(inner(model)))
    trained = {field: bool(names) and layers.keys() >= set(names) for field, names in targets.kinds.items()}
    covered = {name for field, names in targets.kinds.items() if trained[field] for name in names}
    rank = adapter_rank(model)
    shapes = {(layer.r[ADAPTER], float(layer.lora_alpha[ADAPTER]), layer.scaling[ADAPTER]) for layer in layers.values()}
    alpha = next(iter(shapes))[1]
    # The scale is compared too: some adapters are scaled otherwise (rslora), or have layers of another rank.
    if layers.keys() != covered or shapes != {(rank, alpha, alpha / rank)}:
        return None
    return LoraSettings(rank=rank, alpha=alpha, **trained)


def low_rank_of(layer: LoraLayer) -> LowRank:
    """What a linear layer's adapter adds to its weight."""
    a, b = (cast(nn.Linear, group[ADAPTER]).weight for group in (layer.lora_A, layer.lora_B))
    return LowRank(a, b, layer.scaling[ADAPTER])


@dataclass(frozen=True)
class MergedParts:
    """A model in parts, to whose weights adapters are added as each is made whole.

    Attributes:
        hollow: The model they make, without what its parameters hold.
        tensors: Of the base model, in parts, by the names of hollow's parameters.
        layers: Where the adapters are, by names of what they are added to.
    """

    hollow: PreTrainedModel
    tensors: Mapping[str, Tensor]
    layers: Mapping[str, LoraLayer]

    def merged(self, name: str, tensor: Tensor) -> Tensor:
        """A whole tensor of the base model, also on "meta", with what is added to it."""
        if name not in self.layers or tensor.is_meta:
            return tensor
        return _sum(self.layers[name], tensor)


def merged(base: PreTrainedModel, model: PreTrainedModel) -> PreTrainedModel | MergedParts:
    """A plain model with adapters added to the weights they stand beside; those are new, the rest is shared.

    peft's own merging adds in place, which here would be into the base model of every run.
    """
    if group_of(model) is not None:
        # The adapter is in parts, too: both are made whole.
        base, model = readable(base), readable(model)
    layers = dict(_by_weight(model))
    sharded = record_of(base)
    made = frozen_copy(base) if sharded is None else sharded.hollow_copy()
    if sharded is None:
        make_whole(made)
        make_float32(made)
    for name, layer in layers.items():
        owner, _, parameter = name.rpartition(".")
        module: Any = made.get_submodule(owner)
        weight = getattr(module, parameter).detach()
        # Of a hollow model the weight takes no memory, and the same one untied none either.
        summed = _sum(layer, weight) if sharded is None else weight
        setattr(module, parameter, nn.Parameter(summed, requires_grad=False))
    head: Any = made.get_output_embeddings()
    embedding: Any = made.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        # They may be tied in the base model, but no longer are.
        made.config.get_text_config().tie_word_embeddings = made.config.tie_word_embeddings = False
    if sharded is None:
        return made
    for each in (base, model):
        reshard(each)
    tensors: dict[str, Any] = dict(base.named_parameters(remove_duplicate=False))
    return MergedParts(made, {name: tensors[name] for name, _ in made.named_parameters()}, layers)


def _by_weight(model: PreTrainedModel) -> Iterator[tuple[str, LoraLayer]]:
    """What has an adapter, by the name of the parameter that it is added to."""
    for name, layer in adapted_weights(model):
        yield name if hasattr(layer, "parameter_name") else f"{name}.weight", layer


def _sum(layer: LoraLayer, weight: Tensor) -> Tensor:
    """A weight of the base model and what an adapter adds to it, in float32, where the weight is."""
    adds: Any = layer
    with torch.no_grad(), as_if_float32(adds):
        delta = adds.get_delta_weight(ADAPTER)
    return (weight.to("cpu", torch.float32) + delta.to("cpu", torch.float32)).to(weight.device)


def check_settings(settings: LoraSettings, *, hidden_size: int) -> None:
    """Refuses settings out of range.

    Raises:
        InvalidArgumentError: INVALID_FIELD.
    """
    if not 1 <= settings.rank <= hidden_size:
        raise invalid_field(
            "lora_rank",
            f"is {settings.rank}; it must be 1 to {hidden_size}, the model's hidden size, or 0 for no LoRA.",
        )
    check_number("lora_alpha", settings.alpha, above=0)


def _chosen(base: PreTrainedModel, targets: Targets, settings: LoraSettings) -> list[str]:
    """Names of what to adapt. A kind that the model has nothing of is left out."""
    wanted = [field for field in targets.kinds if getattr(settings, field)]
    names = [name for field in wanted for name in targets.kinds[field]]
    if not wanted:
        raise invalid_field(
            "train_attn", "is false, and so are train_mlp and train_unembed; nothing would train. Set one of them."
        )
    if not names:
        has = [field for field, found in targets.kinds.items() if found]
        raise invalid_field(
            wanted[0],
            f"is true, but {type(base).__name__} has nothing of that kind to adapt"
            + (f"; it has of {' and '.join(has)}." if has else ", nor of another: train all parameters (lora_rank 0)."),
        )
    for field in wanted:
        if not targets.kinds[field]:
            logger.warning(
                f"{field} has no effect: the model has nothing of that kind to adapt.",
                extra={"fields": {"architecture": type(base).__name__}},
            )
    return names


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """Hides warnings of what is intended: an adapter of the head alone where head and embedding are tied."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        # peft looks for what a pattern matches among modules alone, and takes it for parameters all the same.
        warnings.filterwarnings("ignore", message=".*_pattern keys did not match any targeted module.*")
        # peft reads an attribute that transformers has renamed.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield
