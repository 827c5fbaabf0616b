"""Routed experts as grouped products: all tokens of one expert behind one another, every expert in the same call.

What it computes is what transformers' grouped implementation does, and it takes part as one more of them. It differs in
how: products are in the dtype that autocast asks for, as those of linear layers are; what an adapter adds is two thin
grouped products, where peft makes a copy of all experts' weights, and on the CPU goes into the product as it is made;
and tokens go to their experts and back by permutations, whose gradients are permutations too, so that nothing depends
on the order of atomic additions.

Shape suffixes: T tokens, K experts a token, S = T·K pairs of both, those of one expert behind one another, D hidden
size, E experts, I and O inputs and outputs of an expert's layer, R the LoRA rank.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from trainer_service.engine.device import computed_in
from trainer_service.engine.fused.gated_mlp import gated_halves
from trainer_service.engine.models.cpu_experts import (
    ExpertsLowRank,
    Routes,
    adapted_gated_mlps,
    adapted_product,
    added_up,
)
from trainer_service.engine.parallel.expert_parallel import Exchange, ExpertParallel, divided_by, find_experts

GROUPED = "gradwire_grouped"
"""Name of this implementation among transformers'."""
_ROW_BYTES = 16
"""Rows of grouped products must be multiples of this."""


def use_experts(model: PreTrainedModel, name: str) -> None:
    """Has a model's experts computed by an implementation of that name."""
    for module in find_experts(model).values():
        module.config._experts_implementation = name


