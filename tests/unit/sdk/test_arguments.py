"""Arguments of a wrong type or range are refused by name, wherever they come from."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gradwire import AdamParams, LoraConfig, ServiceClient
from gradwire._wire.arguments import check_flag, check_number, check_whole_number
from gradwire.errors import InvalidArgumentError


def refusal(made: Any, **arguments: Any) -> str:
    """Why; it must begin with the one argument's name."""
    with pytest.raises(InvalidArgumentError) as caught:
        made(**arguments)
    ((field, _),) = caught.value.field_violations
    assert [field] == list(arguments)
    assert caught.value.message.startswith(f"{field} is ")
    assert len(caught.value.message) < 200
    return caught.value.message


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("learning_rate", "0.1", "'0.1'; it must be a number"),
        ("learning_rate", True, "must be a number"),
        ("learning_rate", [0.1], "must be a number"),
        ("learning_rate", np.ones(2), "must be a single number"),
        ("learning_rate", -1e-4, "at least 0"),
        ("learning_rate", float("nan"), "finite"),
        ("learning_rate", 10**400, "finite"),
        ("learning_rate", 1e39, "beyond float32"),
        ("learning_rate", 1e-46, "rounds to 0"),
        ("beta1", 1.0, "at least 0 and below 1"),
        ("beta1", 1 - 1e-9, "float32 rounds to 1"),
        ("beta2", -0.1, "at least 0 and below 1"),
        ("eps", 0.0, "above 0"),
        ("eps", 1e-50, "rounds to 0"),
        ("weight_decay", 1e300, "beyond float32"),
        ("grad_clip_norm", -1, "at least 0"),
        ("grad_clip_norm", float("inf"), "finite"),
    ],
)
def test_hyperparameters(name: str, value: Any, why: str) -> None:
    assert why in refusal(AdamParams, **{name: value})


def test_numbers_of_every_kind_are_taken() -> None:
    values: dict[str, Any] = {"learning_rate": 0, "beta1": np.float32(0.5), "beta2": torch.tensor(0.25)}
    params = AdamParams(**values, eps=np.float64(1e-8), weight_decay=True + 0)
    assert [type(value) for value in vars(params).values()] == [float] * 6
    assert (params.learning_rate, params.beta1, params.beta2, params.weight_decay) == (0, 0.5, 0.25, 1)


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("rank", 0, "1 to"),
        ("rank", 8.0, "whole number"),
        ("rank", "8", "whole number"),
        ("seed", 1.5, "1.5; it must be a whole number"),
        ("seed", True, "whole number"),
        ("seed", -1, "0 to"),
        ("seed", 2**64, "0 to"),
        ("seed", 10**1000, "more than 77 digits"),
        ("train_mlp", "no", "True or False"),
        ("train_attn", 1, "True or False"),
    ],
)
def test_lora_settings(name: str, value: Any, why: str) -> None:
    assert why in refusal(LoraConfig, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("lora_rank", 1.5), ("lora_alpha", 1e39), ("lora_alpha", "16"), ("seed", 1.5), ("train_mlp", 1)]
)
def test_settings_of_a_new_run_are_refused_before_anything_is_sent(name: str, value: Any) -> None:
    # Nobody is there: were it to ask, this would be another error.
    with ServiceClient("http://127.0.0.1:9", timeout_s=1) as service:
        refusal(service.create_training_client, **{name: value})


def test_checks_give_the_value_back() -> None:
    assert check_number("x", np.float32(3)) == 3.0
    assert check_whole_number("x", np.int64(3), at_least=0, at_most=3) == 3
    assert check_flag("x", np.bool_(True)) is True
    assert AdamParams(**vars(AdamParams())) == AdamParams()
    assert LoraConfig(seed=np.int64(7)).seed == 7  # pyright: ignore[reportArgumentType]


def test_something_else_in_place_of_hyperparameters_is_refused() -> None:
    from gradwire._client.requests import adam_params_of

    assert adam_params_of(SimpleNamespace(learning_rate=1e-3, beta1=None)) == AdamParams(learning_rate=1e-3)
    assert adam_params_of(None) == AdamParams()
    for other in ({"learning_rate": 1e-3}, 1e-3, "adam"):
        with pytest.raises(InvalidArgumentError, match=r"^optim_params is a \w+; it must have learning_rate, beta1"):
            adam_params_of(other)
