"""Bounds every string and repeated field that clients send, each by one of Limits. Ground floor.

The size of a whole message is bounded in rpc/bounded_messages.py, the tokens of a batch in engine/validation.py.

A message is checked before anything else is done with it, so that no client's field costs the others time. The error
names the field's path, what it has, and the limit.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from gradwire._wire.wire_format import fields
from gradwire.errors import GradwireError, error, invalid_field

from trainer_service.config import Limits

MAX_TTL_SECONDS = 10 * 365 * 24 * 3600
"""Longest time to live of a checkpoint that is not kept for ever."""
_NAME = "max_name_bytes"
MAX_LEASE_MS = 600_000
"""How long frozen weights may take memory after their client is gone."""

LIMIT_OF: Mapping[str, str] = {
    "AttachRequest.client_id": _NAME,
    "AttachRequest.run_id": _NAME,
    "BackwardRequest.metrics": "max_metrics",
    "BackwardRequest.MetricsEntry.key": _NAME,
    "BackwardRequest.run_id": _NAME,
    "CancelRequest.forward_seq_ids": "max_forward_seq_ids",
    "CancelRequest.run_id": _NAME,
    "ComputeLogprobsRequest.prompt_text": "max_prompt_text_bytes",
    "CreateRunRequest.adapter_path": _NAME,
    "CreateRunRequest.base_model": _NAME,
    "CreateRunRequest.display_name": _NAME,
    "CreateRunRequest.request_id": _NAME,
    "CreateRunRequest.user_metadata": "max_user_metadata_entries",
    "CreateRunRequest.UserMetadataEntry.key": _NAME,
    "CreateRunRequest.UserMetadataEntry.value": _NAME,
    "Datum.loss_fn_inputs": "max_loss_fn_inputs",
    "Datum.LossFnInputsEntry.key": _NAME,
    "DatumBatch.loss_fn_inputs": "max_loss_fn_inputs",
    "DatumBatch.LossFnInputsEntry.key": _NAME,
    "DeleteCheckpointRequest.path": _NAME,
    "DeleteRunRequest.run_id": _NAME,
    "DownloadCheckpointRequest.file": _NAME,
    "DownloadCheckpointRequest.path": _NAME,
    "DownloadCheckpointRequest.sha256": _NAME,
    "DownloadTokenizerRequest.file": _NAME,
    "FloatValues.values": "max_typed_values",
    "ForkRunRequest.display_name": _NAME,
    "ForkRunRequest.request_id": _NAME,
    "ForkRunRequest.run_id": _NAME,
    "ForwardBackwardRequest.data": "max_typed_datums",
    "ForwardBackwardRequest.loss_fn": _NAME,
    "ForwardBackwardRequest.loss_fn_config": "max_loss_fn_config_keys",
    "ForwardBackwardRequest.LossFnConfigEntry.key": _NAME,
    "ForwardBackwardRequest.run_id": _NAME,
    "ForwardRequest.data": "max_typed_datums",
    "ForwardRequest.loss_fn": _NAME,
    "ForwardRequest.loss_fn_config": "max_loss_fn_config_keys",
    "ForwardRequest.LossFnConfigEntry.key": _NAME,
    "ForwardRequest.run_id": _NAME,
    "GetAnswerRequest.run_id": _NAME,
    "GetCheckpointRequest.path": _NAME,
    "GetMetricsRequest.names": "max_metrics",
    "GetMetricsRequest.run_id": _NAME,
    "GetRunRequest.run_id": _NAME,
    "IntValues.values": "max_typed_values",
    "ListCheckpointsRequest.run_id": _NAME,
    "LoadStateRequest.path": _NAME,
    "LoadStateRequest.run_id": _NAME,
    "ModelInput.tokens": "max_tokens",
    "OptimStepRequest.run_id": _NAME,
    "ReplayRunRequest.run_id": _NAME,
    "Sampler.base_model": _NAME,
    "Sampler.model_path": _NAME,
    "SampleRequest.prompt_text": "max_prompt_text_bytes",
    "SaveStateRequest.name": _NAME,
    "SaveStateRequest.run_id": _NAME,
    "SaveStateRequest.user_metadata": "max_user_metadata_entries",
    "SaveStateRequest.UserMetadataEntry.key": _NAME,
    "SaveStateRequest.UserMetadataEntry.value": _NAME,
    "SaveWeightsForSamplerRequest.dtype": _NAME,
    "SaveWeightsForSamplerRequest.name": _NAME,
    "SaveWeightsForSamplerRequest.run_id": _NAME,
    "SaveWeightsForSamplerRequest.user_metadata": "max_user_metadata_entries",
    "SaveWeightsForSamplerRequest.UserMetadataEntry.key": _NAME,
    "SaveWeightsForSamplerRequest.UserMetadataEntry.value": _NAME,
    "SetCheckpointTtlRequest.path": _NAME,
    "Stop.strings": "max_stop_strings",
    "Stop.token_ids": "max_stop_token_ids",
    "Tensor.data": "max_message_bytes",
    "Tensor.shape": "max_tensor_dims",
    "TrainRequest.traceparent": _NAME,
    "TrainRequest.tracestate": _NAME,
    "ZeroGradRequest.run_id": _NAME,
}
"""From message and field, without the package, to the limit of a string's bytes or of a repeated field's entries. Keys
of a map, and values that are strings, have their own lines."""

_STRINGS_OF: Mapping[str, str] = {"GetMetricsRequest.names": _NAME, "Stop.strings": "max_stop_string_bytes"}
"""Limit of one string of a repeated field."""
_ALL_OF: Mapping[str, str] = {"GetMetricsRequest.names": "max_message_bytes", "Stop.strings": "max_stop_bytes"}
"""Limit of all strings of a repeated field together, bytes."""

_Excess = tuple[str, str, int, str]
"""Path of a field, name of its limit, what it has, the unit."""
_Check = Callable[[Any, Limits, str], Iterator[_Excess]]


def check_limits(message: Message, limits: Limits) -> None:
    """Refuses a message with a field that exceeds its limit.

    Raises:
        ResourceExhaustedError: LIMIT_EXCEEDED, with the field's path.
    """
    if (refusal := find_excess(message, limits)) is not None:
        raise refusal


def find_excess(message: Message, limits: Limits) -> GradwireError | None:
    """LIMIT_EXCEEDED for a message with a field that exceeds its limit; None for any other."""
    for excess in _excesses(message, limits, ""):
        return _refusal(*excess, limits)
    return None


def check_name(name: str, where: str, limits: Limits) -> None:
    """Refuses a name that is too long, where it is used before its message is checked.

    Raises:
        ResourceExhaustedError: LIMIT_EXCEEDED, with the path `where`.
    """
    if (got := _num_bytes(name, limits.max_name_bytes)) > limits.max_name_bytes:
        raise _refusal(where, _NAME, got, "bytes", limits)


def check_num_fields(encoded: bytes, descriptor: Descriptor, limits: Limits) -> None:
    """Refuses an encoded message with too many fields, before parsing it takes too long.

    Args:
        encoded: As received; parsing finds anything else that is wrong with it.
        descriptor: Of its type.
        limits: The most that is accepted.

    Raises:
        ResourceExhaustedError: LIMIT_EXCEEDED.
        InvalidArgumentError: PROTOCOL_VIOLATION: it cannot be counted.
    """
    limit = limits.max_message_fields
    if len(encoded) <= limit:
        return  # A field has at least one byte.
    try:
        left = _left_behind(memoryview(encoded), descriptor, limit)
    except (ValueError, IndexError) as exc:
        text = f"The message ({len(encoded)} bytes) cannot be read: {exc}."
        raise error("PROTOCOL_VIOLATION", text) from exc
    if left < 0:
        text = (
            f"The message has more than {limit} fields, nested ones included, and no more are taken "
            "(max_message_fields of GetServerInfo); send data as batch, or less in one call."
        )
        raise error("LIMIT_EXCEEDED", text, limit_name="max_message_fields", limit=limit, got=f"more than {limit}")


def _left_behind(encoded: memoryview, descriptor: Descriptor, left: int) -> int:
    """How many of `left` fields remain after a message's own; below 0 if it has more."""
    nested = _nested(descriptor)
    for number, _, content in fields(encoded):
        left -= 1
        if left >= 0 and number in nested:
            left = _left_behind(content, nested[number], left)
        if left < 0:
            break
    return left


