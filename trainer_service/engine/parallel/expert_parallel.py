"""Expert parallel: the ranks of a group divide the experts of each layer among them, and tokens go where theirs are.

They are ranks of those that parameters lie in parts on (FSDP), each with packs of its own. Experts' weights, [E, …],
are not gathered: rank 0 of a group has the first E / size experts, and so on. What an expert is asked comes from all
ranks of the group, so its gradient is theirs together; ranks with the same experts, its *peers*, sum theirs as FSDP
does. Peers are adjacent: what a rank has of all experts is then what FSDP alone would give it, and states are the same.

Shape suffixes: S rows, D hidden size, E experts.
"""

import functools
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from gradwire.errors import GradwireError, invalid_field
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from trainer_service.engine.parallel.tensor_parallel import RankGroup
from trainer_service.engine.rank_channels import Ranks

_GROUP = "_gradwire_expert_parallel"


@dataclass(frozen=True, eq=False)
class ExpertParallel(RankGroup):
    """This rank's group."""

    def part(self, own: DTensor) -> DTensor:
        """What peers have of experts' weights, in parts on them, given what lies in parts on all ranks.

        Args:
            own: [E, …]; what this rank has of it stays as it is.
        """
        shape, mesh = torch.Size([len(own) // self.size, *own.shape[1:]]), self.mesh
        placements: list[Placement] = [Shard(0)] if mesh.ndim == 1 else [Replicate(), Shard(0)]
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(own.to_local(), mesh, placements, run_check=False, shape=shape, stride=stride)


def expert_parallel(ranks: Ranks) -> ExpertParallel | None:
    """This rank's group; None where each rank computes all experts. Every rank calls this."""
    if ranks.ep_size == 1:
        return None
    return _arranged(ranks.rank, ranks.dp_replicate_size, ranks.fsdp_size, ranks.ep_size, ranks.timeout_s)


@functools.cache
def _arranged(rank: int, dp_replicate_size: int, fsdp_size: int, ep_size: int, timeout_s: float) -> ExpertParallel:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    num_peers, timeout = fsdp_size // ep_size, timedelta(seconds=timeout_s)
    names = ("dp_replicate", "ep", "peers")
    mesh = init_device_mesh(kind, (dp_replicate_size, ep_size, num_peers), mesh_dim_names=names)
    found: dict[int, tuple[int, Any]] = {}
    for replica in range(0, mesh.size(), fsdp_size):
        for place in range(num_peers):
            members = [*range(replica + place, replica + fsdp_size, num_peers)]
            # All ranks make all of them, in this order.
            group = distributed.new_group(members, timeout=timeout)
            found |= {member: (number, group) for number, member in enumerate(members)}
    number, group = found[rank]
    return ExpertParallel(
        rank=number,
        size=ep_size,
        group=group,
        mesh=mesh["peers"] if dp_replicate_size == 1 else mesh["dp_replicate", "peers"],
        first=tuple(range(0, fsdp_size, num_peers)),
    )


def find_experts(model: nn.Module) -> dict[str, Any]:
    """Modules, by name, that hold all their experts' weights stacked and go by transformers' interface of experts."""
    return {name: module for name, module in model.named_modules() if goes_by_interface(module)}


def goes_by_interface(module: nn.Module) -> bool:
    """Whether transformers lets another implementation compute this module."""
    return all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate"))


def check_experts(model: nn.Module, ranks: Ranks) -> None:
    """Refuses a model whose experts ranks cannot divide.

    Args:
        model: Its parameters' shapes count alone.
        ranks: Are to divide them; ep_size is not 1.

    Raises:
        InvalidArgumentError: INVALID_FIELD.
    """
    kind, found = type(model).__name__, find_experts(model)
    if not found:
        raise refused(ranks, f"{kind} has no experts in stacked weights that transformers lets others compute")
    for name, module in found.items():
        number = int(module.num_experts)
        for own, parameter in module.named_parameters():
            if "." in own or len(parameter) != number:
                raise refused(ranks, f"{kind} has {name}.{own}, which is not one of {number} experts each")
        if number % ranks.fsdp_size:
            fits = [each for each in range(1, number + 1) if number % each == 0 and each % ranks.ep_size == 0]
            more = f", or an --fsdp-size of {', '.join(map(str, fits))}" if fits else ""
            what = f"{kind} has {number} experts, which the {ranks.fsdp_size} ranks that have them cannot divide evenly"
            raise refused(ranks, what, more)


def refused(ranks: Ranks, why: str, instead: str = "") -> GradwireError:
    """A refusal of a model."""
    return invalid_field("ep_size", f"is {ranks.ep_size}, and {why}; start the trainer with --ep-size 1{instead}.")


def num_gathered(model: nn.Module, ranks: Ranks) -> int:
    """Parameters that are whole on a rank while it computes a batch, of a model in parts; 0 of a whole one.

    Args:
        model: The whole model, or without what its parameters hold.
        ranks: Have it.
    """
    if ranks.world_size == 1:
        return 0
    total = sum(parameter.numel() for parameter in model.parameters()) // ranks.tp_size
    experts = [parameter for module in find_experts(model).values() for parameter in module.parameters()]
    divided = sum(parameter.numel() for parameter in experts) if ranks.ep_size > 1 else 0
    return total - divided + divided // ranks.ep_size


def divide_experts(module: nn.Module, group: ExpertParallel) -> None:
    """Says that a module has its rank's experts alone."""
    setattr(module, _GROUP, group)


def divided_by(module: nn.Module) -> ExpertParallel | None:
    """The ranks that divide a module's experts; None where it has them all."""
    return getattr(module, _GROUP, None)


@dataclass(frozen=True)
class Exchange:
    """Rows that ranks of a group send one another, those for one rank behind one another, in the order of ranks.

    Attributes:
        group: The ranks.
        sent: How many rows this rank sends to each.
        received: How many it gets from each.
        expert_S: Of those it gets, which of this rank's experts each is for.
    """

    group: ExpertParallel
    sent: list[int]
    received: list[int]
    expert_S: Tensor

    @classmethod
    def of(cls, group: ExpertParallel, counts_E: Tensor) -> "Exchange":
        """Of rows in the order of their experts, given how many each expert has. All ranks of the group call this."""
        sent, received = counts_E.view(group.size, -1), torch.empty_like(counts_E).view(group.size, -1)
        distributed.all_to_all_single(received, sent, group=group.group)
        num_sent, num_received = torch.stack([sent.sum(1), received.sum(1)]).tolist()
        experts = torch.arange(sent.shape[1], device=sent.device).repeat(group.size)
        expert_S = experts.repeat_interleave(received.flatten(), output_size=sum(num_received))
        return cls(group, num_sent, num_received, expert_S)

    def there(self, x_SD: Tensor) -> Tensor:
        """Each row where its expert is."""
        found: Any = _Exchanged.apply(x_SD, self.sent, self.received, self.group.group)
        return found

    def back(self, x_SD: Tensor) -> Tensor:
        """What was made of them, where they came from."""
        found: Any = _Exchanged.apply(x_SD, self.received, self.sent, self.group.group)
        return found


class _Exchanged(torch.autograd.Function):
    """Rows sent and received; their gradients go the other way."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x_SD: Tensor, sent: list[int], received: list[int], group: distributed.ProcessGroup
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchange(x_SD, sent, received, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _exchange(grad_SD, ctx.received, ctx.sent, ctx.group), None, None, None


def _exchange(x_SD: Tensor, sent: list[int], received: list[int], group: distributed.ProcessGroup) -> Tensor:
    found_SD = x_SD.new_empty(sum(received), x_SD.shape[1])
    distributed.all_to_all_single(found_SD, x_SD.contiguous(), received, sent, group=group)
    return found_SD
