"""A model whose parameters lie in parts on all ranks: torch's FSDP2, set up so that it computes what one rank does.

The model is made twice. transformers' loader reads each rank's part of every parameter, with its own conversion of
names. What runs is built from those parts by `Sharded.fill`, on a hollow copy of the model: all modules, and parameters
that have a shape and take no memory. So copies, which FSDP refuses to make, are hollow copies filled again: an
adapter's model has the base model's parts, tensor for tensor, and whole copies get whole parameters.

Gradients of a sharded model are summed over the ranks, as losses are, by each backward. Adapters are on every rank, and
their gradients are summed once a step (gradient_sums.py).

With tensor parallel (--tp-size) what lies in parts is what a group of ranks has of each parameter (tensor_parallel.py):
the hollow model is as the whole one, and layers are cut where its copies are filled (cut_layers.py). So it is with
expert parallel (--ep-size), for experts alone (expert_parallel.py).

With replicas (--dp-replicate-size) the mesh has two axes: parts lie along the second, and are there again along the
first. Layers are gathered within a replica; between replicas gradients are summed, once a batch.
"""

import functools
import gc
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from trainer_service.engine.device import Device
from trainer_service.engine.parallel.cut_layers import Cutting
from trainer_service.engine.parallel.expert_parallel import ExpertParallel, divide_experts, find_experts
from trainer_service.engine.parallel.gloo_collectives import use_gloo_collectives
from trainer_service.engine.parallel.hollow import copy_with, hollow_like, replace_parameters, weightless
from trainer_service.engine.parallel.tensor_parallel import Cut, TensorParallel, cut_of, joined, mark_cut

_RECORD = "_gradwire_sharded"
_FORWARD = "gradwire_forward"
Forward = Callable[..., Tensor]


