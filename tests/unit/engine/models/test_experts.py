"""Experts as grouped products equal transformers' loop over them, in every layout, and in the dtype of other layers."""

from typing import Any

import pytest
import torch
from transformers import GptOssConfig, MixtralConfig, NemotronHConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from tests.numerics.plain import relative_error
from trainer_service.engine.models.cpu_experts import ExpertsLowRank
from trainer_service.engine.models.experts import GROUPED, grouped_experts

_SIZE: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24}
EXPERTS = {
    "gated": lambda: MixtralExperts(MixtralConfig(**_SIZE, num_local_experts=4)),
    "transposed, biases": lambda: GptOssExperts(GptOssConfig(**_SIZE, num_local_experts=4)),
    "no gate": lambda: NemotronHExperts(NemotronHConfig(hidden_size=16, n_routed_experts=4, moe_intermediate_size=24)),
}


def made(kind: str) -> Any:
    """Experts with random weights: their own are whatever memory held."""
    experts = EXPERTS[kind]()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return experts


def run(experts: Any, implementation: str, *, compute_dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Output and gradients for a few tokens, of which none goes to the last expert."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(7, 16, generator=generator).requires_grad_()
    weights = torch.rand(7, 2, generator=generator).requires_grad_()
    chosen = torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2], [0, 1], [1, 0], [2, 1]])
    experts.config._experts_implementation = implementation
    experts.zero_grad()
    with torch.autocast("cpu", compute_dtype, enabled=compute_dtype is not None):
        output = experts(hidden, chosen, weights)
    output.backward(torch.randn(output.shape, generator=generator))
    found = {"output": output.detach(), "hidden": hidden.grad, "weights": weights.grad}
    return found | {name: p.grad.clone() for name, p in experts.named_parameters() if p.requires_grad}


@pytest.fixture(params=EXPERTS)
def experts(request: pytest.FixtureRequest) -> Any:
    return made(request.param)


@pytest.mark.parametrize("trains", [True, False])
def test_outputs_and_gradients_equal_the_loop(experts: Any, trains: bool) -> None:
    experts.requires_grad_(trains)
    wanted = run(experts, "eager")
    for name, found in run(experts, GROUPED).items():
        assert relative_error(found, wanted[name]) < 1e-6, name


def test_products_are_in_the_dtype_that_autocast_asks_for(experts: Any) -> None:
    """As those of linear layers in the loop are: nearer to them than either is to float32."""
    exact, wanted = run(experts, "eager"), run(experts, "eager", compute_dtype=torch.bfloat16)
    found = run(experts, GROUPED, compute_dtype=torch.bfloat16)
    for name in ("output", "hidden"):
        assert found[name].dtype == torch.float32
        assert 1e-3 < relative_error(found[name], exact[name]) < 2e-2, name
        assert relative_error(found[name], wanted[name]) < 2e-2, name


def test_what_does_not_train_is_held_for_the_backward_as_it_is(experts: Any) -> None:
    """A cast of all experts' weights a layer would take as much memory as the model."""
    experts.requires_grad_(False)
    held: list[torch.dtype] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        held.extend([tensor.dtype] if tensor.ndim == 3 and tensor.shape[0] == 4 else [])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run(experts, GROUPED, compute_dtype=torch.bfloat16)
    assert held == [torch.float32, torch.float32]


@pytest.mark.parametrize("adapted", [("gate_up_proj", "down_proj"), ("gate_up_proj",), ("down_proj",)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_what_adapters_add_and_every_gradient_equal_experts_that_hold_it(
    adapted: tuple[str, ...], dtype: torch.dtype, tolerance: float
) -> None:
    experts = made("gated")
    experts.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(shape, generator=generator)).requires_grad_()

    hidden, weights, sizes = drawn(9, 16), drawn(9, 2), {"gate_up_proj": (48, 16), "down_proj": (16, 24)}
    low_rank = {
        name: ExpertsLowRank(drawn(4, 3, sizes[name][1], scale=0.3), drawn(4, sizes[name][0], 3, scale=0.3), 2.0)
        for name in adapted
    }
    chosen = torch.tensor([[0, 1], [3, 2], [0, 2], [2, 3], [1, 0], [0, 3], [1, 3], [2, 1], [3, 0]])
    towards = torch.randn(9, 16, generator=generator)
    inputs = [hidden, weights, *(part for one in low_rank.values() for part in (one.a_ERI, one.b_EOR))]

    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        found = grouped_experts(experts, hidden, chosen, weights, low_rank=low_rank)
    assert found.dtype == torch.float32
    gradients = torch.autograd.grad(found, inputs, towards)

    whole = {name: getattr(experts, name) for name in sizes}
    whole |= {name: whole[name] + one.scale * one.b_EOR @ one.a_ERI for name, one in low_rank.items()}
    gate_and_up = torch.einsum("td,tkod->tko", hidden, whole["gate_up_proj"][chosen])
    gate, up = gate_and_up.chunk(2, dim=-1)
    answers = torch.einsum("tkh,tkdh->tkd", torch.nn.functional.silu(gate) * up, whole["down_proj"][chosen])
    wanted = (answers * weights[..., None]).sum(1)
    assert relative_error(found, wanted) < tolerance
    for gradient, right in zip(gradients, torch.autograd.grad(wanted, inputs, towards), strict=True):
        assert relative_error(gradient, right) < tolerance


def test_an_adapter_of_an_expert_that_no_token_goes_to_has_a_gradient_of_zero() -> None:
    experts = made("gated")
    experts.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    a_ERI = torch.randn(4, 3, 16, generator=generator).requires_grad_()
    b_EOR = torch.randn(4, 48, 3, generator=generator).requires_grad_()
    low_rank = {"gate_up_proj": ExpertsLowRank(a_ERI, b_EOR, 2.0)}
    hidden, weights = torch.randn(5, 16, generator=generator), torch.rand(5, 2, generator=generator)
    chosen = torch.tensor([[0, 3], [3, 0], [0, 3], [0, 3], [3, 0]])
    # Memory that is not zero by itself.
    torch.full((4, 48, 16), torch.nan)
    grouped_experts(experts, hidden, chosen, weights, low_rank=low_rank).square().sum().backward()
    for parameter in (a_ERI, b_EOR):
        assert parameter.grad is not None
        assert parameter.grad[1:3].count_nonzero() == 0
        assert all(parameter.grad[expert].count_nonzero() > 0 for expert in (0, 3))
