"""One operation as it was received, and the digest that tells it from another. Pure."""

import functools
from dataclasses import dataclass
from typing import Any

import xxhash
from google.protobuf.message import Message
from gradwire._wire.wire_format import fields
from gradwire.errors import GradwireError
from gradwire.v1.datum_pb2 import DatumBatch
from gradwire.v1.trainer_service_pb2 import TrainRequest


@dataclass(frozen=True)
class Operation:
    """An operation to be executed."""

    request: TrainRequest
    """The request, with its seq_id. What large tensors hold may be left out; `encoded` has it."""
    encoded: bytes
    """The request as the client encoded it."""
    memory_bytes: int = 0
    """About the memory that both take; 0 if it is counted elsewhere."""
    refusal: GradwireError | None = None
    """Why it is not executed, if that was known before it got its place in the order."""

    @classmethod
    def made(cls, request: TrainRequest) -> "Operation":
        """An operation made from a message rather than received."""
        return cls(request, request.SerializeToString(deterministic=True))

    @classmethod
    def refused(cls, kind: str, content: Any, refusal: GradwireError, *, seq_id: int = 0) -> "Operation":
        """A stand-in for an operation that is too large to be kept, digested or executed.

        Args:
            kind: Its kind.
            content: Its message; only flags and numbers are kept.
            refusal: What it fails with in its turn; a repeat is recognized by failing with the same.
            seq_id: Its place in the run's order.
        """
        request = TrainRequest(seq_id=seq_id)
        kept: Any = getattr(request, kind)
        kept.SetInParent()
        for field, value in content.ListFields():
            if not field.is_repeated and isinstance(value, bool | int | float):
                setattr(kept, field.name, value)
        return cls(request, request.SerializeToString(deterministic=True), refusal=refusal)

    @property
    def seq_id(self) -> int:
        """Its place in the run's order."""
        return self.request.seq_id

    @property
    def kind(self) -> str:
        """Name of its field in TrainRequest, such as "optim_step"."""
        return self.request.WhichOneof("operation") or ""

    def digest(self) -> bytes:
        """Tells operations apart: over kind and content, not over how or by which call they were sent.

        Large content is hashed as it was encoded, with XXH3, which is as fast as memory. It need not resist attacks:
        the run's owner could only mislead themselves. The entries of maps, which a repeat may encode in another order,
        are sorted first.
        """
        kind = self.kind
        content: Any = getattr(self.request, kind)
        hashed = xxhash.xxh3_128(kind.encode() + b"\0")
        if self.refusal is not None:
            hashed.update(self.refusal.message.encode())
            return hashed.digest()
        try:
            large = _large_content(self.encoded, kind, content)
            if large is not None:
                _hash_fields(hashed, large, type(content))
                return hashed.digest()
        except ValueError:
            # Unknown fields of a wire type that we cannot skip; protobuf can.
            hashed = xxhash.xxh3_128(kind.encode() + b"\0")
        whole: Any = getattr(TrainRequest.FromString(self.encoded), kind)
        hashed.update(whole.SerializeToString(deterministic=True))
        return hashed.digest()


def _large_content(encoded: bytes, kind: str, content: Any) -> memoryview | None:
    """The operation's own bytes, if it has one of the forms in which programs send tensors."""
    batched = "batch" in content.DESCRIPTOR.fields_by_name and content.HasField("batch")
    if kind != "backward" and not batched:
        return None
    number = TrainRequest.DESCRIPTOR.fields_by_name[kind].number
    found = [inner for field, _, inner in fields(memoryview(encoded)) if field == number]
    # Several occurrences would be one message in pieces, which nobody sends.
    return found[0] if len(found) == 1 else None


@functools.cache
def _maps_and_batch(message: type[Message]) -> tuple[frozenset[int], int]:
    """Numbers of a message's map fields, and of its `batch`; 0 if it has none."""
    found = message.DESCRIPTOR.fields
    maps = (field.number for field in found if field.message_type and field.message_type.GetOptions().map_entry)
    batch = message.DESCRIPTOR.fields_by_name.get("batch")
    return frozenset(maps), batch.number if batch else 0


def _hash_fields(hashed: Any, encoded: memoryview, message: type[Message]) -> None:
    maps, batch = _maps_and_batch(message)
    entries: list[bytes] = []
    for number, whole, inner in fields(encoded):
        if number in maps:
            entries.append(xxhash.xxh3_128_digest(whole))
        elif number == batch:
            _hash_fields(hashed, inner, DatumBatch)
        else:
            hashed.update(whole)
    hashed.update(len(entries).to_bytes(4, "little"))
    for entry in sorted(entries):
        hashed.update(entry)
