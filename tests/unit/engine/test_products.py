"""Products that oneDNN makes are those that torch makes, to rounding."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trainer_service.engine import products
from trainer_service.engine.fused.install import fuse
from trainer_service.engine.fused.linear import FusedLinear, add_in_place
from trainer_service.engine.models.half import HalfLinear

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")

INPUTS, OUTPUTS = 320, 256


@pytest.fixture(autouse=True)
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    # Where oneDNN has something less exact, it is not to be asked.
    monkeypatch.setattr(products, "_by_onednn", products._is_exact)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def close(found: Any, wanted: torch.Tensor) -> bool:
    return bool(((found.double() - wanted).abs().max() <= 1e-5 * wanted.abs().max()).item())


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 100])
def test_products_are_right_forward_and_backward(num_tokens: int) -> None:
    x, weight, bias, grad = (
        drawn(num_tokens, INPUTS),
        drawn(OUTPUTS, INPUTS),
        drawn(OUTPUTS),
        drawn(num_tokens, OUTPUTS),
    )
    assert products.serves(x, weight) is products._is_exact()
    exact_x, exact_weight, exact_grad = x.double(), weight.double(), grad.double()
    assert close(products.linear(x, weight), exact_x @ exact_weight.T)
    assert close(products.linear(x, weight, bias), exact_x @ exact_weight.T + bias.double())
    assert close(products.input_gradient(grad, weight), exact_grad @ exact_weight)
    assert close(products.weight_gradient(grad, x, weight), exact_grad.T @ exact_x)


def test_tensors_that_are_views_of_others_give_the_same() -> None:
    x, weight, grad = drawn(9, 2 * INPUTS)[:, ::2], drawn(OUTPUTS, INPUTS), drawn(OUTPUTS, 9).T
    assert close(products.linear(x, weight), x.double() @ weight.double().T)
    assert close(products.input_gradient(grad, weight), grad.double() @ weight.double())
    assert close(products.weight_gradient(grad, x, weight), grad.double().T @ x.double())
    alike = drawn(OUTPUTS).expand(9, OUTPUTS)
    assert close(products.input_gradient(alike, weight), alike.double() @ weight.double())
    assert close(products.weight_gradient(alike, x, weight), alike.double().T @ x.double())
    assert close(products.product(grad[:4, :9], alike, served=True), grad[:4, :9].double() @ alike.double())
    assert close(products.product(grad[:4, :9], x, served=True), grad[:4, :9].double() @ x.double())


def test_a_rows_numbers_do_not_depend_on_how_many_stand_beside_it() -> None:
    x, weight, grad = drawn(512, INPUTS), drawn(OUTPUTS, INPUTS), drawn(512, OUTPUTS)
    whole, whole_gradient = products.linear(x, weight), products.input_gradient(grad, weight)
    for num_tokens in (16, 48, 100, 333):
        assert torch.equal(products.linear(x[:num_tokens], weight), whole[:num_tokens])
        assert torch.equal(products.input_gradient(grad[:num_tokens], weight), whole_gradient[:num_tokens])


def test_gradients_are_added_in_their_place() -> None:
    x, weight, grad = drawn(20, INPUTS), nn.Parameter(drawn(OUTPUTS, INPUTS)), drawn(20, OUTPUTS)
    products.add_weight_gradient(grad, x, weight)
    assert weight.grad is not None
    once, place = weight.grad.clone(), weight.grad.data_ptr()
    products.add_weight_gradient(2 * grad, x, weight)
    assert weight.grad.data_ptr() == place
    assert close(weight.grad, 3 * once.double())


def test_torchs_settings_are_as_they_were_after_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> torch.Tensor:
        raise MemoryError

    settings = products._settings()
    before = settings.fp32_precision
    x, weight = drawn(2, INPUTS), drawn(OUTPUTS, INPUTS)
    products.linear(x, weight)
    assert settings.fp32_precision == before
    monkeypatch.setattr(products.F, "linear", refuse)
    with pytest.raises(MemoryError):
        products.linear(x, weight)
    assert settings.fp32_precision == before


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_fused_layer_is_the_layer_it_was(bias: bool, frozen: bool) -> None:
    plain = nn.Linear(INPUTS, OUTPUTS, bias=bias).requires_grad_(not frozen)
    fused = copy.deepcopy(plain)
    fuse(fused)
    assert type(fused) is FusedLinear
    exact = copy.deepcopy(plain).double()
    x, grad = drawn(1, 30, INPUTS).requires_grad_(), drawn(1, 30, OUTPUTS)
    exact_x = x.detach().double().requires_grad_()
    output, wanted = fused(x), exact(exact_x)
    output.backward(grad)
    wanted.backward(grad.double())
    assert close(output, wanted)
    assert x.grad is not None
    assert exact_x.grad is not None
    assert close(x.grad, exact_x.grad)
    for found, right in zip(fused.parameters(), exact.parameters(), strict=True):
        assert (found.grad is None) is frozen
        if right.grad is not None:
            assert close(found.grad, right.grad)


@pytest.mark.parametrize("faster", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["fused", "adding", "half"])
def test_a_model_may_change_in_place_what_a_layer_returns(
    monkeypatch: pytest.MonkeyPatch, kind: str, bias: bool, faster: bool
) -> None:
    """As Falcon's layers do; autograd refuses that of a view."""
    monkeypatch.setattr(products, "_by_onednn", lambda: faster and products._is_exact())
    model = nn.Sequential(nn.Linear(INPUTS, OUTPUTS, bias=bias))
    layer: Any = model[0]
    if kind == "half":
        layer.bfloat16().requires_grad_(False).__class__ = HalfLinear
    else:
        fuse(model)
        if kind == "adding":
            add_in_place(model)
    for shape in ((1, 30, INPUTS), (2, 3, 5, INPUTS), (INPUTS,)):
        x, beside = drawn(*shape).requires_grad_(), drawn(OUTPUTS)
        output = layer(x)
        wanted = x.detach().double() @ layer.weight.detach().double().T + beside.double()
        wanted += layer.bias.detach().double() if bias else 0.0
        output += beside
        assert close(output, wanted)
        output.sum().backward()
        assert x.grad is not None


