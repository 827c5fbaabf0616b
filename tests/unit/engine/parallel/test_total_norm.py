"""The norm that clipping and the metric need, on a CPU: every square counts."""

import math

import pytest
import torch
from torch import nn

from trainer_service.engine.parallel.gradient_sums import total_norm
from trainer_service.engine.rank_channels import Ranks


def with_gradients(*gradients: torch.Tensor) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return parameters


def test_it_is_that_of_float64() -> None:
    # torch's own norm of this one alone is 1e-4 off.
    large, small = torch.randn(3, 3_000_001), torch.randn(5, 7).T
    exact = math.sqrt(sum(float(each.double().square().sum()) for each in (large, small)))
    assert total_norm(with_gradients(large, small, torch.tensor(3.0)), Ranks()) == pytest.approx(
        math.hypot(exact, 3.0), rel=1e-6
    )


def test_of_nothing_it_is_zero() -> None:
    assert total_norm([], Ranks()) == 0.0
    assert total_norm(with_gradients(torch.zeros(0, 4)), Ranks()) == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows(value: float) -> None:
    gradient = torch.ones(100)
    gradient[57] = value
    assert not math.isfinite(total_norm(with_gradients(torch.ones(3), gradient), Ranks()))
