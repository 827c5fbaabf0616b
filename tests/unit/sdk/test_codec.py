"""Between numpy and the wire."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gradwire._wire.codec import (
    Batch,
    batch_from_data,
    batch_message,
    decode_batch,
    decode_tensor,
    split,
    tensor_message,
)
from gradwire.errors import InvalidArgumentError
from gradwire.types import Datum, ModelInput, TensorData
from gradwire.v1 import datum_pb2, tensor_pb2
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst


def datum(num_tokens: int, **inputs: object) -> Datum:
    tokens = list(range(1, num_tokens + 1))
    return Datum(ModelInput.from_ints(tokens), {"target_tokens": tokens, **inputs})


@given(npst.arrays(np.float32, npst.array_shapes(max_dims=3, max_side=5)), st.booleans())
def test_a_tensor_comes_back_as_it_was_sent(array: np.ndarray, typed_by_hand: bool):
    wire = tensor_pb2.Tensor.FromString(tensor_message(array, typed_by_hand=typed_by_hand).SerializeToString())
    np.testing.assert_array_equal(decode_tensor(wire, "x"), array)


@given(st.lists(st.integers(1, 7), min_size=1, max_size=12), st.integers(1, 400))
def test_a_split_batch_joins_to_the_whole(lengths: list[int], target_bytes: int):
    batch = batch_from_data([datum(n, weights=np.arange(n, dtype=np.float32)) for n in lengths])
    pieces = split(batch, target_bytes)
    assert sum(piece.num_sequences for piece in pieces) == batch.num_sequences
    np.testing.assert_array_equal(np.concatenate([piece.tokens_T for piece in pieces]), batch.tokens_T)
    for name, whole in batch.loss_fn_inputs.items():
        np.testing.assert_array_equal(np.concatenate([piece.loss_fn_inputs[name] for piece in pieces]), whole)
    for piece in pieces:
        assert piece.cu_seqlens[0] == 0
        assert piece.cu_seqlens[-1] == piece.num_tokens


def test_pieces_are_about_the_target_size():
    batch = batch_from_data([datum(100) for _ in range(50)])
    pieces = split(batch, 10_000)
    assert len(pieces) > 4
    assert all(piece.size_bytes() <= 10_500 for piece in pieces)


def test_both_forms_of_a_batch_decode_alike():
    batch = batch_from_data([datum(3, weights=[0.0, 1.0, 1.0]), datum(2, weights=[0.5, 0.5])])
    typed = [
        datum_pb2.Datum(
            model_input=datum_pb2.ModelInput(tokens=tokens),
            loss_fn_inputs={
                "target_tokens": tensor_pb2.Tensor(ints=tensor_pb2.IntValues(values=tokens)),
                "weights": tensor_pb2.Tensor(floats=tensor_pb2.FloatValues(values=weights)),
            },
        )
        for tokens, weights in (([1, 2, 3], [0, 1, 1]), ([1, 2], [0.5, 0.5]))
    ]
    by_hand, by_program = decode_batch(typed, None), decode_batch([], batch_message(batch))
    assert by_hand.typed_by_hand
    assert not by_program.typed_by_hand
    for one, other in ((by_hand, by_program), (by_program, batch)):
        np.testing.assert_array_equal(one.tokens_T, other.tokens_T)
        np.testing.assert_array_equal(one.cu_seqlens, other.cu_seqlens)
        assert one.loss_fn_inputs.keys() == other.loss_fn_inputs.keys()
        for name, array in one.loss_fn_inputs.items():
            assert array.dtype == other.loss_fn_inputs[name].dtype
            np.testing.assert_array_equal(array, other.loss_fn_inputs[name])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "data is empty"),
        ([datum(0)], r"data\[0\].model_input has no tokens"),
        (
            [Datum(ModelInput.from_ints([1]), {"weights": [1.0]})],
            r'data\[0\].loss_fn_inputs\["target_tokens"\] is missing',
        ),
        (
            [datum(3), datum(3, weights=[1, 1, 1])],
            r'data\[0\].loss_fn_inputs\["weights"\] is missing, but data\[1\] has it',
        ),
        (
            [datum(2, weights=[1, 1]), datum(3, weights=[1, 1])],
            r'data\[1\].loss_fn_inputs\["weights"\] has 2 values, but target_tokens has 3',
        ),
        ([datum(2, target_tokens=[1.5, 2.5])], r'data\[0\].loss_fn_inputs\["target_tokens"\] has dtype float32'),
        ([datum(2, target_tokens=[1, 2, 3])], "has 3 values, but model_input has 2 tokens"),
        (
            [datum(2, target_tokens=[[1, 2], [3, 4]]), datum(2, target_tokens=[[1], [3]])],
            "same number of values a token",
        ),
        (
            [Datum(ModelInput.from_ints([2**40]), {"target_tokens": [1]})],
            r"data\[0\].model_input.tokens\[0\] is 1099511",
        ),
        (["text"], r"data\[0\] is a str; it must have model_input"),
        (
            [
                datum(2),
                SimpleNamespace(model_input=[1, 2], loss_fn_inputs={"target_tokens": np.array([1, 2**63], np.uint64)}),
            ],
            r'data\[1\].loss_fn_inputs\["target_tokens"\]\[1\] is 9223372036854775808, which is no int64',
        ),
        (
            [SimpleNamespace(model_input=[1, 2], loss_fn_inputs={"target_tokens": [1, 2], "weights": [1.0, 1e39]})],
            r'data\[0\].loss_fn_inputs\["weights"\]\[1\] is 1e\+39, which is beyond float32',
        ),
        ([SimpleNamespace(model_input=[1], loss_fn_inputs=[1])], r"data\[0\].loss_fn_inputs is a list"),
        ([SimpleNamespace(model_input=[1], loss_fn_inputs={1: [1]})], r"data\[0\].loss_fn_inputs has the key 1"),
        ([SimpleNamespace(model_input=None, loss_fn_inputs={})], r"data\[0\].model_input cannot be read"),
        (7, "data is a int; it must be a list of datums"),
    ],
)
def test_data_that_does_not_fit_is_refused_by_name(data: Any, message: str):
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        batch_from_data(data)
    assert caught.value.reason == "INVALID_FIELD"
    assert caught.value.field_violations


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (tensor_pb2.Tensor(), "has no elements"),
        (tensor_pb2.Tensor(data=b"1234"), "set dtype"),
        (tensor_pb2.Tensor(data=b"123", dtype=tensor_pb2.DATA_TYPE_FLOAT32), "no whole number of float32"),
        (tensor_pb2.Tensor(data=b"12345678", dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[3]), "do not fill shape"),
        (tensor_pb2.Tensor(data=b"12345678", dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[-2, -1]), "do not fill shape"),
        (
            tensor_pb2.Tensor(data=b"12345678", dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[2**62, 2**62, 0, 2]),
            "do not fill shape",
        ),
        (
            tensor_pb2.Tensor(data=b"", dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[0, 2**62, 2**62]),
            "do not fill shape",
        ),
        (tensor_pb2.Tensor(data=b"1234", dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[1] * 65), "has a shape of 65 dims"),
        (
            # As a product this would take a while.
            tensor_pb2.Tensor(data=b"1234", dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[2**62] * 1_000_000),
            "has a shape of 1000000 dims; there may be at most 8",
        ),
        (
            tensor_pb2.Tensor(floats=tensor_pb2.FloatValues(values=[1]), dtype=tensor_pb2.DATA_TYPE_INT64),
            "but dtype says int64",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(tensor: tensor_pb2.Tensor, message: str):
    with pytest.raises(InvalidArgumentError, match=message):
        decode_tensor(tensor, "gradients")


def wire_batch(**changes: np.ndarray) -> datum_pb2.DatumBatch:
    parts = {
        "tokens": np.array([1, 2, 3], dtype=np.int32),
        "cu_seqlens": np.array([0, 1, 3]),
        "target_tokens": np.array([1, 2, 3]),
    } | changes
    return datum_pb2.DatumBatch(
        tokens=tensor_message(parts["tokens"]),
        cu_seqlens=tensor_message(parts["cu_seqlens"]),
        loss_fn_inputs={"target_tokens": tensor_message(parts["target_tokens"])},
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cu_seqlens": np.array([0, 2])}, "must rise from 0"),
        ({"cu_seqlens": np.array([0, 3, 1, 3])}, "must rise from 0"),
        ({"cu_seqlens": np.array([0])}, "data is empty"),
        ({"cu_seqlens": np.array([0, 0, 3])}, r"data\[0\].model_input has no tokens"),
        ({"tokens": np.array([1.0, 2.0, 3.0], dtype=np.float32)}, "batch.tokens has dtype float32"),
        ({"target_tokens": np.array([1, 2])}, "but there are 3 tokens"),
    ],
)
def test_columns_that_do_not_fit_are_refused(changes: dict[str, np.ndarray], message: str):
    with pytest.raises(InvalidArgumentError, match=message):
        decode_batch([], wire_batch(**changes))


def test_a_piece_names_its_datums_as_the_caller_counts_them():
    batch = batch_from_data([datum(2) for _ in range(9)])
    pieces = split(batch, target_bytes=100)
    assert [piece.first_datum_index for piece in pieces] == list(
        np.cumsum([0, *(p.num_sequences for p in pieces)])[:-1]
    )
    last = decode_batch([], batch_message(pieces[-1]))
    assert last.datum_path(0) == f"data[{pieces[-1].first_datum_index}]"
    assert last.sequences(0, 1).input_path(0, "weights") == f'{last.datum_path(0)}.loss_fn_inputs["weights"]'
    damaged = batch_message(pieces[-1])
    damaged.cu_seqlens.CopyFrom(tensor_message(np.insert(last.cu_seqlens, 1, 0)))
    with pytest.raises(InvalidArgumentError, match=rf"^data\[{last.first_datum_index}\].model_input has no tokens"):
        decode_batch([], damaged)


def test_both_forms_at_once_are_refused():
    with pytest.raises(InvalidArgumentError, match="both set"):
        decode_batch([datum_pb2.Datum()], wire_batch())


def test_inputs_are_copied_so_that_later_changes_do_not_show():
    weights = np.ones(2, dtype=np.float32)
    batch = batch_from_data([datum(2, weights=weights)])
    weights[:] = 7
    assert isinstance(batch, Batch)
    np.testing.assert_array_equal(batch.loss_fn_inputs["weights"], [1, 1])


def test_objects_of_another_sdk_are_taken_by_their_attributes():
    class Chunk:
        tokens = (4, 5)

    class OtherModelInput:
        chunks = [Chunk(), Chunk()]

    class OtherTensor:
        data, dtype, shape = [1.0, 2.0, 3.0, 4.0], "float32", [4]

    class OtherDatum:
        model_input = OtherModelInput()
        loss_fn_inputs = {"target_tokens": TensorData([5, 4, 5, 6]), "weights": OtherTensor()}

    batch = batch_from_data([OtherDatum()])
    np.testing.assert_array_equal(batch.tokens_T, [4, 5, 4, 5])
    np.testing.assert_array_equal(batch.loss_fn_inputs["weights"], [1, 2, 3, 4])