@cache
def _nested(descriptor: Descriptor) -> Mapping[int, Descriptor]:
    """Types of a message's nested messages, by field number."""
    return {field.number: field.message_type for field in descriptor.fields if field.message_type is not None}


def prompt_too_long(got: int, limit: int) -> GradwireError:
    """SEQUENCE_TOO_LONG for a prompt that does not fit the model's context; both numbers in tokens."""
    return invalid_field(
        "prompt",
        f"has {got} tokens, but this trainer takes at most {limit}; shorten it, or start a trainer with a larger "
        "max_context_length if the model can take it.",
        reason="SEQUENCE_TOO_LONG",
        limit=limit,
        got=got,
    )


def check_lease_ms(lease_ms: int) -> None:
    """Refuses a lease longer than MAX_LEASE_MS.

    Raises:
        InvalidArgumentError: INVALID_FIELD.
    """
    if lease_ms > MAX_LEASE_MS:
        what = f"is {lease_ms}; it must be 0 to {MAX_LEASE_MS}. Ask again to renew it."
        raise invalid_field("lease_ms", what, limit=MAX_LEASE_MS, got=lease_ms)


def check_ttl_seconds(ttl_seconds: int | None) -> None:
    """Refuses a time to live that is out of range; None keeps a checkpoint for ever.

    Raises:
        InvalidArgumentError: INVALID_FIELD.
    """
    if ttl_seconds is not None and not 0 < ttl_seconds <= MAX_TTL_SECONDS:
        raise invalid_field("ttl_seconds", f"is {ttl_seconds}; it must be 1 to {MAX_TTL_SECONDS} (ten years).")