def grouped_experts(
    experts: Any,
    hidden_TD: Tensor,
    expert_of_TK: Tensor,
    weight_of_TK: Tensor,
    *,
    low_rank: Mapping[str, ExpertsLowRank] | None = None,
) -> Tensor:
    """The experts' answers, weighted and added up; [T, D].

    Args:
        experts: The module with their weights.
        hidden_TD: Its input.
        expert_of_TK: The experts of each token.
        weight_of_TK: What their answers are weighted by.
        low_rank: What an adapter adds, by names of the module's parameters.
    """
    low_rank = low_rank or {}
    num_tokens, num_chosen = expert_of_TK.shape
    sorted_S, order_S, back_S = _by_expert(expert_of_TK.reshape(-1))
    if (group := divided_by(experts)) is not None:
        x_SD: Any = _ToExperts.apply(hidden_TD, order_S, back_S, num_chosen)
        y_SD = _computed_elsewhere(experts, group, x_SD.to(computed_in(x_SD)), sorted_S, low_rank)
    else:
        ends_E = _ends(sorted_S, experts.num_experts)
        if low_rank and _goes_by_expert(experts):
            weight_S = weight_of_TK.reshape(-1)[order_S]
            routes = Routes(order_S // num_chosen, weight_S, ends_E, back_S.view_as(expert_of_TK))
            return _by_threads(experts, hidden_TD.to(computed_in(hidden_TD)), routes, low_rank).to(hidden_TD.dtype)
        x_SD: Any = _ToExperts.apply(hidden_TD, order_S, back_S, num_chosen)
        y_SD = _answers(experts, x_SD, sorted_S, ends_E, low_rank)
    if not y_SD.is_cuda and y_SD.dtype == weight_of_TK.dtype:
        found_TD: Any = _WeightedSum.apply(y_SD, weight_of_TK, order_S, back_S)
        return found_TD.to(hidden_TD.dtype)
    y_SD: Any = _Permuted.apply(y_SD, back_S, order_S)
    y_TKD = y_SD.view(num_tokens, num_chosen, -1) * weight_of_TK[..., None]
    return y_TKD.sum(1).to(hidden_TD.dtype)


def _by_expert(expert_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Experts in their order, which rows those are of, and where each row is among them."""
    sorted_S, order_S = torch.sort(expert_S, stable=True)
    back_S = torch.empty_like(order_S)
    back_S[order_S] = torch.arange(len(order_S), device=order_S.device)
    return sorted_S, order_S, back_S


def _ends(sorted_S: Tensor, num_experts: int) -> Tensor:
    """One past each expert's last row."""
    experts_E = torch.arange(num_experts, device=sorted_S.device)
    return torch.searchsorted(sorted_S, experts_E, right=True).int()


def _answers(
    experts: Any, x_SD: Tensor, sorted_S: Tensor, ends_E: Tensor, low_rank: Mapping[str, ExpertsLowRank]
) -> Tensor:
    """What each row's expert answers, [S, D] in the dtype of products."""

    def product(name: str, x_SI: Tensor) -> Tensor:
        y_SO = _grouped_linear(x_SI, _weight(experts, name), ends_E, low_rank.get(name))
        if experts.has_bias:
            y_SO = y_SO + getattr(experts, f"{name}_bias")[sorted_S].to(y_SO.dtype)
        return y_SO

    if experts.has_gate:
        gate_and_up = product("gate_up_proj", x_SD)
        inner = gated_halves(gate_and_up) if _gates_by_silu(experts) else experts._apply_gate(gate_and_up)
        y_SD = product("down_proj", inner)
    else:
        y_SD = product("down_proj", experts.act_fn(product("up_proj", x_SD)))
    if getattr(experts, "has_post_expert_norm", False):
        y_SD = experts.post_expert_norm(y_SD)
    return y_SD


def _by_threads(experts: Any, x_TD: Tensor, routes: Routes, low_rank: Mapping[str, ExpertsLowRank]) -> Tensor:
    """What the experts of each token answer, weighted and added up, [T, D] in float32; see `_goes_by_expert`."""
    both = ((_weight(experts, name), low_rank.get(name)) for name in ("gate_up_proj", "down_proj"))
    return adapted_gated_mlps(x_TD, routes, *both)


def _computed_elsewhere(
    experts: Any, group: ExpertParallel, x_SD: Tensor, sorted_S: Tensor, low_rank: Mapping[str, ExpertsLowRank]
) -> Tensor:
    """What each row's expert answers, [S, D] in the dtype of x: it is asked on the rank that has it.

    Args:
        experts: The module with the weights of this rank's experts.
        group: The ranks that have all of them.
        x_SD: This rank's rows, in the order of their experts.
        sorted_S: Those.
        low_rank: What an adapter adds, of all experts.
    """
    own = group.own(experts.num_experts)
    low_rank = {name: ExpertsLowRank(one.a_ERI[own], one.b_EOR[own], one.scale) for name, one in low_rank.items()}
    ends_E = _ends(sorted_S, experts.num_experts).long()
    exchange = Exchange.of(group, torch.diff(ends_E, prepend=torch.zeros_like(ends_E[:1])))
    # Up to here S is this rank's rows, and from here on those that come to it.
    asked_SD, expert_S = exchange.there(x_SD), exchange.expert_S
    num_asked = len(expert_S)
    if not num_asked:
        # Where nobody asks, a row of zeros of which nothing is used: not every device multiplies no rows.
        asked_SD, expert_S = F.pad(asked_SD, (0, 0, 0, 1)), expert_S.new_zeros(1)
    sorted_S, order_S, back_S = _by_expert(expert_S)
    ends_E = _ends(sorted_S, own.stop - own.start)
    if low_rank and _goes_by_expert(experts):
        # One expert a row, whose answer is weighted where it came from.
        routes = Routes(order_S, torch.ones_like(asked_SD[:, 0]), ends_E, back_S[:, None])
        y_SD = _by_threads(experts, asked_SD, routes, low_rank).to(asked_SD.dtype)
    else:
        asked_SD: Any = _Permuted.apply(asked_SD, order_S, back_S)
        y_SD: Any = _answers(experts, asked_SD, sorted_S, ends_E, low_rank)
        y_SD: Any = _Permuted.apply(y_SD, back_S, order_S)
    return exchange.back(y_SD[:num_asked])


def _weight(experts: Any, name: str) -> Tensor:
    """[E, I, O]."""
    weight = getattr(experts, name)
    return weight if experts.is_transposed else weight.transpose(1, 2)


def _goes_by_expert(experts: Any) -> bool:
    """Whether what its experts compute is cpu_experts.adapted_gated_mlps, and here the fastest."""
    if not experts.has_gate or experts.has_bias or not _gates_by_silu(experts):
        return False
    if getattr(experts, "has_post_expert_norm", False):
        return False
    weights = experts.gate_up_proj, experts.down_proj
    return not any(weight.is_cuda or weight.requires_grad for weight in weights)


def _gates_by_silu(experts: Any) -> bool:
    """Whether what is made of the halves of a projection is silu(gate) · up, as transformers makes it."""
    own = type(experts)._apply_gate is _default_apply_gate
    return own and isinstance(experts.act_fn, nn.SiLU | SiLUActivation)


def _grouped_linear(x_SI: Tensor, weight_EIO: Tensor, ends_E: Tensor, low_rank: ExpertsLowRank | None) -> Tensor:
    """Each row times its expert's weight, in autocast's dtype where that is on."""
    dtype = computed_in(x_SI)
    x_SI = x_SI.to(dtype)
    if low_rank is not None and not x_SI.is_cuda and not weight_EIO.requires_grad:
        return adapted_product(x_SI, weight_EIO, low_rank, ends_E)
    if weight_EIO.requires_grad:
        y_SO = F.grouped_mm(x_SI, weight_EIO.to(dtype), offs=ends_E)
    else:
        y_SO: Any = _FrozenProduct.apply(x_SI, weight_EIO, ends_E)
    if low_rank is None:
        return y_SO
    a_ERI, b_EOR = low_rank.a_ERI.to(dtype), low_rank.b_EOR.to(dtype)
    if missing := -a_ERI.shape[1] % (_ROW_BYTES // dtype.itemsize):
        a_ERI, b_EOR = F.pad(a_ERI, (0, 0, 0, missing)), F.pad(b_EOR, (0, missing))
    # peft keeps the second matrices with experts last; a product needs each expert's behind one another.
    added_SO: Any = _LowRankProduct.apply(x_SI, a_ERI, b_EOR.contiguous(), ends_E, low_rank.scale)
    return y_SO.add_(added_SO)


class _FrozenProduct(torch.autograd.Function):
    """Each row times its expert's weight, which does not train. No cast of the weights is held for the backward."""

    @staticmethod
    def forward(ctx: Any, x_SI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(weight_EIO, ends_E)
        return F.grouped_mm(x_SI, weight_EIO.to(x_SI.dtype), offs=ends_E)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_SO: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight_EIO, ends_E = ctx.saved_tensors
        weight_EOI = weight_EIO.to(grad_SO.dtype).transpose(1, 2)
        return F.grouped_mm(grad_SO.contiguous(), weight_EOI, offs=ends_E), None, None


class _LowRankProduct(torch.autograd.Function):
    """scale · (x · Aᵀ) · Bᵀ with each row's expert's matrices.

    Thin products of the backward are made as [R, …] where they can: on a CPU that takes a third of the time of […, R].
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x_SI: Tensor, a_ERI: Tensor, b_EOR: Tensor, ends_E: Tensor, scale: float
    ) -> Tensor:
        low_SR = F.grouped_mm(x_SI, a_ERI.transpose(1, 2), offs=ends_E).mul_(scale)
        ctx.save_for_backward(x_SI, low_SR, a_ERI, b_EOR, ends_E)
        ctx.scale = scale
        return F.grouped_mm(low_SR, b_EOR.transpose(1, 2), offs=ends_E)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_SO: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_SI, low_SR, a_ERI, b_EOR, ends_E = ctx.saved_tensors
        grad_SO = grad_SO.contiguous()
        if grad_SO.is_cuda:
            # Its rows must begin at multiples of 16 bytes, and there may be any number of them.
            grad_low_SR = F.grouped_mm(grad_SO, b_EOR, offs=ends_E).mul_(ctx.scale)
        else:
            grad_low_SR = F.grouped_mm(b_EOR.transpose(1, 2), grad_SO.T, offs=ends_E).mul_(ctx.scale).T.contiguous()
        grad_x_SI = F.grouped_mm(grad_low_SR, a_ERI, offs=ends_E) if ctx.needs_input_grad[0] else None
        grad_a_ERI = F.grouped_mm(grad_low_SR.T, x_SI, offs=ends_E)
        grad_b_EOR = F.grouped_mm(low_SR.T, grad_SO, offs=ends_E).transpose(1, 2)
        return grad_x_SI, grad_a_ERI, grad_b_EOR, None, None


class _ToExperts(torch.autograd.Function):
    """A row for every pair of token and expert, ordered by expert."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, order_S: Tensor, back_S: Tensor, num_chosen: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(back_S)
        ctx.num_chosen = num_chosen
        return hidden_TD.index_select(0, order_S // num_chosen)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (back_S,) = ctx.saved_tensors
        if not grad_SD.is_cuda:
            return added_up(grad_SD, back_S.view(-1, ctx.num_chosen)), None, None, None
        grad_TKD = grad_SD.index_select(0, back_S).view(-1, ctx.num_chosen, grad_SD.shape[-1])
        return grad_TKD.sum(1), None, None, None


class _WeightedSum(torch.autograd.Function):
    """Answers of each token's experts, weighted and added up, [T, D]."""

    @staticmethod
    def forward(ctx: Any, y_SD: Tensor, weight_of_TK: Tensor, order_S: Tensor, back_S: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(y_SD, weight_of_TK, order_S, back_S)
        return added_up(y_SD, back_S.view_as(weight_of_TK), weight_of_TK)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        y_SD, weight_of_TK, order_S, back_S = ctx.saved_tensors
        grad_SD = grad_TD.index_select(0, order_S // weight_of_TK.shape[1])
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.linalg.vecdot(y_SD, grad_SD).index_select(0, back_S).view_as(weight_of_TK)
        return grad_SD.mul_(weight_of_TK.reshape(-1).index_select(0, order_S)[:, None]), grad_weight, None, None


class _Permuted(torch.autograd.Function):
    """Rows in another order."""

    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, order_S: Tensor, back_S: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(back_S)
        return x_SD.index_select(0, order_S)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (back_S,) = ctx.saved_tensors
        return grad_SD.index_select(0, back_S), None, None


ALL_EXPERTS_FUNCTIONS.register(GROUPED, grouped_experts)
