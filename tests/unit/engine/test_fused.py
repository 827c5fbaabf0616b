"""Fused functions compute what the modules they stand in for do, forward and backward, and stand in for no other."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Config, LlamaConfig
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.llama import modeling_llama

from trainer_service.engine.fused.install import fuse
from trainer_service.engine.fused.module import Fused

LLAMA = LlamaConfig(hidden_size=24, intermediate_size=40, num_attention_heads=2)
GEMMA = Gemma2Config(hidden_size=24, intermediate_size=40, hidden_activation="gelu_pytorch_tanh")
MODULES: dict[str, Callable[[], nn.Module]] = {
    "Llama norm": lambda: modeling_llama.LlamaRMSNorm(24, eps=1e-5),
    "Gemma norm, 1 + weight": lambda: modeling_gemma2.Gemma2RMSNorm(24),
    "Llama MLP, silu": lambda: modeling_llama.LlamaMLP(LLAMA),
    "Gemma MLP, gelu": lambda: modeling_gemma2.Gemma2MLP(GEMMA),
}


def fused_rotation() -> Callable[..., Any]:
    """What Llama's attention rotates with once it is fused."""
    attention = modeling_llama.LlamaAttention(LLAMA, 0)
    fuse(attention)
    assert isinstance(attention, Fused)
    forward: Any = type(attention).forward
    return forward.__globals__["apply_rotary_pos_emb"]


def gradients(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What a module makes of x, and the gradients of a loss in which every element counts differently."""
    leaf = x.clone().requires_grad_(True)
    found = module(leaf)
    (found * torch.linspace(-1, 1, found.numel(), dtype=x.dtype).view(found.shape)).sum().backward()
    assert leaf.grad is not None
    named = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    return {"output": found.detach(), "input": leaf.grad, **named}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())
def test_a_fused_module_is_as_near_to_float64_as_the_plain_one(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    plain = make()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_()
    fused = copy.deepcopy(plain)
    before = copy.deepcopy(fused.state_dict())
    fuse(fused)
    assert isinstance(fused, Fused)
    assert isinstance(fused, type(plain))
    assert all(torch.equal(value, before[name]) for name, value in fused.state_dict().items())
    x = torch.randn(1, 7, 24)
    exact = gradients(copy.deepcopy(plain).double(), x.double())
    wanted, found = gradients(plain, x), gradients(fused, x)
    assert found.keys() == wanted.keys()
    for name, value in exact.items():
        error = (wanted[name] - value).abs().max() + 2**-22 * value.abs().max()
        assert (found[name] - value).abs().max() <= 4 * error, name


def test_modules_that_hold_no_numbers_yet_are_fused_too_and_no_random_number_is_drawn() -> None:
    with torch.device("meta"):
        modules = [make() for make in MODULES.values()]
    before = torch.get_rng_state()
    for module in modules:
        fuse(module)
        assert isinstance(module, Fused)
    assert torch.equal(torch.get_rng_state(), before)


def test_fusing_twice_and_copying_change_nothing() -> None:
    norm = modeling_llama.LlamaRMSNorm(24)
    fuse(norm)
    once = type(norm)
    fuse(norm)
    assert type(norm) is type(copy.deepcopy(norm)) is once


def test_a_frozen_weight_gets_no_gradient() -> None:
    norm = modeling_llama.LlamaRMSNorm(24)
    fuse(norm)
    norm.weight.requires_grad_(False)
    assert gradients(norm, torch.randn(1, 3, 24)).keys() == {"output", "input"}


class OffByABit(modeling_llama.LlamaRMSNorm):
    """Looks like an RMSNorm, and is none."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) * 1.001


class EpsOutside(modeling_llama.LlamaRMSNorm):
    """Differs only where inputs are small."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.weight * hidden_states / (hidden_states.square().mean(-1, keepdim=True).sqrt() + 1e-3)


class GatedNorm(modeling_llama.LlamaRMSNorm):
    """An RMSNorm only as long as it is called with one argument."""

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        normed = super().forward(hidden_states)
        return normed if gate is None else normed * gate


class OtherActivation(modeling_llama.LlamaMLP):
    """A gated MLP whose activation is not one of those that are fused."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gate_proj(x).relu() * self.up_proj(x))


@pytest.mark.parametrize(
    "module",
    [OffByABit(24), EpsOutside(24), GatedNorm(24), OtherActivation(LLAMA), nn.LayerNorm(24)],
    ids=lambda module: type(module).__name__,
)
def test_what_computes_something_else_stays_as_it_is(module: nn.Module) -> None:
    before = type(module)
    fuse(module)
    assert type(module) is before


def test_half_precision_goes_to_the_plain_norm() -> None:
    norm = modeling_llama.LlamaRMSNorm(24)
    plain = copy.deepcopy(norm)
    fuse(norm)
    x = torch.randn(1, 3, 24, dtype=torch.bfloat16)
    assert torch.equal(norm(x), plain(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rotation_is_the_architectures_own_forward_and_backward(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Positions are in float32, as under autocast; the architecture's own is then not asked."""
    made = []
    fused = fused_rotation()
    for rotate in (modeling_llama.apply_rotary_pos_emb, fused):
        monkeypatch.setattr(fused, "_plain", pytest.fail)
        torch.manual_seed(0)
        q, k = (torch.randn(1, 6, heads, 8).transpose(1, 2).to(dtype).requires_grad_(True) for heads in (4, 2))
        cos, sin = torch.randn(1, 6, 8), torch.randn(1, 6, 8)
        rotated = rotate(q, k, cos, sin)
        torch.stack([(x * torch.randn(x.shape)).sum() for x in rotated]).sum().backward()
        made.append([*rotated, q.grad, k.grad])
    for wanted, found in zip(*made, strict=True):
        # The architecture's own rounds a gradient of bfloat16 three times, ours once.
        rounding = 1e-6 if wanted.dtype == torch.float32 else 2**-6
        torch.testing.assert_close(found, wanted, rtol=rounding, atol=rounding)


def test_other_models_of_the_architecture_rotate_as_they_did() -> None:
    before = modeling_llama.apply_rotary_pos_emb
    assert fused_rotation() is not before
    forward: Any = modeling_llama.LlamaAttention.forward
    assert forward.__globals__["apply_rotary_pos_emb"] is modeling_llama.apply_rotary_pos_emb is before


def test_what_the_rotation_was_not_tried_on_goes_to_the_architectures_own() -> None:
    q, k = torch.randn(1, 6, 4, 8), torch.randn(1, 6, 2, 8)
    cos, sin = torch.randn(1, 6, 8), torch.randn(1, 6, 8)
    plain = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, 2)
    for given, wanted in zip(fused_rotation()(q, k, cos, sin, 2), plain, strict=True):
        assert torch.equal(given, wanted)


def test_another_rotation_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Turns neighbours in place of halves, as Cohere does."""
        turned = [torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2) for x in (q, k)]
        return q * cos[:, None] + turned[0] * sin[:, None], k * cos[:, None] + turned[1] * sin[:, None]

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", interleaved)
    attention = modeling_llama.LlamaAttention(LLAMA, 0)
    fuse(attention)
    assert type(attention) is modeling_llama.LlamaAttention
