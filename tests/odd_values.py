"""Good messages with one value in them that is odd: zero, empty, huge, negative, not finite, absent, one too many."""

from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

_FLOATS = (0.0, -1.0, 1e-45, 3.4e38, float("nan"), float("inf"), float("-inf"))
_VALUES: dict[int, tuple[Any, ...]] = {
    FieldDescriptor.CPPTYPE_BOOL: (False, True),
    FieldDescriptor.CPPTYPE_FLOAT: _FLOATS,
    FieldDescriptor.CPPTYPE_DOUBLE: (*_FLOATS, 1 - 2**-53, 5e-324, 1e39, -1e300),
    FieldDescriptor.CPPTYPE_ENUM: (0, 77, -1),
    FieldDescriptor.CPPTYPE_INT32: (0, -1, 2**31 - 1, -(2**31)),
    FieldDescriptor.CPPTYPE_INT64: (0, -1, 2**31, 2**63 - 1, -(2**63)),
    FieldDescriptor.CPPTYPE_UINT32: (0, 1, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 1, 2**63, 2**64 - 1),
    FieldDescriptor.CPPTYPE_STRING: ("", "-", "\0", "..", "a/b", "a\nb", "é" * 3000, "gradwire://run-1/state/none"),
}
_BYTES = (b"", b"\xff", b"\0" * 64)
_MANY = 70
"""More than anything has dims."""


def odd(message: Any) -> Iterator[tuple[str, Any]]:
    """Copies of a message, each with one thing changed, and what that is."""
    for field in message.DESCRIPTOR.fields:
        for what, change in _changes(message, field):
            changed = type(message)()
            changed.CopyFrom(message)
            change(changed)
            yield f"{field.name}{what}", changed


def _changes(message: Any, field: Any) -> Iterator[tuple[str, Any]]:
    name = field.name
    value = getattr(message, name)
    yield " absent", lambda made: made.ClearField(name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        of = field.message_type.fields_by_name["value"]
        for key in list(value):
            yield f"[{key!r}] absent", lambda made, key=key: getattr(made, name).pop(key)
            if of.message_type is not None:
                for what, inner in odd(value[key]):
                    yield (
                        f"[{key!r}].{what}",
                        lambda made, key=key, inner=inner: getattr(made, name)[key].CopyFrom(inner),
                    )
            else:
                for each in _scalars(of):
                    yield (
                        f"[{key!r}] = {each!r}",
                        lambda made, key=key, each=each: getattr(made, name).update({key: each}),
                    )
        for key in _VALUES[FieldDescriptor.CPPTYPE_STRING]:
            if of.message_type is not None:
                yield f"[{key!r:.20}] there", lambda made, key=key: getattr(made, name)[key].SetInParent()
            else:
                some = "a" if of.cpp_type == FieldDescriptor.CPPTYPE_STRING else 1
                yield (
                    f"[{key!r:.20}] = {some!r}",
                    lambda made, key=key, some=some: getattr(made, name).update({key: some}),
                )
    elif hasattr(value, "append") or hasattr(value, "add"):
        if field.message_type is not None:
            for index, item in enumerate(value):
                for what, inner in odd(item):
                    yield (
                        f"[{index}].{what}",
                        lambda made, index=index, inner=inner: getattr(made, name)[index].CopyFrom(inner),
                    )
            yield " and an empty one", lambda made: getattr(made, name).add()
        else:
            for each in _scalars(field):
                yield f" and {each!r:.20}", lambda made, each=each: getattr(made, name).append(each)
                yield (
                    f" = [{each!r:.20}]",
                    lambda made, each=each: (made.ClearField(name), getattr(made, name).append(each)),
                )
            each = "a" if field.cpp_type == FieldDescriptor.CPPTYPE_STRING else 1
            yield (
                f" = {_MANY} times {each!r}",
                lambda made, each=each: (
                    made.ClearField(name),
                    getattr(made, name).extend([each] * _MANY),
                ),
            )
    elif field.message_type is not None:
        yield " empty", lambda made: (made.ClearField(name), getattr(made, name).SetInParent())
        if message.HasField(name):
            for what, inner in odd(value):
                yield f".{what}", lambda made, inner=inner: getattr(made, name).CopyFrom(inner)
    else:
        for each in _scalars(field):
            yield f" = {each!r:.20}", lambda made, each=each: setattr(made, name, each)


def _scalars(field: Any) -> tuple[Any, ...]:
    return _BYTES if field.type == FieldDescriptor.TYPE_BYTES else _VALUES[field.cpp_type]
