"""A step of AdamW leaves everything finite, or leaves it as it was; and what is finite is never refused."""

import math

import numpy as np
import pytest
import torch
from gradwire.types import AdamParams
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer_service.engine.optim import AdamW
from trainer_service.engine.step_bounds import Largest, StepBounds

BIG = float(np.finfo(np.float32).max)


def parameters_of(*values: list[float]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.tensor(each)) for each in values]


def set_gradients(parameters: list[torch.nn.Parameter], *values: list[float]) -> None:
    for parameter, each in zip(parameters, values, strict=True):
        parameter.grad = torch.tensor(each)


def state_of(optimizer: AdamW, parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Copies of all that a step changes."""
    moments = [tensor for parameter in parameters for tensor in optimizer.state_of(parameter).values()]
    return [tensor.detach().clone() for tensor in (*parameters, *moments)]


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize(
    ("params", "gradient"),
    [
        (AdamParams(learning_rate=3e38), 1.0),
        (AdamParams(learning_rate=1e30, weight_decay=1e30), 1.0),
        # Squares below float32 leave nothing to divide by but eps.
        (AdamParams(learning_rate=1e18, eps=1e-45), 1e-24),
        # Squares above it.
        (AdamParams(learning_rate=1e-4, grad_clip_norm=3e38), 1e19 * math.sqrt(6)),
    ],
)
def test_step_whose_result_is_not_finite_changes_nothing(
    params: AdamParams, gradient: float, steps_before: int
) -> None:
    parameters = parameters_of([1.0, -2.0], [1.0, 1e9], [3.0])
    optimizer = AdamW(parameters)
    for _ in range(steps_before):
        set_gradients(parameters, [1.0, 0.5], [-1.0, 1.0], [0.0])
        assert optimizer.step(AdamParams(beta2=0.0, beta1=0.0, learning_rate=1e-9)).applied
    before = state_of(optimizer, parameters)
    set_gradients(parameters, [0.0, 0.0], [0.0, gradient], [0.0])
    result = optimizer.step(AdamParams(**{**vars(params), "beta2": 0.0}))
    assert not result.applied
    for now, start in zip(state_of(optimizer, parameters), before, strict=True):
        assert torch.equal(now, start)
    set_gradients(parameters, [1.0, 1.0], [1.0, 1.0], [1.0])
    assert optimizer.step(AdamParams()).applied


def test_the_parameter_that_would_overflow_is_told() -> None:
    parameters = parameters_of([1.0], [1e38], [1.0])
    set_gradients(parameters, [1.0], [1.0], [1.0])
    result = AdamW(parameters).step(AdamParams(learning_rate=1.0, weight_decay=1e2))
    assert result.overflowing is parameters[1]


number = st.floats(-1e3, 1e3, width=32)
hyperparameters = st.builds(
    AdamParams,
    learning_rate=st.sampled_from([0.0, 1e-4, 1.0, 1e10, 1e30, 3e38]),
    beta1=st.sampled_from([0.0, 0.9, 0.9999]),
    beta2=st.sampled_from([0.0, 0.95, 0.9999]),
    eps=st.sampled_from([1e-45, 1e-30, 1e-12, 1.0]),
    weight_decay=st.sampled_from([0.0, 0.1, 1e8, 1e30]),
    grad_clip_norm=st.sampled_from([0.0, 1e-40, 1.0]),
)
gradients = st.lists(st.one_of(number, st.sampled_from([0.0, 1e-30, -1e-22, 1e15, 1e18])), min_size=5, max_size=5)


@settings(deadline=None, max_examples=300)
@given(steps=st.lists(st.tuples(hyperparameters, gradients), min_size=1, max_size=6))
def test_steps_are_those_of_torch_or_not_taken(steps: list[tuple[AdamParams, list[float]]]) -> None:
    start = [0.0, 1.0, -3.0, 1e-30, 1e20]
    (ours,), (plain,) = parameters_of(start), parameters_of(start)
    optimizer, reference = AdamW([ours]), torch.optim.AdamW([plain], fused=True)
    for params, values in steps:
        ours.grad = torch.tensor(values)
        result = optimizer.step(params)
        assert bool(ours.isfinite().all())
        assert all(bool(moment.isfinite().all()) for moment in optimizer.state_of(ours).values())
        plain.grad = torch.tensor(values)
        # Squares below float32 are nothing in a norm.
        assert result.grad_norm == pytest.approx(math.hypot(*values), rel=1e-6, abs=1e-18)
        shrink = min(1.0, params.grad_clip_norm / (result.grad_norm + 1e-6)) if params.grad_clip_norm else 1.0
        reference.grad_scale = None if shrink == 1 else torch.tensor(1 / shrink)  # pyright: ignore[reportAttributeAccessIssue]
        reference.param_groups[0].update(
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            weight_decay=params.weight_decay,
        )
        reference.step()
        moments = [reference.state[plain][name] for name in ("exp_avg", "exp_avg_sq")]
        finite = all(bool(tensor.isfinite().all()) for tensor in (plain.detach(), *moments))
        assert result.applied == finite
        if not finite:
            return
        assert torch.equal(ours, plain)


def test_ordinary_training_looks_at_its_parameters_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    real = AdamW._largest
    monkeypatch.setattr(AdamW, "_largest", lambda self: measured.append(1) or real(self))
    monkeypatch.setattr(AdamW, "_overflows", lambda self, parameter: pytest.fail("tried on a copy"))
    parameters = parameters_of([1.0, 2.0])
    optimizer = AdamW(parameters)
    for number in range(200):
        set_gradients(parameters, [1e3 * number, -1e6])
        assert optimizer.step(AdamParams(learning_rate=1.0, weight_decay=0.1)).applied
    assert len(measured) == 1
    optimizer.load_state_of(parameters[0], optimizer.state_of(parameters[0]))
    set_gradients(parameters, [1.0, 1.0])
    assert optimizer.step(AdamParams()).applied
    assert len(measured) == 2


def test_bounds_outlast_any_training() -> None:
    bounds = StepBounds()
    assert all(bounds.admit(AdamParams(learning_rate=1e-2), 1e6, lambda: Largest(10.0, 0.0)) for _ in range(100_000))


@pytest.mark.parametrize("infinity", [-math.inf, math.inf])
def test_an_infinite_parameter_that_nothing_trains_is_kept(infinity: float) -> None:
    """A head's bias that forbids tokens."""
    parameters = parameters_of([infinity, 1.0])
    optimizer = AdamW(parameters)
    for learning_rate in (1e-2, 1e38, 1e-2):
        set_gradients(parameters, [0.0, 1.0])
        assert optimizer.step(AdamParams(learning_rate=learning_rate, beta1=0.0)).applied
        assert parameters[0][0].item() == infinity


@pytest.mark.parametrize(("name", "value"), [("exp_avg_sq", -1.0), ("exp_avg_sq", math.inf), ("exp_avg", math.nan)])
def test_moments_that_no_step_makes_are_not_trained_with(name: str, value: float) -> None:
    (parameter,) = parameters = parameters_of([1.0, 2.0])
    optimizer = AdamW(parameters)
    set_gradients(parameters, [1.0, 1.0])
    optimizer.step(AdamParams())
    state = {**optimizer.state_of(parameter), name: torch.tensor([1.0, value])}
    optimizer.load_state_of(parameter, state)
    before = parameter.detach().clone()
    set_gradients(parameters, [1e-3, 1e-3])
    assert not optimizer.step(AdamParams()).applied
    assert torch.equal(parameter, before)
