"""Cuts a model's layers for the ranks of a tensor parallel group, by transformers' own plan of the model.

    colwise     a linear layer is cut along its outputs
    rowwise     along its inputs; a bias is added to the sum
    replicated_with_grad_allreduce
                whole on every rank, but each applies it to its own heads
    EMBEDDING, HEAD
                the embedding and the head, cut along the vocabulary whatever the plan says; packed/vocabulary.py
                computes what the head answers

Of an adapter's matrices beside a layer one is cut with it: B along outputs, or A along inputs. The other is whole on
every rank, and its gradient there a summand.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from gradwire.errors import GradwireError, invalid_field
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from transformers import PreTrainedModel

from trainer_service.engine.parallel.tensor_parallel import (
    Cut,
    TensorParallel,
    cut_of,
    mark_cut,
    spread,
    spread_anew,
    summed,
)

COLWISE, ROWWISE, SHARED = "colwise", "rowwise", "replicated_with_grad_allreduce"
EMBEDDING, HEAD = "embedding", "head"
_DIMS = {COLWISE: 0, ROWWISE: 1, EMBEDDING: 0, HEAD: 0}
"""Of a weight, [O, I] or [V, D], the dim that it is cut along."""
_ELSEWHERE = "_gradwire_elsewhere"


class Cutting:
    """How one model is cut.

    Args:
        model: Whole, or without what its parameters hold.
        group: Computes its layers together.

    Raises:
        InvalidArgumentError: INVALID_FIELD: it cannot be cut so.
    """

    def __init__(self, model: PreTrainedModel, group: TensorParallel) -> None:
        self.group = group
        self._styles = plan_cuts(model, group.size)
        self._cuts = {parameter: Cut(group) for parameter in model.parameters()}
        for name, style in self._styles.items():
            for parameter, dim in _dims(model.get_submodule(name), style):
                self._cuts[parameter] = Cut(group, dim)

    def cut_of(self, parameter: nn.Parameter) -> Cut:
        """How one of the model's parameters is cut."""
        return self._cuts[parameter]

    def shape_of(self, parameter: nn.Parameter) -> torch.Size:
        """What a rank of the group has of one of the model's parameters."""
        shape, dim = list(parameter.shape), self._cuts[parameter].dim
        if dim is not None:
            shape[dim] //= self.group.size
        return torch.Size(shape)

    def own(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """What this rank has of a whole tensor that is cut as one of the model's parameters is: a view."""
        dim = self._cuts[parameter].dim
        if dim is None:
            return whole
        own = self.group.own(whole.shape[dim])
        return whole.narrow(dim, own.start, own.stop - own.start)

    def cut(self, model: nn.Module) -> None:
        """Cuts the model itself, whole as it is, in place."""
        made = {
            parameter: nn.Parameter(self.own(parameter, parameter.detach()).clone(), parameter.requires_grad)
            for parameter in self._cuts
        }
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter in made:
                    module._parameters[name] = made[parameter]
        self.connect(model)

    def part(self, parameter: nn.Parameter, own: Tensor) -> DTensor:
        """What the group's ranks have of one of the model's parameters, in parts, given this rank's part of that."""
        shape, mesh = self.shape_of(parameter), self.group.mesh
        like = torch.empty(shape, device="meta")
        # As FSDP cuts it, and transformers' loader for FSDP.
        rows, place = like.chunk(mesh.size(mesh.ndim - 1)), mesh.get_local_rank(mesh.ndim - 1)
        assert own.shape == (rows[place].shape if place < len(rows) else (0, *shape[1:])), f"{own.shape} of {shape}"
        placements: list[Placement] = [Shard(0)] if mesh.ndim == 1 else [Replicate(), Shard(0)]
        return DTensor.from_local(
            own.contiguous(), mesh, placements, run_check=False, shape=shape, stride=like.stride()
        )

    def cut_adapter(self, model: nn.Module) -> None:
        """Cuts the adapter of a model that has one, whole as it is."""
        for name, style in self._styles.items():
            layer = model.get_submodule(name)
            if isinstance(layer, LoraLayer):
                for linear, cut in _adapter_cuts(layer, style, self.group):
                    _cut_in_place(linear, cut)
        for module in model.modules():
            # Beside what is not cut.
            if isinstance(module, LoraLayer):
                for parameter in _adapter_of(module):
                    if cut_of(parameter) is None:
                        mark_cut(parameter, Cut(self.group))

    def connect(self, model: nn.Module) -> None:
        """Has layers of a model with cut parameters take from the group what they need, and give it what they make."""
        for name, style in self._styles.items():
            _CONNECT[style](model.get_submodule(name), self.group)


def plan_cuts(model: PreTrainedModel, size: int) -> dict[str, str]:
    """What becomes of a model's modules, by name, in a group of that size; of others nothing.

    Args:
        model: Its parameters' shapes count alone.
        size: Ranks of a group.

    Raises:
        InvalidArgumentError: INVALID_FIELD: transformers has no plan for it or one that does something else, or its
            sizes cannot be divided.
    """
    kind, config = type(model).__name__, model.config
    if config.get_text_config() is not config:
        raise _refused(size, f"{kind} is of more than text; such models are not cut yet")
    plan: Mapping[str, str] = model.tp_plan or {}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    styles: dict[str, str] = {}
    for name, module in model.named_modules():
        if module is embedding or module is head:
            styles[name] = EMBEDDING if module is embedding else HEAD
            continue
        rules = {name: plan.get(_starred(name))}
        rules |= {f"{name}.{own}": plan.get(_starred(f"{name}.{own}")) for own in module._parameters}
        for rule_name, style in rules.items():
            if style is None:
                continue
            fits = isinstance(module, nn.Linear) if style in _DIMS else style == SHARED
            if rule_name != name or style not in (COLWISE, ROWWISE, SHARED) or not fits:
                what = f'transformers\' plan for {kind} has "{style}" for {_starred(rule_name)}'
                raise _refused(size, f"{what}, which is not there yet")
            styles[name] = style
    if COLWISE not in styles.values() or not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise _refused(size, f"transformers has no plan to cut {kind} by")
    _check_numbers(model, styles, size)
    # Whatever stands between two cut layers sees one rank's part alone.
    around = dict.fromkeys(name.rpartition(".")[0] for name, style in styles.items() if style in (COLWISE, ROWWISE))
    for parent in around:
        for name, module in model.get_submodule(parent).named_modules(prefix=parent):
            if name not in styles and any(own is not None for own in module._parameters.values()):
                what = (
                    f"transformers' plan for {kind} cuts {_starred(parent)}, and says nothing of {_starred(name)} in it"
                )
                raise _refused(size, what)
    return styles


def loading_rules(model: PreTrainedModel, size: int) -> dict[str, str]:
    """What transformers' loader is told beside its plan: how it reads the embedding and the head, by name.

    Raises:
        InvalidArgumentError: See plan_cuts.
    """
    rules = {EMBEDDING: "embedding_rowwise", HEAD: "colwise_gather_output"}
    return {name: rules[style] for name, style in plan_cuts(model, size).items() if style in rules}


def _check_numbers(model: PreTrainedModel, styles: Mapping[str, str], size: int) -> None:
    kind, config = type(model).__name__, model.config
    heads = getattr(config, "num_attention_heads", None)
    numbers: dict[str, Any] = {
        "attention heads": heads,
        "key/value heads": getattr(config, "num_key_value_heads", heads),
    }
    for name, style in styles.items():
        module: Any = model.get_submodule(name)
        if style == EMBEDDING:
            numbers["tokens in its vocabulary"] = len(module.weight)
        elif style in _DIMS:
            what = "inputs" if style == ROWWISE else "outputs"
            numbers[f"{what} of {_starred(name)}"] = module.weight.shape[_DIMS[style]]
    # Where layers differ in their heads, the configuration has a list of each.
    flat = [(what, one) for what, found in numbers.items() for one in (found if isinstance(found, list) else [found])]
    for what, number in flat:
        if number and number % size:
            fits = [each for each in range(1, min(number, 64) + 1) if number % each == 0]
            raise _refused(size, f"{kind} has {number} {what}, which it must divide, as {_or(fits)} do")


def _refused(size: int, why: str) -> GradwireError:
    return invalid_field("tp_size", f"is {size}, and {why}; start the trainer with another --tp-size, such as 1.")


def _or(numbers: list[int]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} and {last}" if others else last


def _starred(name: str) -> str:
    """As plans name a module, with * for the numbers of layers."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _dims(module: nn.Module, style: str) -> Iterator[tuple[nn.Parameter, int]]:
    """What of a module is cut, and along which dim. Biases are of outputs."""
    for name, parameter in module.named_parameters(recurse=False):
        if style in _DIMS and not (name == "bias" and style == ROWWISE):
            yield parameter, _DIMS[style]


def _adapter_of(layer: LoraLayer) -> Iterator[nn.Parameter]:
    for group in (layer.lora_A, layer.lora_B):
        yield from group.parameters()


def _adapter_cuts(layer: LoraLayer, style: str, group: TensorParallel) -> Iterator[tuple[nn.Linear, Cut]]:
    a: Any
    b: Any
    for a, b in zip(layer.lora_A.values(), layer.lora_B.values(), strict=True):
        along_inputs = style == ROWWISE
        yield a, Cut(group, 1) if along_inputs else Cut(group, summand=True)
        yield b, Cut(group, summand=True) if along_inputs else Cut(group, 0)


def _cut_in_place(linear: nn.Linear, cut: Cut) -> None:
    weight: Any = linear.weight
    if cut.dim is not None:
        own = cut.group.own(weight.shape[cut.dim])
        part = weight.detach().narrow(cut.dim, own.start, own.stop - own.start)
        weight = linear.weight = nn.Parameter(part.clone(), requires_grad=weight.requires_grad)
    mark_cut(weight, cut)


def _connect_colwise(module: nn.Module, group: TensorParallel) -> None:
    module.register_forward_pre_hook(lambda _, args: (spread(args[0], group), *args[1:]))


def _connect_rowwise(module: nn.Module, group: TensorParallel) -> None:
    def add_up(module: nn.Module, args: object, output: Tensor) -> Tensor:
        bias = _linear_of(module).bias
        found = summed(output, group)
        return found if bias is None else found + bias.to(found.dtype)

    if _linear_of(module).bias is not None:
        # It is put back before the sum is made, of which it is no summand.
        _replace_within(module, lambda module: (_linear_of(module), {"bias": None}))
    module.register_forward_hook(add_up)


def _connect_shared(module: nn.Module, group: TensorParallel) -> None:
    _replace_within(
        module,
        lambda module: (
            module,
            {name: None if own is None else spread_anew(own, group) for name, own in module._parameters.items()},
        ),
    )


def _connect_embedding(module: nn.Module, group: TensorParallel) -> None:
    table: Any = module
    own = group.own(table.num_embeddings)
    table.num_embeddings = own.stop - own.start
    if table.padding_idx is not None:
        # What of the vocabulary another rank has is looked up as the first row here, and comes out as zeros.
        table.padding_idx = table.padding_idx - own.start if own.start <= table.padding_idx < own.stop else None

    def look_up(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        tokens = args[0] - own.start
        elsewhere = (tokens < 0) | (tokens >= own.stop - own.start)
        vars(module)[_ELSEWHERE] = elsewhere
        return tokens.masked_fill(elsewhere, 0), *args[1:]

    def add_up(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return summed(output.masked_fill(vars(module).pop(_ELSEWHERE)[..., None], 0), group)

    module.register_forward_pre_hook(look_up)
    module.register_forward_hook(add_up)


def _linear_of(module: nn.Module) -> Any:
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def _replace_within(
    module: nn.Module, replaced: Callable[[nn.Module], tuple[nn.Module, dict[str, Tensor | None]]]
) -> None:
    """Has a module's forward find other parameters, of itself or of one within it."""
    before: list[tuple[nn.Module, dict[str, Any]]] = []

    def begin(module: nn.Module, args: object) -> None:
        owner, others = replaced(module)
        parameters: dict[str, Any] = owner._parameters
        before.append((owner, {name: parameters[name] for name in others}))
        parameters.update(others)

    def end(module: nn.Module, args: object, output: object) -> None:
        owner, parameters = before.pop()
        owner._parameters.update(parameters)

    module.register_forward_pre_hook(begin)
    module.register_forward_hook(end, always_call=True)


_CONNECT: dict[str, Callable[[nn.Module, TensorParallel], None]] = {
    COLWISE: _connect_colwise,
    ROWWISE: _connect_rowwise,
    SHARED: _connect_shared,
    EMBEDDING: _connect_embedding,
    # It is read, not called.
    HEAD: lambda module, group: None,
}
