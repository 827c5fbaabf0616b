"""What of a model an adapter can be put beside: linear layers, and the stacked weights of routed experts."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trainer_service.engine.models.adapter_names import how_peft_adapts

KINDS = ("attn", "mlp", "unembed", "others")
"""Names of a model's matrices by what becomes of them in LoRA; see Targets."""
_ROUTERS = {"router", "gate", "shared_expert_gate"}
"""Modules that choose experts; what is within them belongs to no kind, and is never adapted."""
_MLP_CLASS = re.compile(r"(mlp|ffn|feedforward|experts?|moe|moeblock|glu)$", re.IGNORECASE)
_ATTN = re.compile(r"attention|attn|mixer|mamba|deltanet|shortconv|recurrent|rglru|lstm", re.IGNORECASE)
"""Modules that mix tokens with one another: attention, and what stands in its place in recurrent models and hybrids."""
_MLP = re.compile(r"mlp|ffn|feed_?forward|experts?$|moe", re.IGNORECASE)


@dataclass(frozen=True)
class Targets:
    """What an adapter can be put beside, by names in the model: modules, and parameters of experts.

    Attributes:
        attn: In attention, and in the mixers of recurrent models and hybrids.
        mlp: In feed-forward layers, experts among them.
        unembed: The head.
        stacked: Those that are parameters: the weights of all experts, [E, O, I] or [E, I, O].
        others: Matrices that get no adapter, by names of parameters: routers, kernels of convolutions, what is read
            past its module, and what peft refuses to adapt.
    """

    attn: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ()
    unembed: tuple[str, ...] = ()
    stacked: frozenset[str] = frozenset()
    others: tuple[str, ...] = ()

    @property
    def kinds(self) -> dict[str, tuple[str, ...]]:
        """The three kinds, by the names of the settings that choose them."""
        return {"train_attn": self.attn, "train_mlp": self.mlp, "train_unembed": self.unembed}

    @property
    def all(self) -> frozenset[str]:
        """Those of all kinds."""
        return frozenset((*self.attn, *self.mlp, *self.unembed))


def find_targets(model: PreTrainedModel, forward: Callable[[], object]) -> Targets:
    """The weights that a forward reads by calling their module: one read past it would not notice its adapter.

    Args:
        model: The base model.
        forward: One forward of it, as training makes it.
    """
    called: set[str] = set()
    head = model.get_output_embeddings()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    stacked = {
        f"{name}.{parameter}": name
        for name, module in model.named_modules()
        for parameter, _ in _stacked_weights(name, module)
    }
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name))
        for name in (*linear, *dict.fromkeys(stacked.values()))
    ]
    try:
        with torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    model_type = model.config.model_type
    attn: list[str] = []
    mlp: list[str] = []
    for name, module_name in {**{name: name for name in linear}, **stacked}.items():
        if module_name not in called or _in_router(model, module_name):
            continue
        if name in stacked or (linear[name] is not head and how_peft_adapts(model_type, name.rpartition(".")[2])):
            (attn if _mixes_tokens(model, name) else mlp).append(name)
    unembed = [name for name, module in linear.items() if module is head and isinstance(module, nn.Linear)]
    found = {*attn, *mlp, *unembed}
    others = [
        name
        for name, module in _matrices(model)
        if name not in found and name.removesuffix(".weight") not in found and not isinstance(module, nn.Embedding)
    ]
    return Targets(tuple(attn), tuple(mlp), tuple(unembed), frozenset(stacked) & found, tuple(others))


def _stacked_weights(name: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    if "expert" in type(module).__name__.lower() or "expert" in name.rpartition(".")[2]:
        for parameter, weight in module.named_parameters(recurse=False):
            if weight.ndim == 3:
                yield parameter, weight


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        for parameter, weight in module.named_parameters(recurse=False):
            if weight.ndim >= 2 and not parameter.endswith("bias"):
                yield f"{name}.{parameter}", module


def _within(model: nn.Module, name: str) -> Iterator[tuple[str, str]]:
    """Last part of the name, and class, of a module and those it is within, but for the model itself."""
    while name:
        parent, _, last = name.rpartition(".")
        yield last, type(model.get_submodule(name)).__name__
        name = parent


def _in_router(model: nn.Module, name: str) -> bool:
    return any(last in _ROUTERS or kind.endswith(("Router", "Gating")) for last, kind in _within(model, name))


def _mixes_tokens(model: nn.Module, name: str) -> bool:
    """Whether it is part of attention or a mixer. The nearest module around it that says so decides, by its class
    before its name: a layer's only part may be called "mixer" whatever it is."""
    for last, kind in _within(model, name.rpartition(".")[0]):
        if _MLP_CLASS.search(kind):
            return False
        if _ATTN.search(kind) or _ATTN.search(last):
            return True
        if _MLP.search(last):
            return False
    return False
