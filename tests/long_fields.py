"""Messages with more in one field than is taken: every string, list and map of a service's requests in turn."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from tests.frames import TIMEOUT_S, TRAINER, methods

Unit = Literal["bytes", "entries"]
Size = Callable[[FieldDescriptor, Unit], int]
"""How long a field is to be: bytes of a string, entries of a list or map; a map's keys are a field of their own, and of
a list of strings both are asked."""


def map_entry(field: FieldDescriptor) -> Descriptor | None:
    """The entries' type, of a field that is a map."""
    of = field.message_type
    return of if of is not None and of.GetOptions().map_entry else None


def long_fields(
    descriptor: Descriptor, size: Size, *, path: str = ""
) -> Iterator[tuple[str, FieldDescriptor, Message]]:
    """One message for every string, list and map of a type, filled there and nearly empty elsewhere.

    Args:
        descriptor: The message's type.
        size: How much the field gets.
        path: Of the message in the one it is of.

    Yields:
        The field's path, the field, the message.
    """
    for field in descriptor.fields:
        name = f"{path}{field.name}"
        if (entry := map_entry(field)) is not None:
            key, value = entry.fields_by_name["key"], entry.fields_by_name["value"]
            yield name, field, _with_map(descriptor, field, [f"k{number}" for number in range(size(field, "entries"))])
            yield f"{name} key", key, _with_map(descriptor, field, ["k" * size(key, "bytes")])
            if value.message_type is not None:
                for where, inner, filled in long_fields(value.message_type, size, path=f"{name} value."):
                    yield where, inner, _with_map(descriptor, field, ["k"], filled)
            elif value.cpp_type == FieldDescriptor.CPPTYPE_STRING:
                yield f"{name} value", value, _with_map(descriptor, field, ["k"], "s" * size(value, "bytes"))
        elif field.is_repeated:
            made = message_factory.GetMessageClass(descriptor)()
            values = getattr(made, field.name)
            if field.message_type is None:
                text = field.cpp_type == FieldDescriptor.CPPTYPE_STRING
                values.extend(["s" if text else 1] * size(field, "entries"))
                yield name, field, made
                if text:
                    one = message_factory.GetMessageClass(descriptor)()
                    getattr(one, field.name).append("s" * size(field, "bytes"))
                    yield f"{name} one", field, one
                continue
            empty = message_factory.GetMessageClass(field.message_type)()
            values.extend([empty] * size(field, "entries"))
            yield name, field, made
            for where, inner, filled in long_fields(field.message_type, size, path=f"{name}[0]."):
                outer = message_factory.GetMessageClass(descriptor)()
                getattr(outer, field.name).append(filled)
                yield where, inner, outer
        elif field.message_type is not None:
            for where, inner, filled in long_fields(field.message_type, size, path=f"{name}."):
                outer = message_factory.GetMessageClass(descriptor)()
                getattr(outer, field.name).CopyFrom(filled)
                yield where, inner, outer
        elif field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
            made = message_factory.GetMessageClass(descriptor)()
            letter: Any = b"s" if field.type == FieldDescriptor.TYPE_BYTES else "s"
            setattr(made, field.name, letter * size(field, "bytes"))
            yield name, field, made


def _with_map(descriptor: Descriptor, field: FieldDescriptor, keys: list[str], value: Any = None) -> Message:
    made = message_factory.GetMessageClass(descriptor)()
    entries: Any = getattr(made, field.name)
    assert field.message_type is not None
    kind = field.message_type.fields_by_name["value"]
    for key in keys:
        if kind.message_type is None:
            entries[key] = (value or "") if kind.cpp_type == FieldDescriptor.CPPTYPE_STRING else 1
        elif value is None:
            entries[key].SetInParent()
        else:
            entries[key].CopyFrom(value)
    return made


@dataclass(frozen=True)
class Answer:
    """What came of one message."""

    method: str
    field: str
    size_bytes: int
    status: str
    took_s: float


def send_long_fields(
    address: str, size_bytes: int, *, run_id: str, files: Iterable[Any] = TRAINER, api_key: str = ""
) -> Iterator[Answer]:
    """Sends every unary call of the files' services once for each of its fields, with that field so large.

    Args:
        address: host:port of a server.
        size_bytes: Of a string; a list gets entries of about so many bytes.
        run_id: Of a run that is there.
        files: Whose services it serves.
        api_key: That opens it.

    Raises:
        AssertionError: A call hung, or was answered INTERNAL or UNKNOWN.
    """

    def size(field: FieldDescriptor, unit: Unit) -> int:
        # Entries cost a reader far more than their bytes; 16 stand for what it makes of one.
        return size_bytes if unit == "bytes" else size_bytes // 16

    metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
    with grpc.insecure_channel(address) as channel:
        for path, method in methods(files).items():
            for where, _, message in () if method.client_streaming else long_fields(method.input_type, size):
                if "run_id" in message.DESCRIPTOR.fields_by_name and where != "run_id":
                    message.run_id = run_id  # pyright: ignore[reportAttributeAccessIssue]
                encoded = message.SerializeToString()
                start_s = time.monotonic()
                status = _status(channel, path, method.server_streaming, encoded, metadata)
                took_s = time.monotonic() - start_s
                assert not status.startswith(("INTERNAL", "UNKNOWN", "DEADLINE")), f"{path} {where}: {status}"
                yield Answer(method.name, where, len(encoded), status, took_s)


def _status(channel: grpc.Channel, path: str, streams: bool, encoded: bytes, metadata: Any) -> str:
    try:
        if streams:
            for _ in channel.unary_stream(path)(encoded, timeout=TIMEOUT_S, metadata=metadata):
                pass
        else:
            channel.unary_unary(path)(encoded, timeout=TIMEOUT_S, metadata=metadata)
    except grpc.RpcError as exc:
        answered: Any = exc
        return f"{answered.code().name}: {answered.details()[:200]}"
    return "OK"
