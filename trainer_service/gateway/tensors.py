"""Translates tensors between tinker's wire and ours. numpy and protobuf only.

Shape suffixes: T tokens of all datums end to end, N datums, K targets a token.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from gradwire._wire.codec import Batch, batch_from_arrays, decode_tensor, input_path
from gradwire.errors import invalid_field
from gradwire.v1.operation_pb2 import ForwardBackwardResponse, ForwardResponse

from trainer_service.gateway.wire import tinker_wire_pb2 as wire

_NUMPY_TYPES: dict[int, np.dtype[Any]] = {
    wire.DTYPE_FLOAT32: np.dtype("<f4"),
    wire.DTYPE_INT64: np.dtype("<i8"),
    wire.DTYPE_INT32: np.dtype("<i4"),
}
_MAX_DENSE_ELEMENTS = 1 << 24
"""The most elements of a sparse tensor made dense: a few bytes may stand for any number of them."""


def read_batch(request: wire.ForwardBackwardRequest) -> Batch:
    """Reads the datums of a request, end to end.

    Raises:
        InvalidArgumentError: Naming the datum and input that does not fit.
    """

    def arrays() -> Iterator[tuple[npt.NDArray[np.int64], dict[str, npt.NDArray[Any]]]]:
        left = _MAX_DENSE_ELEMENTS
        for number, datum in enumerate(request.data):
            tokens = _read_tokens(datum, number)
            inputs: dict[str, npt.NDArray[Any]] = {}
            for name, tensor in datum.loss_fn_inputs.items():
                inputs[name] = _read_tensor(tensor, input_path(number, name), left)
                left -= inputs[name].size if tensor.HasField("sparse_csr") else 0
            yield tokens, inputs

    return batch_from_arrays(arrays())


def _read_tokens(datum: wire.Datum, number: int) -> npt.NDArray[np.int64]:
    pieces: list[npt.NDArray[np.int64]] = []
    for place, chunk in enumerate(datum.model_input):
        kind, where = chunk.WhichOneof("chunk"), f"data[{number}].model_input.chunks[{place}]"
        if kind != "encoded_text":
            raise invalid_field(where, f"is {kind or 'empty'}; this trainer's models read tokens alone.")
        tokens = chunk.encoded_text.tokens
        if len(tokens) % 4:
            raise invalid_field(where, f"has {len(tokens)} bytes, which is no whole number of int32 tokens.")
        pieces.append(np.frombuffer(tokens, dtype="<i4").astype(np.int64))
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)


def _read_tensor(tensor: wire.Tensor, where: str, max_elements: int) -> npt.NDArray[Any]:
    dtype = _NUMPY_TYPES.get(tensor.dtype)
    if dtype is None:
        raise invalid_field(where, f"has dtype {tensor.dtype}; it must be float32, int64 or int32.")
    shape = tuple(tensor.shape)
    if tensor.WhichOneof("encoding") == "sparse_csr":
        return _read_sparse(tensor.sparse_csr, dtype, shape, where, max_elements)
    flat = _elements(tensor.dense, dtype, where)
    if not shape:
        return flat
    if min(shape) < 0 or not 1 <= len(shape) <= 2 or shape[0] * (shape[1] if len(shape) > 1 else 1) != flat.size:
        raise invalid_field(where, f"has {flat.size} elements, which do not fill shape {list(shape)}.")
    return flat.reshape(shape)


def _read_sparse(
    csr: wire.SparseCsr, dtype: np.dtype[Any], shape: tuple[int, ...], where: str, max_elements: int
) -> npt.NDArray[Any]:
    values, crow, col = (
        _elements(data, kind, where)
        for data, kind in ((csr.values, dtype), (csr.crow_indices, np.dtype("<i8")), (csr.col_indices, np.dtype("<i8")))
    )
    if len(shape) != 2 or min(shape) < 0 or shape[0] * shape[1] > max_elements:
        raise invalid_field(
            where, f"is sparse of shape {list(shape)}; it must have two dims and fewer elements, {max_elements} a call."
        )
    counts = np.diff(crow)
    if (
        len(crow) != shape[0] + 1
        or crow[0] != 0
        or crow[-1] != len(values)
        or (counts < 0).any()
        or len(col) != len(values)
        or (len(col) and (col.min() < 0 or col.max() >= shape[1]))
    ):
        raise invalid_field(where, f"is sparse, but its indices do not fit its {len(values)} values and {list(shape)}.")
    dense = np.zeros(shape, dtype=dtype)
    dense[np.repeat(np.arange(shape[0]), counts), col] = values
    return dense


def _elements(data: bytes, dtype: np.dtype[Any], where: str) -> npt.NDArray[Any]:
    if len(data) % dtype.itemsize:
        raise invalid_field(where, f"has {len(data)} bytes, which is no whole number of {dtype.name} elements.")
    return np.frombuffer(data, dtype=dtype)


def read_logprobs(response: ForwardResponse | ForwardBackwardResponse) -> npt.NDArray[np.float32]:
    """logprobs_TK of an answer, [T] or [T, K]."""
    return decode_tensor(response.loss_fn_outputs["logprobs"], "logprobs")


def output_message(
    response: ForwardResponse | ForwardBackwardResponse, metrics: dict[str, float]
) -> wire.ForwardBackwardOutput:
    """A trainer's answer as tinker's message, with the metrics given."""
    cu_seqlens = decode_tensor(response.cu_seqlens, "cu_seqlens").astype("<i8")
    record = wire.ArrayRecord(type_tag="ArrayRecord", num_datums=len(cu_seqlens) - 1)
    for name, tensor in response.loss_fn_outputs.items():
        array = np.ascontiguousarray(decode_tensor(tensor, name), dtype="<f4")
        row_bytes = array.itemsize * math.prod(array.shape[1:])
        field = record.fields[name]
        field.data, field.offsets = array.tobytes(), (cu_seqlens * row_bytes).tobytes()
        field.dtype = wire.DTYPE_FLOAT32
        field.trailing_shape.extend(array.shape[1:])
    return wire.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord", loss_fn_outputs=[record], metrics=metrics)
