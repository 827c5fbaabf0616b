"""Passes of Fireworks' SDK, whose bodies are JSON, as the protobuf message that tinker's SDK sends for the same."""

from typing import Any

import numpy as np

from trainer_service.gateway.bodies import Fields
from trainer_service.gateway.outcomes import Refusal
from trainer_service.gateway.sample_requests import read_tokens
from trainer_service.gateway.wire import tinker_wire_pb2 as wire

_DTYPES = {
    "float32": (wire.DTYPE_FLOAT32, np.dtype("<f4"), "fiu"),
    "int64": (wire.DTYPE_INT64, np.dtype("<i8"), "i"),
}
"""By name: as the wire numbers it, as numpy writes it, and kinds of numbers that it holds."""


def read_json_pass(fields: Fields, arm: str) -> wire.ForwardBackwardRequest:
    """A forward, or a forward and backward.

    Args:
        fields: Of the body.
        arm: The field that holds data and loss: forward_input or forward_backward_input.

    Raises:
        Refusal: A field is missing, unknown or not allowed.
    """
    request = wire.ForwardBackwardRequest(
        model_id=fields.text("model_id"), seq_id=fields.integer("seq_id"), forward_only=arm == "forward_input"
    )
    fields.ignore("type")
    asked = fields.fields(arm)
    request.loss_fn = asked.text("loss_fn")
    _read_config(asked, request)
    for number, datum in enumerate(asked.items("data")):
        _read_datum(_object(datum, f"data[{number}]"), request.data.add())
    asked.finish()
    fields.finish()
    return request


def _read_config(asked: Fields, request: wire.ForwardBackwardRequest) -> None:
    config = asked.fields("loss_fn_config")
    # Names what the trainer does anyway.
    config.refuse(
        "target_logprob_support",
        "Logprobs here are of the full vocabulary.",
        unless=lambda support: support == "full_vocabulary",
    )
    for name in config.left:
        request.loss_fn_config[name] = config.number(name)
    config.finish()


def _read_datum(datum: Fields, made: wire.Datum) -> None:
    tokens = read_tokens(datum, "model_input")
    made.model_input.add().encoded_text.tokens = np.array(tokens, dtype="<i4").tobytes()
    inputs = datum.fields("loss_fn_inputs")
    for name in inputs.left:
        tensor = inputs.fields(name)
        made.loss_fn_inputs[name].CopyFrom(_read_tensor(tensor))
        tensor.finish()
    inputs.finish()
    datum.finish()


def _read_tensor(tensor: Fields) -> wire.Tensor:
    dtype = _DTYPES.get(tensor.text("dtype"))
    if dtype is None:
        raise tensor.wrong("dtype", f"must be {' or '.join(_DTYPES)}.")
    number, numpy_dtype, kinds = dtype
    data = _numbers(tensor, "data", numpy_dtype, kinds)
    read = wire.Tensor(dtype=number, shape=_numbers(tensor, "shape", np.dtype(np.int64), "i").tolist())
    if not tensor.has("sparse_crow_indices"):
        tensor.drop("sparse_crow_indices")
        read.dense = data.tobytes()
        return read
    read.sparse_csr.values = data.tobytes()
    for name, indices in (("crow_indices", "sparse_crow_indices"), ("col_indices", "sparse_col_indices")):
        setattr(read.sparse_csr, name, _numbers(tensor, indices, np.dtype("<i8"), "i").tobytes())
    return read


def _numbers(tensor: Fields, name: str, dtype: np.dtype[Any], kinds: str) -> np.ndarray[Any, np.dtype[Any]]:
    """A flat list of numbers that `dtype` holds."""
    found = tensor.items(name, [])
    try:
        array = np.asarray(found)
    except (ValueError, OverflowError):
        array = np.asarray(None)
    if found and (array.ndim != 1 or array.dtype.kind not in kinds):
        raise tensor.wrong(name, f"is no list of {dtype.name} numbers.")
    with np.errstate(over="ignore"):
        return array.astype(dtype)


def _object(found: Any, where: str) -> Fields:
    if not isinstance(found, dict):
        raise Refusal(400, f"{where} is no object.")
    return Fields(found, f"{where}.")
