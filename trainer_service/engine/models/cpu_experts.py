"""Routed experts that are frozen but for an adapter, on the CPU: expert by expert, so that what is made of an expert's
rows is at hand when the next thing is made of it.

A CPU's grouped products go expert by expert as well. Thin products are made as [R, …], which takes a third of the time
of […, R].

Shape suffixes: T tokens, K experts a token, S = T·K rows, those of one expert behind one another, n rows of one expert,
E experts, I and O inputs and outputs of an expert's layer, D hidden size, H inner size, R the LoRA rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer_service.engine.models.expert_threads import side_by_side


@dataclass(frozen=True)
class ExpertsLowRank:
    """What an adapter adds to the weights of all experts: scale · B · A of each.

    Attributes:
        a_ERI: First matrices.
        b_EOR: Second matrices.
        scale: Of the product.
    """

    a_ERI: Tensor
    b_EOR: Tensor
    scale: float


@dataclass(frozen=True)
class Routes:
    """Pairs of a token and one of its experts, those of one expert behind one another.

    Attributes:
        token_S: The tokens.
        weight_S: What the answers are weighted by.
        ends_E: One past each expert's last pair.
        rows_TK: Where the pairs of each token are.
    """

    token_S: Tensor
    weight_S: Tensor
    ends_E: Tensor
    rows_TK: Tensor


def adapted_product(x_SI: Tensor, weight_EIO: Tensor, low_rank: ExpertsLowRank, ends_E: Tensor) -> Tensor:
    """Each row times its expert's weight, with what the adapter adds, [S, O] in the dtype of x."""
    found: Any = _Product.apply(x_SI, ends_E, weight_EIO, *_adapter(low_rank, x_SI.dtype))
    return found


def adapted_gated_mlps(
    hidden_TD: Tensor,
    routes: Routes,
    gate_up: tuple[Tensor, ExpertsLowRank | None],
    down: tuple[Tensor, ExpertsLowRank | None],
) -> Tensor:
    """What each token's experts answer, down(silu(gate) · up), weighted and added up, [T, D] in float32.

    Args:
        hidden_TD: The input, in the dtype of products.
        routes: Who goes where.
        gate_up: Weights [E, D, 2 H] of gate and up side by side, and what is added to them.
        down: Weights [E, H, D] of down, and what is added to them.
    """
    first, second = ((weight, *_adapter(low_rank, hidden_TD.dtype)) for weight, low_rank in (gate_up, down))
    found: Any = _GatedMlps.apply(hidden_TD, routes.weight_S, routes, *first, *second)
    return found


def _adapter(low_rank: ExpertsLowRank | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None, float]:
    if low_rank is None:
        return None, None, 0.0
    # peft keeps the second matrices with experts last; a product needs each expert's behind one another.
    return low_rank.a_ERI.to(dtype), low_rank.b_EOR.to(dtype).contiguous(), low_rank.scale


class _Linear:
    """All experts' weights of one kind, frozen, with an adapter or none."""

    def __init__(self, weight_EIO: Tensor, a_ERI: Tensor | None, b_EOR: Tensor | None, scale: float) -> None:
        self.weight_EIO, self.a_ERI, self.b_EOR, self.scale = weight_EIO, a_ERI, b_EOR, scale
        self._scaled_a_ERI = None if a_ERI is None else a_ERI * scale

    def new_low(self, x_SI: Tensor) -> Tensor | None:
        """Room for scale · A · xᵀ of all rows, [R, S]."""
        return None if self.a_ERI is None else x_SI.new_empty(self.a_ERI.shape[1], len(x_SI))

    def forward(self, expert: int, x_nI: Tensor, y_nO: Tensor, low_Rn: Tensor | None) -> None:
        """Fills y and low."""
        torch.mm(x_nI, self.weight_EIO[expert].to(x_nI.dtype), out=y_nO)
        if self._scaled_a_ERI is not None and self.b_EOR is not None and low_Rn is not None:
            torch.mm(self._scaled_a_ERI[expert], x_nI.T, out=low_Rn)
            y_nO.addmm_(low_Rn.T, self.b_EOR[expert].T)


