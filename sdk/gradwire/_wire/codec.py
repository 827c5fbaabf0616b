"""Converts between numpy arrays and the wire's tensors and data. Used by both sides; numpy and protobuf only.

Shape suffixes: T tokens of all sequences end to end, N sequences, K soft targets a token.
"""

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from gradwire._wire.arguments import check_array
from gradwire._wire.wire_format import Parts, embed
from gradwire.errors import invalid_field
from gradwire.types import TensorData
from gradwire.types.data import check_loss_fn_inputs, model_input_tokens, to_array
from gradwire.v1 import datum_pb2, tensor_pb2

_NUMPY_TYPES: dict[tensor_pb2.DataType, np.dtype[Any]] = {
    tensor_pb2.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    tensor_pb2.DATA_TYPE_INT64: np.dtype("<i8"),
    tensor_pb2.DATA_TYPE_INT32: np.dtype("<i4"),
}
_WIRE_TYPES = {dtype: number for number, dtype in _NUMPY_TYPES.items()}
_NAMES = {number: dtype.name for number, dtype in _NUMPY_TYPES.items()}
_DATA = tensor_pb2.Tensor.DATA_FIELD_NUMBER
_TOKENS = datum_pb2.DatumBatch.TOKENS_FIELD_NUMBER
_CU_SEQLENS = datum_pb2.DatumBatch.CU_SEQLENS_FIELD_NUMBER
_LOSS_FN_INPUTS = datum_pb2.DatumBatch.LOSS_FN_INPUTS_FIELD_NUMBER
_MAP_KEY, _MAP_VALUE = 1, 2
_JOINED_TOKENS = 1 << 15
"""As many as stay in the processor's cache."""
_MAX_DIMS = 8
"""Of a tensor; nothing here has more than two."""


@dataclass(frozen=True)
class Batch:
    """Sequences end to end.

    Attributes:
        tokens_T: Token ids, int32.
        cu_seqlens: int64 [N + 1]; sequence i is tokens_T[cu_seqlens[i]:cu_seqlens[i + 1]].
        loss_fn_inputs: By name, each [T] or [T, K]: float32, or int64 for target_tokens.
        typed_by_hand: Came as `repeated Datum`, so the answer is to be readable too.
        first_datum_index: Of sequence 0 among the caller's data, of which this may be a piece.
    """

    tokens_T: npt.NDArray[np.int32]
    cu_seqlens: npt.NDArray[np.int64]
    loss_fn_inputs: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    typed_by_hand: bool = False
    first_datum_index: int = 0

    @property
    def num_sequences(self) -> int:
        """Number of sequences, N."""
        return len(self.cu_seqlens) - 1

    @property
    def num_tokens(self) -> int:
        """Number of tokens, T."""
        return len(self.tokens_T)

    def size_bytes(self) -> int:
        """Bytes of all arrays, about what the batch takes on the wire."""
        return self.tokens_T.nbytes + self.cu_seqlens.nbytes + sum(a.nbytes for a in self.loss_fn_inputs.values())

    def datum_path(self, number: int) -> str:
        """Path of sequence `number` as the caller wrote it, such as "data[150]"."""
        return f"data[{self.first_datum_index + number}]"

    def input_path(self, number: int, name: str) -> str:
        """Path of a loss input of sequence `number` as the caller wrote it."""
        return input_path(self.first_datum_index + number, name)

    def place(self, row: int) -> tuple[int, int]:
        """(sequence, place inside it) of one of the T rows."""
        number = int(np.searchsorted(self.cu_seqlens, row, side="right")) - 1
        return number, row - int(self.cu_seqlens[number])

    def sequences(self, start: int, stop: int) -> "Batch":
        """Sequences start to stop as a batch of their own, sharing memory."""
        lo, hi = int(self.cu_seqlens[start]), int(self.cu_seqlens[stop])
        return Batch(
            tokens_T=self.tokens_T[lo:hi],
            cu_seqlens=self.cu_seqlens[start : stop + 1] - lo,
            loss_fn_inputs={name: array[lo:hi] for name, array in self.loss_fn_inputs.items()},
            typed_by_hand=self.typed_by_hand,
            first_datum_index=self.first_datum_index + start,
        )


