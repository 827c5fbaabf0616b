"""The engine's mathematics piece by piece, against closed forms and torch's own."""

import numpy as np
import pytest
import torch
from gradwire.types import AdamParams

from tests.numerics.plain import ROUNDING, relative_error
from trainer_service.engine.losses import find_loss
from trainer_service.engine.losses.loss import LossInputs
from trainer_service.engine.models.embedding import add_rows_in_place
from trainer_service.engine.optim import AdamW
from trainer_service.engine.packed import attention as attention_module
from trainer_service.engine.packed import logprobs as logprobs_module
from trainer_service.engine.packed.attention import PackAttention, pack_in_use, packed_attention
from trainer_service.engine.packed.logprobs import target_logprobs
from trainer_service.engine.packed.packing import Piece
from trainer_service.engine.row_sums import logsumexp, row_sums
from trainer_service.engine.sampling.attention import Part, Tokens, cached_attention, tokens_in_use
from trainer_service.engine.sampling.cache import Block, CacheShape
from trainer_service.engine.sampling.slots import Slots

FEW = 16 * ROUNDING
"""Relative error of a few operations in float32 one behind the other; sums here have few terms."""


@pytest.mark.parametrize("chunk_elements", [1, 150, 1 << 24])
@pytest.mark.parametrize("k", [None, 1, 4])
def test_target_logprobs_and_their_gradient_equal_log_softmax(
    monkeypatch: pytest.MonkeyPatch, k: int | None, chunk_elements: int
) -> None:
    monkeypatch.setattr(logprobs_module, "_CHUNK_ELEMENTS", chunk_elements)
    torch.manual_seed(0)
    logits = (5 * torch.randn(7, 50)).requires_grad_()
    targets = torch.randint(50, (7,) if k is None else (7, k))
    upstream = torch.randn(targets.shape)
    found = target_logprobs(logits, targets)
    (gradient,) = torch.autograd.grad(found, logits, upstream)

    exact = logits.detach().double().requires_grad_()
    columns = targets if k else targets[:, None]
    wanted = torch.log_softmax(exact, -1).gather(-1, columns).view(targets.shape)
    (wanted_gradient,) = torch.autograd.grad(wanted, exact, upstream.double())
    assert found.dtype == torch.float32
    assert relative_error(found.detach(), wanted.detach()) < FEW
    assert relative_error(gradient, wanted_gradient) < FEW


def test_repeated_soft_targets_add_up() -> None:
    logits = torch.randn(1, 5, requires_grad=True)
    found = target_logprobs(logits, torch.tensor([[2, 2]]))
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    wanted = -2 * torch.softmax(logits.detach(), -1)
    wanted[0, 2] += 2
    torch.testing.assert_close(gradient, wanted)


def test_bfloat16_logits_are_normalised_in_float32() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 20_000, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(20_000, (4,))
    found = target_logprobs(logits, targets)
    wanted = torch.log_softmax(logits.detach().double(), -1).gather(-1, targets[:, None])[:, 0]
    # 2,048 equal terms already add nothing any more in bfloat16.
    assert relative_error(found.detach(), wanted) < FEW
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert gradient.dtype == torch.bfloat16


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softcap", [None, 50.0])
@pytest.mark.parametrize("before", [0, 8])
def test_what_fills_vectors_up_changes_nothing(before: int, softcap: float | None, window: int | None) -> None:
    torch.manual_seed(0)
    length = 21
    query = torch.randn(2, 4, length, 16, requires_grad=True)
    key, value = (torch.randn(2, 2, before + length, 16, requires_grad=True) for _ in range(2))
    mask = attention_module._mask(length, before, window, query) if before or window else None
    found = attention_module._attend(query, key, value, mask=mask, scaling=None, softcap=softcap, s_aux=None)
    keys, values = (each.repeat_interleave(2, 1) for each in (key, value))
    scores = query @ keys.mT / 4
    scores = torch.tanh(scores / softcap) * softcap if softcap else scores
    distance = torch.arange(before + length)[before:, None] - torch.arange(before + length)
    seen = (distance >= 0) & (distance < (window or 100))
    wanted = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ values
    upstream = torch.randn_like(found)
    gradients, wanted_gradients = (torch.autograd.grad(each, (query, key, value), upstream) for each in (found, wanted))
    for ours, plain in ((found, wanted), *zip(gradients, wanted_gradients, strict=True)):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("length", "window"), [(60, None), (65, 40), (97, 40)])