def _refusal(where: str, limit_name: str, got: int, unit: str, limits: Limits) -> GradwireError:
    limit = getattr(limits, limit_name)
    description = f"has {got} {unit}, but at most {limit} are taken ({limit_name} of GetServerInfo)."
    refused = error(
        "LIMIT_EXCEEDED", f"{where} {description}", field=where, limit_name=limit_name, limit=limit, got=got
    )
    refused.field_violations = ((where, description),)
    return refused


def _excesses(message: Message, limits: Limits, prefix: str) -> Iterator[_Excess]:
    for check in _checks(message.DESCRIPTOR):
        yield from check(message, limits, prefix)


@cache
def _checks(descriptor: Descriptor) -> tuple[_Check, ...]:
    """Checks of a message type; types without strings or lists need none."""
    made = []
    for field in descriptor.fields:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            made.append(_check_map(field))
        elif field.is_repeated:
            made.append(_check_list(field))
        elif field.message_type is not None:
            made.append(_check_message(field.name))
        elif field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
            made.append(_check_string(field))
    return tuple(made)


def _limit_of(field: FieldDescriptor, limits: Mapping[str, str] = LIMIT_OF) -> str:
    return limits[field.full_name.removeprefix("gradwire.v1.")]


def _check_string(field: FieldDescriptor) -> _Check:
    name, limit_name = field.name, _limit_of(field)

    def check(message: Any, limits: Limits, prefix: str) -> Iterator[_Excess]:
        got = _num_bytes(getattr(message, name), getattr(limits, limit_name))
        if got > getattr(limits, limit_name):
            yield prefix + name, limit_name, got, "bytes"

    return check


def _check_message(name: str) -> _Check:
    def check(message: Any, limits: Limits, prefix: str) -> Iterator[_Excess]:
        if message.HasField(name):
            yield from _excesses(getattr(message, name), limits, f"{prefix}{name}.")

    return check


def _check_list(field: FieldDescriptor) -> _Check:
    name, limit_name = field.name, _limit_of(field)
    nested = field.message_type is not None
    strings = field.cpp_type == FieldDescriptor.CPPTYPE_STRING
    one, together = (_limit_of(field, of) if strings else "" for of in (_STRINGS_OF, _ALL_OF))

    def check(message: Any, limits: Limits, prefix: str) -> Iterator[_Excess]:
        values = getattr(message, name)
        if len(values) > getattr(limits, limit_name):
            yield prefix + name, limit_name, len(values), "entries"
        elif nested:
            for place, value in enumerate(values):
                yield from _excesses(value, limits, f"{prefix}{name}[{place}].")
        elif strings:
            total = 0
            for place, value in enumerate(values):
                total += (got := _num_bytes(value, getattr(limits, one)))
                if got > getattr(limits, one):
                    yield f"{prefix}{name}[{place}]", one, got, "bytes"
            if total > getattr(limits, together):
                yield prefix + name, together, total, "bytes in all"

    return check


def _check_map(field: FieldDescriptor) -> _Check:
    assert field.message_type is not None
    name, limit_name = field.name, _limit_of(field)
    key_limit = _limit_of(field.message_type.fields_by_name["key"])
    value = field.message_type.fields_by_name["value"]
    nested = value.message_type is not None
    one = _limit_of(value) if value.cpp_type == FieldDescriptor.CPPTYPE_STRING else ""

    def check(message: Any, limits: Limits, prefix: str) -> Iterator[_Excess]:
        entries = getattr(message, name)
        if len(entries) > getattr(limits, limit_name):
            yield prefix + name, limit_name, len(entries), "entries"
            return
        for place, key in enumerate(entries):
            got = _num_bytes(key, getattr(limits, key_limit))
            if got > getattr(limits, key_limit):
                yield f"the key of entry {place} of {prefix}{name}", key_limit, got, "bytes"
            elif one and (got := _num_bytes(entries[key], getattr(limits, one))) > getattr(limits, one):
                yield f'{prefix}{name}["{key}"]', one, got, "bytes"
            elif nested:
                yield from _excesses(entries[key], limits, f'{prefix}{name}["{key}"].')

    return check


def _num_bytes(value: str | bytes, limit: int) -> int:
    """Bytes of a value; for a text with more characters than the limit, its characters, which is enough to know."""
    return len(value) if isinstance(value, bytes) or len(value) > limit else len(value.encode())