def tensor_message(array: npt.NDArray[Any], *, typed_by_hand: bool = False) -> tensor_pb2.Tensor:
    """A tensor of float32, int64 or int32 for the wire; as JSON numbers when typed_by_hand."""
    if typed_by_hand:
        flat = array.ravel().tolist()
        if array.dtype.kind == "f":
            return tensor_pb2.Tensor(floats=tensor_pb2.FloatValues(values=flat), shape=array.shape)
        return tensor_pb2.Tensor(ints=tensor_pb2.IntValues(values=flat), shape=array.shape)
    wire_type = _WIRE_TYPES[array.dtype.newbyteorder("<")]
    little = np.ascontiguousarray(array, dtype=_NUMPY_TYPES[wire_type])
    return tensor_pb2.Tensor(data=little.tobytes(), dtype=wire_type, shape=array.shape)


def decode_tensor(tensor: tensor_pb2.Tensor, where: str) -> npt.NDArray[Any]:
    """The array of a wire tensor; read-only and sharing memory with the message for `data`.

    Args:
        tensor: The message.
        where: Path of the field, for the error.

    Raises:
        InvalidArgumentError: No elements arm, no dtype, or bytes that do not fill the shape.
    """
    arm = tensor.WhichOneof("elements")
    if arm is None:
        raise invalid_field(where, 'has no elements; set one of "data", "floats" or "ints".')
    if arm == "data":
        dtype = _NUMPY_TYPES.get(tensor.dtype)
        if dtype is None:
            raise invalid_field(
                where, f"has data of dtype {tensor.dtype}; set dtype to one of {', '.join(_NAMES.values())}."
            )
        data = tensor.data  # Once: each look at the field makes its bytes anew.
        if len(data) % dtype.itemsize:
            raise invalid_field(where, f"has {len(data)} bytes, which is no whole number of {dtype.name} elements.")
        flat = np.frombuffer(data, dtype=dtype)
    else:
        natural = tensor_pb2.DATA_TYPE_FLOAT32 if arm == "floats" else tensor_pb2.DATA_TYPE_INT64
        if tensor.dtype not in (tensor_pb2.DATA_TYPE_UNSPECIFIED, natural):
            got = _NAMES.get(tensor.dtype, str(tensor.dtype))
            raise invalid_field(where, f'has "{arm}", which are {_NAMES[natural]}, but dtype says {got}.')
        values = tensor.floats.values if arm == "floats" else tensor.ints.values
        flat = np.array(values, dtype=_NUMPY_TYPES[natural])
    if not tensor.shape:
        return flat
    if len(tensor.shape) > _MAX_DIMS:
        raise invalid_field(where, f"has a shape of {len(tensor.shape)} dims; there may be at most {_MAX_DIMS}.")
    shape = tuple(tensor.shape)
    # numpy would take one -1, and refuses what passes its own limits though it holds nothing.
    if min(shape) >= 0 and math.prod(shape) == flat.size:
        with contextlib.suppress(ValueError):
            return flat.reshape(shape)
    raise invalid_field(where, f"has {flat.size} elements, which do not fill shape {list(shape)}.")


def tensor_parts(array: npt.NDArray[Any]) -> Parts:
    """As tensor_message, encoded, sharing memory with the array."""
    wire_type = _WIRE_TYPES[array.dtype.newbyteorder("<")]
    little = np.ascontiguousarray(array, dtype=_NUMPY_TYPES[wire_type])
    about = tensor_pb2.Tensor(dtype=wire_type, shape=array.shape).SerializeToString()
    return [*embed(_DATA, little.reshape(-1).view(np.uint8).data), about]


def batch_parts(batch: Batch) -> Parts:
    """The batch as programs send it: an encoded DatumBatch, sharing memory with the arrays."""
    parts = embed(_TOKENS, *tensor_parts(batch.tokens_T)) + embed(_CU_SEQLENS, *tensor_parts(batch.cu_seqlens))
    for name, array in batch.loss_fn_inputs.items():
        value = embed(_MAP_VALUE, *tensor_parts(array))
        parts += embed(_LOSS_FN_INPUTS, *embed(_MAP_KEY, name.encode()), *value)
    return [*parts, datum_pb2.DatumBatch(first_datum_index=batch.first_datum_index).SerializeToString()]