class Sharded:
    """What a sharded model was made from.

    Args:
        hollow: The model, with parameters that take no memory.
        parts: Of each of those parameters this rank's part, by identity.
        device: Where parts are.
        forward: What is run of the model, as a method; parameters are whole within.
        cutting: How the model is cut for tensor parallel; None where it is not.
        experts: The ranks that divide its experts; None where each computes all.
    """

    def __init__(
        self,
        hollow: PreTrainedModel,
        parts: Mapping[nn.Parameter, DTensor],
        *,
        device: Device,
        forward: Forward,
        cutting: Cutting | None = None,
        experts: ExpertParallel | None = None,
        wholes: "WeakValueDictionary[nn.Parameter, nn.Parameter] | None" = None,
    ) -> None:
        self.hollow = hollow
        self.cutting = cutting
        self.experts = experts
        self._parts = parts
        self._device = device
        self._forward = forward
        self._wholes = WeakValueDictionary[nn.Parameter, nn.Parameter]() if wholes is None else wholes
        # What never changes is gathered once for all who read it.

    @classmethod
    def of_loaded(
        cls,
        loaded: PreTrainedModel,
        *,
        device: Device,
        forward: Forward,
        group: TensorParallel | None = None,
        experts: ExpertParallel | None = None,
    ) -> "Sharded":
        """Of a model that transformers loaded in parts, whose parts it takes."""
        found: dict[str, Any] = dict(loaded.named_parameters())
        hollow = hollow_like(loaded)
        parts = {parameter: found[name].detach() for name, parameter in hollow.named_parameters()}
        cutting = None if group is None else Cutting(hollow, group)
        if cutting is not None:
            parts = {parameter: cutting.part(parameter, part(own)) for parameter, own in parts.items()}
        if experts is not None:
            divided = [parameter for module in find_experts(hollow).values() for parameter in module.parameters()]
            parts |= {parameter: experts.part(parts[parameter]) for parameter in divided}
        return cls(hollow, parts, device=device, forward=forward, cutting=cutting, experts=experts)

    def limit_waiting(self, timeout_s: float) -> None:
        """Has ranks give up on one another in this model's collectives after that many seconds; torch would wait for 30
        minutes in groups that are not of all ranks."""
        for mesh in {part.device_mesh for part in self._parts.values()}:
            for group in mesh.get_all_groups():
                distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)

    def build(self) -> PreTrainedModel:
        """A model with these parts, all of whose parameters train."""
        model = self.hollow_copy()
        self.fill(model, train=True)
        return model

    def frozen(self, change: Callable[[PreTrainedModel], object]) -> PreTrainedModel:
        """A model with these parts, none of which trains.

        Args:
            change: Changes modules and dtypes of parameters, in place and of a hollow copy; the parts are cast alike.
        """
        assert self.cutting is None, "layers that are cut stay as they are"
        hollow = self.hollow_copy()
        before = dict(hollow.named_parameters())
        change(hollow)
        parts: dict[nn.Parameter, Any] = {
            parameter: self._parts[before[name]].to(parameter.dtype)
            for name, parameter in hollow.named_parameters()
            if before[name] in self._parts
        }
        made = Sharded(hollow, parts, device=self._device, forward=self._forward, experts=self.experts)
        model = made.hollow_copy()
        made.fill(model)
        return model

    def first_difference(self, whole: PreTrainedModel) -> str:
        """The name of a parameter of which this rank has another part than the same model, or its first layers, read
        whole; "" where there is none."""
        found = dict(whole.named_parameters())
        for name, parameter in self.hollow.named_parameters():
            if name not in found:
                continue
            wanted, own, cut = found[name].detach(), self._parts[parameter], self._cut_of(parameter)
            if cut is not None and cut.dim is not None:
                place = cut.group.own(wanted.shape[cut.dim])
                wanted = wanted.narrow(cut.dim, place.start, place.stop - place.start)
            rows = part(own)
            if not torch.equal(wanted[first_row(own) :][: len(rows)], rows):
                return name
        return ""

    def hollow_copy(self) -> PreTrainedModel:
        """Modules of its own; the parameters are `hollow`'s."""
        return copy_with(self.hollow, {})

    def fill(self, model: PreTrainedModel, *, train: bool = False) -> None:
        """Puts this rank's parts into a hollow copy. Parameters it has beside them, an adapter's, are left alone.

        Args:
            model: Made by `hollow_copy`, its modules wrapped or not.
            train: Whether the parts train. Parts that do belong to one model.
        """
        cutting = self.cutting
        # An adapter that is cut is whole in copies, of which it is gathered.
        adapter = [parameter for parameter in model.parameters() if parameter not in self._parts]
        apart = {parameter: weightless(parameter) for parameter in adapter if cutting is not None}
        record = Sharded(
            copy_with(model, apart),
            self._parts,
            device=self._device,
            forward=self._forward,
            cutting=cutting,
            experts=self.experts,
            wholes=self._wholes,
        )
        if cutting is not None:
            cutting.cut_adapter(model)
            cutting.connect(model)
        own = {name: parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
        # On "meta" FSDP makes no parts of its own.
        on_meta = {
            parameter: nn.Parameter(torch.empty(own.shape, dtype=own.dtype, device="meta"), requires_grad=train)
            for parameter, own in self._parts.items()
        }
        replace_parameters(model, on_meta)
        ignored = {parameter for parameter in own.values() if parameter not in self._parts}
        mesh = next(part.device_mesh for parameter, part in self._parts.items() if not self._divided(parameter))
        policy = MixedPrecisionPolicy()
        if self._device.compute_dtype != torch.float32:
            # Layers are gathered in the dtype they compute in, which halves the traffic; autocast would cast them. What
            # the root holds, embedding, last norm and head, stays in float32: the head's gradient is.
            policy = MixedPrecisionPolicy(
                param_dtype=self._device.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        if self.experts is not None:
            for module in find_experts(model).values():
                # Before the layer that they are in, which then leaves them out.
                fully_shard(module, mesh=self.experts.mesh, mp_policy=policy, ignored_params=ignored)
                divide_experts(module, self.experts)
        for layer in _layers(model):
            if any(parameter not in ignored for parameter in layer.parameters()):
                fully_shard(layer, mesh=mesh, mp_policy=policy, ignored_params=ignored)
        fully_shard(model, mesh=mesh, ignored_params=ignored, reshard_after_forward=False)
        parts = {
            parameter: nn.Parameter(_another(part), requires_grad=train) for parameter, part in self._parts.items()
        }
        for parameter, filled_with in parts.items():
            if (cut := self._cut_of(parameter)) is not None:
                mark_cut(filled_with, cut)
        filled = {name: parts[parameter] for name, parameter in own.items() if parameter in parts}
        model.load_state_dict(filled, strict=False, assign=True)
        for module in fsdp_modules(model):
            # Losses are sums, so their gradients are summed. The factor alone is a reduction that gloo does not have,
            # and that NCCL gets wrong in bfloat16 (pytorch#190745).
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            # A rank without a target leaves parameters without a gradient, while the others reduce theirs.
            module.set_reduce_scatter_unused_params(True)
        if self._device.torch_device.type == "cpu":
            use_gloo_collectives(model, fsdp_modules(model))
        vars(model)[_FORWARD] = functools.partial(_run, self._forward, model)
        register_fsdp_forward_method(model, _FORWARD)
        vars(model)[_RECORD] = record

    def whole_copy(self, model: PreTrainedModel) -> PreTrainedModel:
        """A plain copy of a model filled from this record, with whole parameters that do not train, on every rank.

        Adapters are copied with it. Every rank must call this.
        """
        reshard(model)
        now: dict[str, Any] = dict(model.named_parameters())
        made: dict[nn.Parameter, nn.Parameter] = {}
        for name, parameter in self.hollow.named_parameters():
            known = self._wholes.get(parameter)
            if known is None:
                known = nn.Parameter(whole_parameter(now[name]).clone(), requires_grad=False)
                if not now[name].requires_grad:
                    self._wholes[parameter] = known
            made[parameter] = known
        return copy_with(self.hollow, made)

    def part_copy(self, model: PreTrainedModel) -> PreTrainedModel:
        """The same in parts: what does not train is shared. Adapters are copied with it."""
        assert self.cutting is None, "layers that are cut are read whole"
        reshard(model)
        now: dict[str, Any] = dict(model.named_parameters())
        adapter = {
            parameter: nn.Parameter(now[name].detach().clone(), requires_grad=False)
            for name, parameter in self.hollow.named_parameters()
            if parameter not in self._parts
        }
        hollow = copy_with(self.hollow, adapter)
        parts: dict[nn.Parameter, Any] = {
            parameter: now[name].detach().clone() if now[name].requires_grad else now[name].detach()
            for name, parameter in hollow.named_parameters()
            if parameter in self._parts
        }
        made = Sharded(hollow, parts, device=self._device, forward=self._forward, experts=self.experts)
        return made.frozen(lambda _: None)

    def _divided(self, parameter: nn.Parameter) -> bool:
        """Whether one of the hollow model's parameters is experts', which ranks divide."""
        return self.experts is not None and self._parts[parameter].device_mesh == self.experts.mesh

    def _cut_of(self, parameter: nn.Parameter) -> Cut | None:
        """How one of the hollow model's parameters lies on a group."""
        if self.cutting is not None:
            return self.cutting.cut_of(parameter)
        return Cut(self.experts, 0) if self.experts is not None and self._divided(parameter) else None


def record_of(model: nn.Module) -> Sharded | None:
    """What a model was made from; None where it is whole."""
    return vars(model).get(_RECORD)


def forward_of(model: nn.Module) -> Forward | None:
    """How a sharded model is run; None where it is whole."""
    return vars(model).get(_FORWARD)


def group_of(model: nn.Module) -> TensorParallel | None:
    """The ranks that compute a model's layers together with this one; None where it does so by itself."""
    record = record_of(model)
    return None if record is None or record.cutting is None else record.cutting.group


def readable(model: PreTrainedModel, *, in_parts: bool = False) -> PreTrainedModel:
    """The model where it is whole; of a sharded one a copy that nothing changes. Every rank must call this.

    Args:
        model: The model.
        in_parts: Leave the copy in parts, whose forwards are every rank's, rather than gather it.
    """
    record = record_of(model)
    if record is None:
        return model
    return record.part_copy(model) if in_parts else record.whole_copy(model)


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """The modules whose parameters are gathered together."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Lets go of gathered parameters. Before any change: a forward leaves some gathered, and those do not notice it."""
    if record_of(model) is not None:
        for module in fsdp_modules(model):
            module.reshard()


def free_cycles() -> None:
    """Frees models that were let go. What FSDP hangs on a model refers to it, so it does not go by itself."""
    # The worker froze what it loaded (engine/__main__.py), the first model with it.
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank, each of which must call this; of one that is whole already, itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_parameter(parameter: Tensor, like: Tensor | None = None) -> Tensor:
    """All of a parameter, detached, or of a tensor that lies as `like` does, a parameter; see `whole`."""
    return joined(whole(parameter.detach()), cut_of(parameter if like is None else like))


def part(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor: a view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_part(tensor: Tensor) -> bool:
    """Whether this rank has a part of it, as every other has."""
    return isinstance(tensor, DTensor)


def in_first_replica(tensor: DTensor) -> bool:
    """Whether this rank is of the first of those that have all parts among them."""
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    return not any(place for axis, place in enumerate(coordinate) if axis != _shard_axis(tensor))


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """The same tensor in parts, given this rank's, as `like` is in parts; as it is where that is whole."""
    if not isinstance(like, DTensor):
        return tensor
    return DTensor.from_local(
        tensor, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def first_row(tensor: DTensor) -> int:
    """Where this rank's part begins in the whole: FSDP cuts the first dim into equal parts, the last ones shorter."""
    mesh, axis = tensor.device_mesh, _shard_axis(tensor)
    return min(len(tensor), -(-len(tensor) // mesh.size(axis)) * mesh.get_local_rank(axis))


def expect(model: PreTrainedModel, *, backward: bool, last: bool, keep: bool) -> None:
    """Says what comes next, so that nothing is gathered or summed that need not be. Of a whole model nothing changes.

    What is left gathered or unsummed is so until the last one, which must come before anything else of the model.

    Args:
        model: Is about to compute a microbatch.
        backward: Whether its backward follows at once.
        last: Whether it is the batch's last.
        keep: Whether there is memory for whole parameters, and for gradients of them, until then.
    """
    if record_of(model) is None:
        return
    for module in fsdp_modules(model):
        # What the root holds is used at both ends of a forward, so it stays in any case.
        if module is not model:
            module.set_reshard_after_forward(not keep or (last and not backward), recurse=False)
        module.set_reshard_after_backward(not keep or last, recurse=False)
        module.set_requires_gradient_sync(not keep or last, recurse=False)
        # Sums over replicas are of parts, and can wait without taking memory that matters.
        module.set_requires_all_reduce(last, recurse=False)


def _shard_axis(tensor: DTensor) -> int:
    """Of the mesh, the axis along which parts lie; along another, parts are there again."""
    return next(axis for axis, placement in enumerate(tensor.placements) if placement.is_shard())


def _run(forward: Forward, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Tensor:
    # FSDP hangs its backward on what is returned, and warns where that is a view.
    return forward(model, *args, **kwargs).clone()


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """Layers, the outermost where some are within others."""
    for child in model.children():
        if isinstance(child, GradientCheckpointingLayer):
            yield child
        else:
            yield from _layers(child)


def _another(tensor: DTensor) -> DTensor:
    """Another object over the same part."""
    return part_of(tensor.to_local(), tensor)  # pyright: ignore[reportReturnType]
