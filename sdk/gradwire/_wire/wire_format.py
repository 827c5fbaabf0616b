"""Encoded protobuf messages, looked at without taking them apart and put together without copying what is large.

Parsing a large message costs next to nothing, but every message that a tensor is set in, and that one set in another,
copies it once more. Here the large parts stay where they are until one join makes the bytes that are sent. Used by both
sides.
"""

from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

Parts = list[bytes | memoryview]
"""An encoded message in pieces, to be joined; a memoryview is over single bytes."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_LARGE_BYTES = 4096
"""Contents from which on it pays to look inside a field."""


def fields(encoded: memoryview) -> Iterator[tuple[int, memoryview, memoryview]]:
    """The fields of a message that is known to be valid.

    Yields:
        Number, the whole field with its tag, and the content of a length-delimited one (else empty).

    Raises:
        ValueError: A group, which proto3 has not; only unknown fields can be one. Or what no valid message has: a
            number without an end, a content that is cut off.
    """
    place = 0
    while place < len(encoded):
        start = place
        tag, place = _varint(encoded, place)
        wire_type = tag & 7
        content = encoded[:0]
        if wire_type == _BYTES:
            size, place = _varint(encoded, place)
            content = encoded[place : place + size]
            if len(content) < size:
                raise ValueError(f"a field at byte {start} that ends behind its message")
            place += size
        elif wire_type == _VARINT:
            _, place = _varint(encoded, place)
        elif wire_type == _FIXED64:
            place += 8
        elif wire_type == _FIXED32:
            place += 4
        else:
            raise ValueError(f"wire type {wire_type} at byte {start}")
        yield tag >> 3, encoded[start:place], content


def embed(number: int, *content: bytes | memoryview) -> Parts:
    """An encoded message, or anything else length-delimited, as field `number` of another."""
    return [_encode_varint(number << 3 | _BYTES) + _encode_varint(sum(map(len, content))), *content]


def outline(encoded: memoryview, descriptor: Any) -> bytes:
    """A message without the content of its large `bytes` fields, such as what tensors hold: those are set, and empty.
    It can be parsed exactly if the message can, without a copy of what is large.

    Args:
        encoded: The message.
        descriptor: Of its type.

    Raises:
        ValueError, IndexError: As `fields`; or a large field that is encoded as no program does.
    """
    parts: Parts = []
    for number, whole, content in fields(encoded):
        field = descriptor.fields_by_number.get(number) if len(content) >= _LARGE_BYTES else None
        nested = field.message_type if field is not None else None
        if nested is None and (field is None or field.type != FieldDescriptor.TYPE_BYTES):
            parts.append(whole)
            continue
        if whole[: len(whole) - len(content)] != embed(number, content)[0]:
            # Such as a length of more bytes than it needs, which not every parser takes.
            raise ValueError(f"a tag or length of field {number} that is longer than it needs to be")
        parts += embed(number) if nested is None else embed(number, outline(content, nested))
    return b"".join(parts)


def _varint(encoded: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = encoded[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
        if shift > 63:
            raise ValueError(f"a number of more than ten bytes before byte {place}")


def _encode_varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