def batch_message(batch: Batch) -> datum_pb2.DatumBatch:
    """As batch_parts, as a message."""
    return datum_pb2.DatumBatch.FromString(b"".join(batch_parts(batch)))


def decode_batch(data: Sequence[datum_pb2.Datum], batch: datum_pb2.DatumBatch | None) -> Batch:
    """The batch of a request's two forms.

    Args:
        data: The hand-typed form; empty if the other is used.
        batch: The programs' form; None if absent.

    Raises:
        InvalidArgumentError: Neither or both forms, an empty sequence, lengths or dtypes that do not fit.
    """
    if data and batch is not None:
        raise invalid_field("data", "and batch are both set; send one of them.")
    if batch is None:
        return batch_from_arrays(
            (
                (
                    np.array(datum.model_input.tokens, dtype=np.int64),
                    {
                        name: decode_tensor(tensor, input_path(number, name))
                        for name, tensor in datum.loss_fn_inputs.items()
                    },
                )
                for number, datum in enumerate(data)
            ),
            typed_by_hand=True,
        )
    return _decode_columns(batch)


def _decode_columns(batch: datum_pb2.DatumBatch) -> Batch:
    tokens_T = _as_dtype(decode_tensor(batch.tokens, "batch.tokens"), np.dtype(np.int32), "batch.tokens")
    if tokens_T.ndim != 1:
        raise invalid_field("batch.tokens", f"has shape {list(tokens_T.shape)}; it must have one dim.")
    cu_seqlens = _as_dtype(decode_tensor(batch.cu_seqlens, "batch.cu_seqlens"), np.dtype(np.int64), "batch.cu_seqlens")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise invalid_field("data", "is empty; send at least one datum.")
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != len(tokens_T) or np.any(np.diff(cu_seqlens) < 0):
        raise invalid_field(
            "batch.cu_seqlens", f"must rise from 0 to the number of tokens, {len(tokens_T)}, without falling."
        )
    empty = np.flatnonzero(np.diff(cu_seqlens) == 0)
    if len(empty):
        number = batch.first_datum_index + int(empty[0])
        raise invalid_field(f"data[{number}].model_input", "has no tokens; a datum needs at least one.")
    inputs: dict[str, npt.NDArray[Any]] = {}
    for name, tensor in batch.loss_fn_inputs.items():
        where = f'batch.loss_fn_inputs["{name}"]'
        array = decode_tensor(tensor, where)
        if array.ndim not in (1, 2) or len(array) != len(tokens_T):
            raise invalid_field(
                where, f"has shape {list(array.shape)}, but there are {len(tokens_T)} tokens; they must match."
            )
        inputs[name] = _as_dtype(array, _input_dtype(name), where)
    return Batch(
        tokens_T=tokens_T,
        cu_seqlens=cu_seqlens,
        loss_fn_inputs=inputs,
        first_datum_index=batch.first_datum_index,
    )


@dataclass(frozen=True)
class DatumColumns:
    """Data that were checked and are not joined yet.

    Attributes:
        tokens_T: Token ids, int32.
        cu_seqlens: int64 [N + 1].
        columns: By name, an array a datum.
        typed_by_hand: See Batch.
    """

    tokens_T: npt.NDArray[np.int32]
    cu_seqlens: npt.NDArray[np.int64]
    columns: Mapping[str, list[npt.NDArray[Any]]]
    typed_by_hand: bool = False

    def batch(self, start: int, stop: int) -> Batch:
        """Datums start to stop."""
        lo, hi = int(self.cu_seqlens[start]), int(self.cu_seqlens[stop])
        return Batch(
            tokens_T=self.tokens_T[lo:hi],
            cu_seqlens=self.cu_seqlens[start : stop + 1] - lo,
            loss_fn_inputs={name: np.concatenate(column[start:stop]) for name, column in self.columns.items()},
            typed_by_hand=self.typed_by_hand,
            first_datum_index=start,
        )

    def row_bytes(self) -> int:
        """Bytes of a token with its inputs."""
        return self.tokens_T.itemsize + sum(column[0][:1].nbytes for column in self.columns.values())

    def bounds(self, target_bytes: int) -> list[tuple[int, int]]:
        """Where to cut the data between datums into pieces of about target_bytes."""
        size_bytes = len(self.tokens_T) * self.row_bytes() + self.cu_seqlens.nbytes
        return _bounds(self.cu_seqlens, size_bytes, target_bytes)