def test_what_is_not_float32_or_small_or_empty_is_left_to_torch() -> None:
    x, weight = drawn(4, INPUTS), drawn(OUTPUTS, INPUTS)
    assert not products.serves(x.bfloat16(), weight.bfloat16())
    assert not products.serves(x[:0], weight)
    assert not products.serves(drawn(4, 8), drawn(8, 8))
    # A parameter that takes no memory.
    assert not products.serves(x, torch.zeros(()).expand(OUTPUTS, INPUTS))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not products.serves(x, weight)
        layer = nn.Linear(INPUTS, OUTPUTS)
        wanted = layer(x)
        fuse(layer)
        assert torch.equal(layer(x), wanted)
        assert wanted.dtype == torch.bfloat16


def test_an_empty_batch_has_gradients_of_zero() -> None:
    weight = drawn(OUTPUTS, INPUTS)
    assert torch.equal(
        products.weight_gradient(drawn(0, OUTPUTS), drawn(0, INPUTS), weight), torch.zeros(OUTPUTS, INPUTS)
    )


@pytest.mark.parametrize("faster", [False, True])
def test_a_whole_models_layer_adds_its_weights_gradient_where_it_is(
    monkeypatch: pytest.MonkeyPatch, faster: bool
) -> None:
    monkeypatch.setattr(products, "_by_onednn", lambda: faster and products._is_exact())
    plain = nn.Linear(INPUTS, OUTPUTS)
    layer = copy.deepcopy(plain)
    model = nn.Sequential(layer)
    fuse(model)
    add_in_place(model)
    inputs = [drawn(1, 30, INPUTS), drawn(1, 12, INPUTS)]
    for x in inputs:
        layer(x).square().sum().backward()
    assert layer.weight.grad is not None
    place = layer.weight.grad.data_ptr()
    layer(inputs[0]).square().sum().backward()
    assert layer.weight.grad.data_ptr() == place
    exact = plain.double()
    for x in (*inputs, inputs[0]):
        exact(x.double()).square().sum().backward()
    for found, right in zip(layer.parameters(), exact.parameters(), strict=True):
        assert right.grad is not None
        assert close(found.grad, right.grad)
    layer.requires_grad_(False)
    assert not layer(inputs[0]).requires_grad
    assert layer(inputs[0].requires_grad_()).requires_grad


def test_gradients_of_a_layer_that_is_computed_again_are_added_once() -> None:
    layers = [nn.Linear(INPUTS, OUTPUTS, bias=False), nn.Linear(INPUTS, OUTPUTS, bias=False)]
    layers[1].load_state_dict(layers[0].state_dict())
    for layer in layers:
        fuse(layer)
        add_in_place(layer)
    x = drawn(1, 30, INPUTS).requires_grad_()
    found: Any = checkpoint(layers[0], x, use_reentrant=False)
    found.square().sum().backward()
    layers[1](x).square().sum().backward()
    assert layers[0].weight.grad is not None
    assert layers[1].weight.grad is not None
    assert torch.equal(layers[0].weight.grad, layers[1].weight.grad)