def test_attention_on_a_cpu_is_in_float32_and_the_same_where_samples_are_made(length: int, window: int | None) -> None:
    torch.manual_seed(0)
    prompt = 41
    query, key, value = (torch.randn(1, heads, length, 16).bfloat16().requires_grad_() for heads in (4, 2, 2))
    pack = PackAttention((Piece(0, 1, length),))
    with torch.autocast("cpu", torch.bfloat16), pack_in_use(pack):
        trained, _ = packed_attention(torch.nn.Module(), query, key, value, None, sliding_window=window)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query.detach().float(),
        key.detach().float(),
        value.detach().float(),
        attn_mask=(distance >= 0) & (distance < (window or length)),
        enable_gqa=True,
    )
    assert trained.dtype == torch.bfloat16
    # Both are rounded to bfloat16; float32 sums in another order may fall on the other side of a half.
    assert trained.isclose(wanted.transpose(1, 2).bfloat16(), rtol=2**-7).all()
    (gradient,) = torch.autograd.grad(trained.float().square().sum(), query)
    assert gradient.dtype == torch.bfloat16

    shape = CacheShape(1, 2, 16, 16, torch.float32, torch.device("cpu"))
    cache, slots, sampled = Block(shape, 1, prompt), Slots(shape), []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        states = (query, key, value)
        tokens = Tokens([Part.of(cache, prompt)], [], 0)
        with tokens_in_use(tokens):
            sampled.append(
                cached_attention(torch.nn.Module(), *_at(slice(prompt), states), None, sliding_window=window)[0]
            )
        slot = slots.add(cache)
        for place in range(prompt, length):
            slots.reserve(slot)
            tokens = Tokens([], slots.groups(), 0)
            with tokens_in_use(tokens):
                new = _at(slice(place, place + 1), states)
                sampled.append(cached_attention(torch.nn.Module(), *new, None, sliding_window=window)[0])
    found = torch.cat(sampled, dim=1)
    assert found.dtype == torch.bfloat16
    # With attention in bfloat16 where samples are made, a third of them differ.
    assert (found != trained).float().mean() < 0.002


