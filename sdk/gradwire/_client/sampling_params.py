"""SamplingParams on their way to the wire: types and ranges are checked, and the argument is named."""

import math
import numbers
import operator
from typing import Any

from gradwire.errors import invalid_field
from gradwire.v1 import sampling_service_pb2 as pb

MAX_UINT32 = (1 << 32) - 1
_MAX_INT32, _MAX_INT64 = (1 << 31) - 1, (1 << 63) - 1
_MAX_SHOWN = 200


def sampling_params_message(params: Any) -> pb.SamplingParams:
    """SamplingParams, ours or tinker's, for the wire.

    Raises:
        InvalidArgumentError: INVALID_FIELD: a value of another type or out of range. What depends on the model, such as
            which token ids there are, the trainer checks.
    """
    encoded = pb.SamplingParams()
    for name, lowest, highest in (
        ("max_tokens", 0, MAX_UINT32),
        ("seed", -_MAX_INT64 - 1, _MAX_INT64),
        ("top_k", -1, _MAX_INT32),
    ):
        value = getattr(params, name, None)
        if value is not None:
            setattr(encoded, name, checked_integer(f"sampling_params.{name}", value, lowest, highest))
    temperature, top_p = getattr(params, "temperature", None), getattr(params, "top_p", None)
    if temperature is not None:
        allowed = "a finite number from 0, which takes the likeliest token"
        encoded.temperature = _number("sampling_params.temperature", temperature, allowed)
        if not (math.isfinite(encoded.temperature) and encoded.temperature >= 0):
            raise _wrong("sampling_params.temperature", temperature, allowed)
    if top_p is not None:
        allowed = "a number above 0 and at most 1, which is off"
        encoded.top_p = _number("sampling_params.top_p", top_p, allowed)
        if not 0 < encoded.top_p <= 1:
            raise _wrong("sampling_params.top_p", top_p, allowed)
    stop = getattr(params, "stop", None)
    if stop is not None:
        encoded.stop.CopyFrom(_stop_message(stop))
    return encoded


def checked_integer(where: str, value: Any, lowest: int, highest: int) -> int:
    """An integer of Python, numpy or torch within a range.

    Raises:
        InvalidArgumentError: INVALID_FIELD: it is something else. True and False are something else, too.
    """
    allowed = f"an integer from {lowest} to {highest}"
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not lowest <= number <= highest:
        raise _wrong(where, value, allowed)
    return number


def shown(value: Any) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def _number(where: str, value: Any, allowed: str) -> float:
    # torch's scalars are no numbers.Real, and have item().
    item = getattr(value, "item", None)
    plain = item() if item is not None and getattr(value, "shape", None) == () else value
    if isinstance(plain, bool) or not isinstance(plain, numbers.Real):
        raise _wrong(where, value, allowed)
    try:
        return float(plain)
    except OverflowError:
        raise _wrong(where, value, allowed) from None


def _stop_message(stop: Any) -> pb.Stop:
    allowed = "a text, a list of texts, a list of token ids, or None for the model's own"
    if isinstance(stop, str):
        entries = [stop]
    elif isinstance(stop, bytes | bytearray | dict):
        raise _wrong("sampling_params.stop", stop, allowed)
    else:
        try:
            entries = list(stop)
        except TypeError:
            raise _wrong("sampling_params.stop", stop, allowed) from None
    if all(isinstance(entry, str) for entry in entries):
        if "" in entries:
            raise _wrong("sampling_params.stop", stop, "texts that are not empty, since every text holds an empty one")
        return pb.Stop(strings=entries)
    if any(isinstance(entry, str) for entry in entries):
        raise _wrong("sampling_params.stop", stop, allowed)
    return pb.Stop(
        token_ids=[
            checked_integer(f"sampling_params.stop[{place}]", entry, 0, _MAX_INT32)
            for place, entry in enumerate(entries)
        ]
    )


def _wrong(where: str, value: Any, allowed: str) -> Exception:
    return invalid_field(where, f"is {shown(value)}; it must be {allowed}.")
