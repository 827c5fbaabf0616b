"""From a call's arguments to the messages it sends."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from google.protobuf.message import Message

from gradwire._wire.codec import Batch, batch_parts, tensor_parts
from gradwire._wire.wire_format import Parts, embed
from gradwire.errors import invalid_field
from gradwire.types import AdamParams
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.trainer_service_pb2 import TrainRequest


def dtype_name(dtype: Any) -> str:
    """ "bfloat16" for that or torch.bfloat16; "" for None."""
    return "" if dtype is None else str(dtype).removeprefix("torch.")


def adam_params_of(given: Any) -> AdamParams:
    """AdamParams of whatever has some of its attributes; those that are missing or None take their defaults.

    Raises:
        InvalidArgumentError: It has none of them, or one that AdamParams does not take.
    """
    names = AdamParams.__dataclass_fields__
    found = {name: value for name in names if (value := getattr(given, name, None)) is not None}
    if given is not None and not found:
        raise invalid_field("optim_params", f"is a {type(given).__name__}; it must have {', '.join(names)}.")
    return AdamParams(**found)


def batch_content(kind: str, settings: Message, batch: Batch) -> Parts:
    return _encoded(kind, settings, batch=batch_parts(batch))


def backward_content(forward_seq_id: int, gradients_T: np.ndarray, metrics: Mapping[str, float] | None = None) -> Parts:
    """A backward as a field of TrainRequest, sharing memory with the gradients; `metrics` are for the run's curves."""
    settings = ops.BackwardRequest(forward_seq_id=forward_seq_id, metrics=metrics)
    return _encoded("backward", settings, gradients=tensor_parts(gradients_T))


def _encoded(kind: str, settings: Message, **large: Parts) -> Parts:
    """An operation as a field of TrainRequest: its settings, and the fields that are large by name."""
    content: Parts = [settings.SerializeToString()]
    for name, parts in large.items():
        content += embed(settings.DESCRIPTOR.fields_by_name[name].number, *parts)
    return embed(TrainRequest.DESCRIPTOR.fields_by_name[kind].number, *content)
