"""SamplingParams before they are sent: types and ranges, named as the caller wrote them."""

from typing import Any

import numpy as np
import pytest
import torch
from gradwire._client.sampling_params import sampling_params_message
from gradwire.errors import InvalidArgumentError
from gradwire.types import SamplingParams


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 1.5),
        ("seed", "7"),
        ("seed", True),
        ("seed", 1 << 63),
        ("max_tokens", 8.0),
        ("max_tokens", -1),
        ("max_tokens", 1 << 32),
        ("max_tokens", "8"),
        ("top_k", 2.5),
        ("top_k", -2),
        ("top_k", 1 << 31),
        ("temperature", "0.7"),
        ("temperature", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 10**400),
        ("temperature", [0.7]),
        ("top_p", "0.9"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("stop", 5),
        ("stop", b"ab"),
        ("stop", {"a": 1}),
        ("stop", ["a", 5]),
        ("stop", ["a", ""]),
        ("stop", ""),
    ],
)
def test_a_value_of_another_type_or_out_of_range_is_refused_by_its_name(name: str, value: Any):
    params: dict[str, Any] = {name: value}
    with pytest.raises(InvalidArgumentError, match="it must be") as caught:
        sampling_params_message(SamplingParams(**params))
    assert caught.value.field_violations[0][0] == f"sampling_params.{name}"


@pytest.mark.parametrize("entry", [1.5, True, -1, 1 << 31, None])
def test_a_stop_token_that_is_no_token_id_is_refused_by_its_place(entry: Any):
    with pytest.raises(InvalidArgumentError) as caught:
        sampling_params_message(SamplingParams(stop=[3, entry]))
    assert caught.value.field_violations[0][0] == "sampling_params.stop[1]"


def test_a_long_wrong_value_is_shown_in_part():
    params: Any = SamplingParams()
    object.__setattr__(params, "seed", "x" * 10_000)
    with pytest.raises(InvalidArgumentError) as caught:
        sampling_params_message(params)
    assert len(caught.value.message) < 500


@pytest.mark.parametrize("of", [int, np.int64, torch.tensor])
def test_integers_of_python_numpy_and_torch_are_taken(of: Any):
    encoded = sampling_params_message(SamplingParams(max_tokens=of(0), seed=of(-3), top_k=of(5), stop=[of(7), of(8)]))
    assert (encoded.max_tokens, encoded.seed, encoded.top_k) == (0, -3, 5)
    assert encoded.HasField("max_tokens")
    assert list(encoded.stop.token_ids) == [7, 8]


@pytest.mark.parametrize("of", [float, np.float32, np.float64, torch.tensor])
def test_numbers_of_python_numpy_and_torch_are_taken(of: Any):
    encoded = sampling_params_message(SamplingParams(temperature=of(0.5), top_p=of(0.25)))
    assert (encoded.temperature, encoded.top_p) == (0.5, 0.25)


def test_what_is_absent_stays_absent_and_a_text_is_one_stop():
    encoded = sampling_params_message(SamplingParams(stop="ab"))
    assert [encoded.HasField(name) for name in ("max_tokens", "seed")] == [False, False]
    assert list(encoded.stop.strings) == ["ab"]
    assert sampling_params_message(SamplingParams(stop=[])).HasField("stop")
    assert not sampling_params_message(SamplingParams()).HasField("stop")
