"""Messages with more in one field than is taken: every string, list and map of a service's requests in turn."""

from collections.abc import Callable, Iterator
from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

Size = Callable[[FieldDescriptor], int]
"""How long a field is to be: bytes of a string, entries of a list or map; a map's keys are a field of their own."""


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
            yield name, field, _with_map(descriptor, field, [f"k{number}" for number in range(size(field))])
            yield f"{name} key", key, _with_map(descriptor, field, ["k" * size(key)])
            if value.message_type is not None:
                for where, inner, filled in long_fields(value.message_type, size, path=f"{name} value."):
                    yield where, inner, _with_map(descriptor, field, ["k"], filled)
        elif field.is_repeated:
            made = message_factory.GetMessageClass(descriptor)()
            values = getattr(made, field.name)
            if field.message_type is None:
                text = field.cpp_type == FieldDescriptor.CPPTYPE_STRING
                values.extend(["s" if text else 1] * size(field))
                yield name, field, made
                if text:
                    one = message_factory.GetMessageClass(descriptor)()
                    getattr(one, field.name).append("s" * size(field) * 100)
                    yield f"{name} one", field, one
                continue
            empty = message_factory.GetMessageClass(field.message_type)()
            values.extend([empty] * size(field))
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
            setattr(made, field.name, letter * size(field))
            yield name, field, made


def _with_map(descriptor: Descriptor, field: FieldDescriptor, keys: list[str], value: Message | None = None) -> Message:
    made = message_factory.GetMessageClass(descriptor)()
    entries: Any = getattr(made, field.name)
    nested = field.message_type is not None and field.message_type.fields_by_name["value"].message_type is not None
    for key in keys:
        if not nested:
            entries[key] = 1
        elif value is None:
            entries[key].SetInParent()
        else:
            entries[key].CopyFrom(value)
    return made