class _Gradients:
    """What a backward finds for all experts' weights of one kind.

    Attributes:
        a_ERI: Of the adapter's first matrices, zero where an expert has no rows; None without an adapter.
    """

    def __init__(self, linear: _Linear) -> None:
        self._linear = linear
        self.a_ERI = None if linear.a_ERI is None else torch.zeros_like(linear.a_ERI)
        if linear.b_EOR is not None:
            self._scaled_b_EOR = linear.b_EOR * linear.scale
            self._b_ERO = torch.zeros_like(linear.b_EOR.transpose(1, 2), memory_format=torch.contiguous_format)

    @property
    def b_EOR(self) -> Tensor | None:
        """Of its second matrices."""
        return None if self._linear.b_EOR is None else self._b_ERO.transpose(1, 2)

    def backward(
        self, expert: int, grad_nO: Tensor, x_nI: Tensor, low_Rn: Tensor | None, grad_x_nI: Tensor | None
    ) -> None:
        """Takes an expert's gradients, and fills that of x unless it is None."""
        linear = self._linear
        if grad_x_nI is not None:
            torch.mm(grad_nO, linear.weight_EIO[expert].to(grad_nO.dtype).T, out=grad_x_nI)
        if linear.a_ERI is None or self.a_ERI is None or low_Rn is None:
            return
        grad_low_Rn = torch.mm(self._scaled_b_EOR[expert].T, grad_nO.T)
        if grad_x_nI is not None:
            grad_x_nI.addmm_(grad_low_Rn.T, linear.a_ERI[expert])
        torch.mm(grad_low_Rn, x_nI, out=self.a_ERI[expert])
        torch.mm(low_Rn, grad_nO, out=self._b_ERO[expert])


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x_SI: Tensor, ends_E: Tensor, weight_EIO: Tensor, a_ERI: Tensor, b_EOR: Tensor, scale: float
    ) -> Tensor:
        linear = _Linear(weight_EIO, a_ERI, b_EOR, scale)
        y_SO, low_RS = x_SI.new_empty(len(x_SI), weight_EIO.shape[2]), linear.new_low(x_SI)

        def compute(expert: int, rows: slice) -> None:
            linear.forward(expert, x_SI[rows], y_SO[rows], _columns(low_RS, rows))

        side_by_side(_rows_of(ends_E), compute)
        ctx.save_for_backward(x_SI, ends_E, low_RS, weight_EIO, a_ERI, b_EOR)
        ctx.scale = scale
        return y_SO

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_SO: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_SI, ends_E, low_RS, weight_EIO, a_ERI, b_EOR = ctx.saved_tensors
        gradients = _Gradients(_Linear(weight_EIO, a_ERI, b_EOR, ctx.scale))
        grad_x_SI = torch.empty_like(x_SI) if ctx.needs_input_grad[0] else None

        def compute(expert: int, rows: slice) -> None:
            grad_x_nI = None if grad_x_SI is None else grad_x_SI[rows]
            gradients.backward(expert, grad_SO[rows], x_SI[rows], _columns(low_RS, rows), grad_x_nI)

        side_by_side(_rows_of(ends_E), compute)
        return grad_x_SI, None, None, gradients.a_ERI, gradients.b_EOR, None