def batch_from_data(data: Iterable[Any]) -> Batch:
    """As columns_from_data, joined."""
    columns = columns_from_data(data)
    return columns.batch(0, len(columns.cu_seqlens) - 1)


def columns_from_data(data: Iterable[Any]) -> DatumColumns:
    """Users' datums: ours, tinker's, or anything with `.model_input` and `.loss_fn_inputs`.

    Raises:
        InvalidArgumentError: Naming the datum and input that does not fit.
    """

    if not isinstance(data, Iterable):
        raise invalid_field("data", f"is a {type(data).__name__}; it must be a list of datums.")

    def arrays() -> Iterable[tuple[npt.NDArray[np.int64], dict[str, npt.NDArray[Any]]]]:
        for number, datum in enumerate(data):
            where = f"data[{number}]"
            if not hasattr(datum, "model_input") or not hasattr(datum, "loss_fn_inputs"):
                raise invalid_field(
                    where, f"is a {type(datum).__name__}; it must have model_input and loss_fn_inputs, as Datum has."
                )
            try:
                tokens = model_input_tokens(datum.model_input, f"{where}.model_input")
            except (TypeError, ValueError) as exc:
                raise invalid_field(f"{where}.model_input", f"cannot be read: {exc}") from exc
            inputs: dict[str, npt.NDArray[Any]] = {}
            for name, value in check_loss_fn_inputs(f"{where}.loss_fn_inputs", datum.loss_fn_inputs).items():
                try:
                    inputs[name] = value.to_numpy() if isinstance(value, TensorData) else to_array(value)
                except (TypeError, ValueError) as exc:
                    raise invalid_field(input_path(number, name), f"cannot be read: {exc}") from exc
            yield tokens, inputs

    return _columns_from_arrays(arrays())


def batch_from_arrays(
    arrays: Iterable[tuple[npt.NDArray[np.int64], Mapping[str, npt.NDArray[Any]]]], *, typed_by_hand: bool = False
) -> Batch:
    """Joins (token ids, loss inputs) pairs, one a datum.

    Raises:
        InvalidArgumentError: As columns_from_data.
    """
    columns = _columns_from_arrays(arrays, typed_by_hand=typed_by_hand)
    return columns.batch(0, len(columns.cu_seqlens) - 1)


def _columns_from_arrays(
    arrays: Iterable[tuple[npt.NDArray[np.int64], Mapping[str, npt.NDArray[Any]]]], *, typed_by_hand: bool = False
) -> DatumColumns:
    """Checks (token ids, loss inputs) pairs, one a datum.

    Raises:
        InvalidArgumentError: No datum, an empty one, missing target_tokens, lengths or dtypes that do not fit.
    """
    tokens_list: list[npt.NDArray[np.int64]] = []
    columns: dict[str, list[npt.NDArray[Any]]] = {}
    for number, (tokens, inputs) in enumerate(arrays):
        if len(tokens) == 0:
            raise invalid_field(f"data[{number}].model_input", "has no tokens; a datum needs at least one.")
        targets = inputs.get("target_tokens")
        if targets is None:
            raise invalid_field(
                input_path(number, "target_tokens"),
                "is missing; every datum needs the token to predict at each position.",
            )
        if number and inputs.keys() != columns.keys():
            name = sorted(inputs.keys() ^ columns.keys())[0]
            has, lacks = (number, 0) if name in inputs else (0, number)
            raise invalid_field(
                input_path(lacks, name), f"is missing, but data[{has}] has it; give every datum the same inputs."
            )
        for name, array in inputs.items():
            where = input_path(number, name)
            if len(targets) != len(tokens):
                raise invalid_field(
                    input_path(number, "target_tokens"),
                    f"has {len(targets)} values, but model_input has {len(tokens)} tokens; they must match token for "
                    "token.",
                )
            if array.ndim not in (1, 2) or len(array) != len(targets):
                count = len(array) if array.ndim else 1
                raise invalid_field(
                    where, f"has {count} values, but target_tokens has {len(targets)}; they must match token for token."
                )
            column = columns.setdefault(name, [])
            if column and column[0].shape[1:] != array.shape[1:]:
                raise invalid_field(
                    where,
                    f"has shape {list(array.shape)}, but in data[0] the shape is {list(column[0].shape)}; all datums "
                    "of a call must have the same number of values a token.",
                )
            column.append(_as_dtype(array, _input_dtype(name), where))
        tokens_list.append(tokens)
    if not tokens_list:
        raise invalid_field("data", "is empty; send at least one datum.")
    cu_seqlens = np.zeros(len(tokens_list) + 1, dtype=np.int64)
    np.cumsum([len(tokens) for tokens in tokens_list], out=cu_seqlens[1:])
    return DatumColumns(_joined_tokens(tokens_list, cu_seqlens), cu_seqlens, columns, typed_by_hand)


