"""What users pass in and get back."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from gradwire import Datum, EncodedTextChunk, ModelInput, TensorData, datum_from_tokens_weights
from gradwire.errors import InvalidArgumentError
from gradwire.types import LossFnOutputs


def test_datum_from_tokens_weights_shifts_by_one():
    datum = datum_from_tokens_weights(torch.tensor([5, 6, 7, 8]), torch.tensor([0.0, 0.0, 1.0, 1.0]))
    assert datum.model_input.to_ints() == [5, 6, 7]
    assert datum.loss_fn_inputs["target_tokens"].data == [6, 7, 8]
    assert datum.loss_fn_inputs["weights"].data == [0.0, 1.0, 1.0]
    assert datum.loss_fn_inputs["weights"].dtype == "float32"


def test_datum_from_tokens_weights_cuts_at_max_length():
    datum = datum_from_tokens_weights([1, 2, 3, 4], [1, 1, 1, 1], max_length=3)
    assert datum.model_input.to_ints() == [1, 2]
    assert datum.loss_fn_inputs["target_tokens"].data == [2, 3]


@pytest.mark.parametrize(
    ("tokens", "weights", "message"),
    [([1, 2], [1.0], "weights has shape"), ([1], [1.0], "at least 2"), ([1.0, 2.0], [1.0, 1.0], "integers")],
)
def test_datum_from_tokens_weights_refuses_what_does_not_fit(tokens: list, weights: list, message: str):
    with pytest.raises(ValueError, match=message):
        datum_from_tokens_weights(tokens, weights)


def test_tensor_data_takes_lists_numpy_and_torch():
    for values in (
        [1.0, 2.0],
        np.array([1.0, 2.0]),
        torch.tensor([1.0, 2.0]),
        torch.tensor([1, 2], dtype=torch.bfloat16),
    ):
        made = TensorData(values)
        assert made.dtype == "float32"
        assert made.data == [1.0, 2.0]
    assert TensorData([1, 2]).dtype == "int64"
    assert TensorData([1, 2, 3, 4], dtype="float32", shape=[2, 2]).tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert TensorData(torch.ones(2, requires_grad=True)).data == [1.0, 1.0]


def test_tensor_data_gives_torch_back_even_from_a_read_only_buffer():
    read_only = np.frombuffer(np.arange(3, dtype=np.float32).tobytes(), dtype=np.float32)
    assert TensorData(read_only).to_torch().tolist() == [0.0, 1.0, 2.0]


def test_tensor_data_refuses_what_is_no_number():
    for data in (["a"], [None], [1j], "text", [{}]):
        with pytest.raises(ValueError, match="^data has dtype .*; it takes numbers"):
            TensorData(data)
    for data, dtype in ((["1.5"], "float32"), (["1"], "int64")):
        with pytest.raises(ValueError, match="^data has dtype <U"):
            TensorData(data, dtype=dtype)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='^dtype is .*"float32" or "int64"'):
        TensorData([1.0], dtype="float64")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("data", "dtype", "message"),
    [
        ([1.0, 1e39], None, r"data\[1\] is 1e\+39, which is beyond float32"),
        ([[1], [2**70]], "float32", "data has dtype object"),
        ([[1], [-1e300]], None, r"data\[1\]\[0\] is -1e\+300"),
        (np.array([1, 2**63], dtype=np.uint64), None, r"data\[1\] is 9223372036854775808, which is no int64"),
        ([1.0, 1.5], "int64", r"data\[1\] is 1.5, which is no int64"),
        ([float("nan")], "int64", r"data\[0\] is nan, which is no int64"),
        ([2.0**63], "int64", "which is no int64"),
        ([[1], [1, 2]], None, "data cannot be read: .*inhomogeneous"),
    ],
)
def test_tensor_data_refuses_what_its_dtype_cannot_hold(data: Any, dtype: str | None, message: str):
    with pytest.raises(InvalidArgumentError, match=message):
        TensorData(data, dtype=dtype)  # type: ignore[arg-type]


def test_tensor_data_takes_what_its_dtype_holds():
    assert TensorData([float("inf"), float("nan"), 3e38]).dtype == "float32"
    assert TensorData([1.0, -(2.0**63)], dtype="int64").data == [1, -(2**63)]
    assert TensorData([2**63 - 1]).data == [2**63 - 1]
    assert TensorData([1e-60]).data == [0.0]
    with pytest.raises(InvalidArgumentError, match=r"^shape is \[3\], which 4 elements do not fill"):
        TensorData([1, 2, 3, 4], shape=[3])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"weights": [1.0, 1e39]}, r'^loss_fn_inputs\["weights"\]\[1\] is 1e\+39'),
        ({"weights": ["a"]}, r'^loss_fn_inputs\["weights"\] has dtype <U1'),
        ([1.0], "^loss_fn_inputs is a list; it must be a dict"),
        ({3: [1.0]}, "^loss_fn_inputs has the key 3"),
    ],
)
def test_a_datum_names_the_input_that_does_not_fit(inputs: object, message: str):
    with pytest.raises(InvalidArgumentError, match=message):
        Datum(ModelInput.from_ints([1, 2]), inputs)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"weights\[1\] is 1e\+39"):
        datum_from_tokens_weights([1, 2], [0, 1e39])


def test_model_input_joins_chunks():
    made = ModelInput(chunks=[EncodedTextChunk(tokens=[1, 2]), EncodedTextChunk(tokens=[3])])
    assert made.to_ints() == [1, 2, 3]
    assert made.length == 3
    assert made.chunks[0].tokens == [1, 2, 3]


def test_model_input_refuses_images_and_floats():
    class Image:
        data = b""

    with pytest.raises(ValueError, match=r"chunks\[0\] is a Image without tokens"):
        ModelInput(chunks=[Image()])
    with pytest.raises(ValueError, match="integers"):
        ModelInput.from_ints([1.5])


def test_datum_wraps_plain_lists():
    datum = Datum(ModelInput.from_ints([1]), {"target_tokens": [2]})
    assert datum.loss_fn_inputs["target_tokens"].dtype == "int64"


def test_outputs_are_made_when_asked_for_and_share_one_buffer():
    logprobs = np.arange(6, dtype=np.float32)
    outputs = LossFnOutputs({"logprobs": logprobs}, np.array([0, 2, 3, 6]))
    assert len(outputs) == 3
    assert [output["logprobs"].data for output in outputs] == [[0, 1], [2], [3, 4, 5]]
    assert outputs[-1]["logprobs"].data == [3, 4, 5]
    assert [output["logprobs"].shape for output in outputs[1:]] == [[1], [3]]
    assert np.shares_memory(outputs[0]["logprobs"].to_numpy(), logprobs)
    outputs[0]["advantages"] = TensorData([1.0, 2.0])
    assert outputs[0].keys() == {"logprobs", "advantages"}
    made: list = [{}]
    made += outputs
    assert len(made) == len(outputs + made[:1]) == 4
    with pytest.raises(IndexError):
        outputs[3]


def test_outputs_survive_pickling():
    outputs = pickle.loads(pickle.dumps(LossFnOutputs({"logprobs": np.ones(2, np.float32)}, np.array([0, 2]))))
    assert outputs[0]["logprobs"].data == [1.0, 1.0]