class _GatedMlps(torch.autograd.Function):
    """Of what it makes only gate and up are held: silu(gate) · up is made again.

    With p a pair's silu(gate) · up, w its weight, g the gradient of the sum: the sum is Σ (w · p) · Wᵀ, so
    dp = w · (g · W) and dw = p · (g · W), which needs no answer either.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, hidden_TD: Tensor, weight_S: Tensor, routes: Routes, *parts: Any
    ) -> Tensor:
        gate_up, down = _Linear(*parts[:4]), _Linear(*parts[4:])
        token_S, ends_E, rows_TK = routes.token_S, routes.ends_E, routes.rows_TK
        both_SO = hidden_TD.new_empty(len(token_S), gate_up.weight_EIO.shape[2])
        gate_up_low_RS, down_low_RS = gate_up.new_low(both_SO), down.new_low(both_SO)
        y_SD = hidden_TD.new_empty(len(token_S), hidden_TD.shape[1])

        def compute(expert: int, rows: slice) -> None:
            x_nD, both_nO = hidden_TD.index_select(0, token_S[rows]), both_SO[rows]
            gate_up.forward(expert, x_nD, both_nO, _columns(gate_up_low_RS, rows))
            gate_nH, up_nH = both_nO.chunk(2, dim=1)
            weighted_nH = F.silu(gate_nH).mul_(up_nH).mul_(weight_S[rows, None])
            down.forward(expert, weighted_nH, y_SD[rows], _columns(down_low_RS, rows))

        side_by_side(_rows_of(ends_E), compute)
        indices = token_S, ends_E, rows_TK
        matrices = (part for part in parts if not isinstance(part, float))
        ctx.save_for_backward(hidden_TD, weight_S, *indices, both_SO, gate_up_low_RS, down_low_RS, *matrices)
        ctx.scales = gate_up.scale, down.scale
        return added_up(y_SD.float(), rows_TK)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_TD, weight_S, token_S, ends_E, rows_TK, both_SO, *rest = ctx.saved_tensors
        gate_up_low_RS, down_low_RS, *matrices = rest
        gate_up, down = (
            _Gradients(_Linear(weight_EIO, a_ERI, b_EOR, scale))
            for (weight_EIO, a_ERI, b_EOR), scale in zip((matrices[:3], matrices[3:]), ctx.scales, strict=True)
        )
        grad_x_SD = hidden_TD.new_empty(len(token_S), hidden_TD.shape[1]) if ctx.needs_input_grad[0] else None
        grad_weight_S = torch.empty_like(weight_S)
        grad_TD = grad_TD.to(hidden_TD.dtype)

        def compute(expert: int, rows: slice) -> None:
            token_n, weight_n = token_S[rows], weight_S[rows, None]
            x_nD, grad_nD = (each.index_select(0, token_n) for each in (hidden_TD, grad_TD))
            gate_nH, up_nH = both_SO[rows].chunk(2, dim=1)
            passed_nH = F.silu(gate_nH)
            product_nH, grad_product_nH = passed_nH * up_nH, torch.empty_like(passed_nH)
            weighted_nH = (product_nH * weight_n).to(product_nH.dtype)
            down.backward(expert, grad_nD, weighted_nH, _columns(down_low_RS, rows), grad_product_nH)
            grad_weight_S[rows] = torch.linalg.vecdot(product_nH.float(), grad_product_nH.float()).to(weight_S.dtype)
            grad_product_nH.mul_(weight_n)
            grad_both_nO = both_SO.new_empty(len(token_n), both_SO.shape[1])
            grad_gate_nH, grad_up_nH = grad_both_nO.chunk(2, dim=1)
            torch.mul(passed_nH, grad_product_nH, out=grad_up_nH)
            grad_product_nH.mul_(up_nH)
            torch.ops.aten.silu_backward.grad_input(grad_product_nH, gate_nH, grad_input=grad_gate_nH)
            grad_x_nD = None if grad_x_SD is None else grad_x_SD[rows]
            gate_up.backward(expert, grad_both_nO, x_nD, _columns(gate_up_low_RS, rows), grad_x_nD)

        side_by_side(_rows_of(ends_E), compute)
        grad_hidden_TD = None if grad_x_SD is None else added_up(grad_x_SD.float(), rows_TK).to(hidden_TD.dtype)
        adapters = gate_up.a_ERI, gate_up.b_EOR, None, None, down.a_ERI, down.b_EOR, None
        return grad_hidden_TD, grad_weight_S, None, None, *adapters


def _rows_of(ends_E: Tensor) -> Iterator[tuple[int, slice]]:
    """Experts that have rows, by number, with them."""
    bounds = [0, *ends_E.tolist()]
    return ((expert, slice(*both)) for expert, both in enumerate(pairwise(bounds)) if both[0] < both[1])


def _columns(low_RS: Tensor | None, rows: slice) -> Tensor | None:
    return None if low_RS is None else low_RS[:, rows]


def added_up(x_SD: Tensor, rows_TK: Tensor, weight_of_TK: Tensor | None = None) -> Tensor:
    """Rows of each token, weighted if so, added up in their order, [T, D] in the dtype of x."""
    return F.embedding_bag(rows_TK, x_SD, mode="sum", per_sample_weights=weight_of_TK)