def input_path(number: int, name: str) -> str:
    """Path of a datum's loss input, as the caller wrote it."""
    return f'data[{number}].loss_fn_inputs["{name}"]'


def split(batch: Batch, target_bytes: int) -> list[Batch]:
    """Cuts a batch at datum boundaries into pieces of about target_bytes; a larger datum is a piece of its own."""
    bounds = _bounds(batch.cu_seqlens, batch.size_bytes(), target_bytes)
    return [batch.sequences(start, stop) for start, stop in bounds]


def _bounds(cu_seqlens: npt.NDArray[np.int64], size_bytes: int, target_bytes: int) -> list[tuple[int, int]]:
    row_bytes = size_bytes / max(1, int(cu_seqlens[-1]))
    target_tokens = max(1, int(target_bytes / row_bytes))
    bounds: list[tuple[int, int]] = []
    start, count = 0, len(cu_seqlens) - 1
    while start < count:
        limit = cu_seqlens[start] + target_tokens
        stop = max(start + 1, int(np.searchsorted(cu_seqlens, limit, side="right")) - 1)
        bounds.append((start, stop))
        start = stop
    return bounds


def _joined_tokens(
    tokens_list: list[npt.NDArray[np.int64]], cu_seqlens: npt.NDArray[np.int64]
) -> npt.NDArray[np.int32]:
    """Token ids end to end, a piece at a time: joined as int64 they would be three times through memory.

    Raises:
        InvalidArgumentError: One is no token id.
    """
    tokens_T = np.empty(cu_seqlens[-1], dtype=np.int32)
    limits = np.iinfo(np.int32)
    start = 0
    while start < len(tokens_list):
        stop = max(start + 1, int(np.searchsorted(cu_seqlens, cu_seqlens[start] + _JOINED_TOKENS, side="right")) - 1)
        piece = tokens_list[start] if stop == start + 1 else np.concatenate(tokens_list[start:stop])
        if piece.min() < limits.min or piece.max() > limits.max:
            _name_no_token_id(tokens_list)
        tokens_T[cu_seqlens[start] : cu_seqlens[stop]] = piece
        start = stop
    return tokens_T


def _name_no_token_id(tokens_list: list[npt.NDArray[np.int64]]) -> None:
    limits = np.iinfo(np.int32)
    for number, tokens in enumerate(tokens_list):
        for place, token in enumerate(tokens.tolist()):
            if not limits.min <= token <= limits.max:
                raise invalid_field(f"data[{number}].model_input.tokens[{place}]", f"is {token}, which is no token id.")


def _input_dtype(name: str) -> np.dtype[Any]:
    return np.dtype(np.int64) if name == "target_tokens" else np.dtype(np.float32)


def _as_dtype(array: npt.NDArray[Any], wanted: np.dtype[Any], where: str) -> npt.NDArray[Any]:
    """`array` in the dtype the contract names; integers may widen to float32, floats never become token ids."""
    if array.dtype == wanted:
        return array
    if array.dtype.kind not in "iubf" or (wanted.kind == "i" and array.dtype.kind == "f"):
        raise invalid_field(where, f"has dtype {array.dtype}; it must be {wanted}.")
    return check_array(where, array, "float32" if wanted.kind == "f" else "int64").astype(wanted, copy=False)