def _at(places: slice, states: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query, key, value = (each[:, :, places] for each in states)
    return query, key, value


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_rows_sum_does_not_depend_on_whether_it_is_alone(num_threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        logits = torch.randn(64, 1 << 16, generator=torch.Generator().manual_seed(0))
        rows = [logits[row : row + 1] for row in range(64)]
        assert torch.equal(torch.cat([row_sums(row) for row in rows]), row_sums(logits))
        assert torch.equal(torch.cat([logsumexp(row) for row in rows]), logsumexp(logits))
        assert torch.equal(logsumexp(logits), torch.logsumexp(logits, -1))
    finally:
        torch.set_num_threads(before)


def test_cross_entropy_is_a_sum_over_tokens_never_a_mean() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    weights = torch.tensor([1.0, 0.0, -0.5])
    output = find_loss("cross_entropy").fn(LossInputs(logprobs, {"weights": weights}, torch.tensor([0, 3])), {})
    output.loss.backward()
    assert output.loss.item() == 1.0 - 1.5
    assert output.num_loss_tokens.item() == 2
    np.testing.assert_array_equal(logprobs.grad, -weights)


def make_parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((30, 7), (13,), (5, 4, 3))]


def set_gradients(parameters: list[torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("clip", [0.0, 0.3, 1e6])
@pytest.mark.parametrize("divisor", [1.0, 17.0])
def test_adamw_equals_torch_given_the_same_gradients(clip: float, divisor: float) -> None:
    ours, plain = make_parameters(), make_parameters()
    start = [parameter.detach().clone() for parameter in plain]
    optimizer, reference = AdamW(ours), torch.optim.AdamW(plain, foreach=False, fused=False)
    settings = [(1e-2, 0.9, 0.95, 1e-12, 0.0), (3e-3, 0.8, 0.99, 1e-8, 0.1), (1e-3, 0.0, 0.5, 1e-4, 0.01)]
    for number, (lr, beta1, beta2, eps, weight_decay) in enumerate(settings):
        set_gradients(ours, number)
        set_gradients(plain, number)
        result = optimizer.step(AdamParams(lr, beta1, beta2, eps, weight_decay, clip), divisor=divisor)
        for parameter in plain:
            assert parameter.grad is not None
            parameter.grad /= divisor
        norm = torch.nn.utils.clip_grad_norm_(plain, clip or float("inf"))
        reference.param_groups[0].update(lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay)
        reference.step()
        assert result.applied
        assert result.grad_norm == pytest.approx(norm.item(), rel=FEW)
    for our, parameter, before in zip(ours, plain, start, strict=True):
        # A step rounds what it moves to a float32 as large as the parameter.
        size = parameter.norm() + len(settings) * (parameter.detach() - before).norm()
        assert (our.detach() - parameter.detach()).norm() <= len(settings) * FEW * size


@pytest.mark.parametrize("learning_rate", [1e-3, 3.3e-5, 0.0])
def test_learning_rate_is_not_rounded(learning_rate: float) -> None:
    # From zero, the first step of Adam is the learning rate itself; bfloat16 would make 1e-3 into 0.00099945.
    parameter = torch.nn.Parameter(torch.zeros(4))
    parameter.grad = torch.tensor([1.0, -1.0, 100.0, 1e-3])
    AdamW([parameter]).step(AdamParams(learning_rate=learning_rate))
    expected = -learning_rate * torch.tensor([1.0, -1.0, 1.0, 1.0])
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_step_with_non_finite_gradients_changes_nothing(bad: float) -> None:
    parameters = make_parameters()
    before = [parameter.detach().clone() for parameter in parameters]
    set_gradients(parameters, 0)
    assert parameters[1].grad is not None
    parameters[1].grad[3] = bad
    assert not AdamW(parameters).step(AdamParams()).applied
    for parameter, start in zip(parameters, before, strict=True):
        assert torch.equal(parameter, start)


def test_step_that_ran_out_of_memory_can_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, plain = make_parameters(), make_parameters()
    optimizer = AdamW(ours)
    set_gradients(ours, 0)
    real, calls = torch.zeros_like, []

    def zeros_like(*args: object, **kwargs: object) -> torch.Tensor:
        calls.append(args)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("no memory")
        return real(*args, **kwargs)  # pyright: ignore[reportCallIssue, reportArgumentType]

    with monkeypatch.context() as patched:
        patched.setattr(torch, "zeros_like", zeros_like)
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step(AdamParams())
    assert len(calls) == 4
    for parameter, start in zip(ours, plain, strict=True):
        assert torch.equal(parameter, start)
    optimizer.step(AdamParams())
    set_gradients(plain, 0)
    AdamW(plain).step(AdamParams())
    for parameter, wanted in zip(ours, plain, strict=True):
        assert torch.equal(parameter, wanted)


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_embeddings_that_add_their_rows_in_place_get_the_gradient_of_plain_ones(padding_idx: int | None) -> None:
    torch.manual_seed(0)
    plain = torch.nn.Embedding(11, 5, padding_idx=padding_idx)
    model = torch.nn.Module()
    ours = torch.nn.Embedding(11, 5, padding_idx=padding_idx)
    ours.load_state_dict(plain.state_dict())
    model.get_input_embeddings = lambda: ours  # type: ignore[assignment]
    add_rows_in_place(model)
    for seed in range(2):
        tokens = torch.randint(11, (2, 20), generator=torch.Generator().manual_seed(seed))
        upstream = torch.randn(2, 20, 5)
        for table in (plain, ours):
            found = table(tokens)
            torch.testing.assert_close(found, plain.weight[tokens])
            found.backward(upstream)
    assert plain.weight.grad is not None
    assert ours.weight.grad is not None
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad)
