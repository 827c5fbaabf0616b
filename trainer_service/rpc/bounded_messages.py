"""Messages of calls: read once their call has passed the border, and no more of them than the process can hold.

Once we read, gRPC buffers a message up to the length that its sender declares, whatever the limit; before that, it
accepts no more than a stream's window. So we read nothing of a call that is refused, and watch what callers without a
key send while it arrives.
"""

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from gradwire._wire.wire_format import fields, outline
from gradwire.errors import GradwireError, error

from trainer_service.rpc.request_checks import RequestChecks

MAX_TYPED_BYTES = 4 << 20
"""How much of a message may be anything but the `data` of tensors. Once parsed, a field takes up to twenty times the
size of its encoding, and parsing blocks the event loop, for some 50 ms per megabyte."""
_TYPED_GROWTH = 16
"""About how much such bytes grow when parsed."""
_MAX_FIELDS = 1 << 17
"""Fields inspected to find out; each takes a microsecond."""
_SMALL_FIELD_BYTES = 4096
"""A field this small is not inspected: all of it counts."""
MAX_HELD_BYTES = 1 << 30
"""Memory that messages of one key may hold while their calls are served; small messages do not count."""
_SMALL_MESSAGE_BYTES = 64 << 10

KEYLESS_CALLS = 256
"""Simultaneous calls of one method without a key."""
KEYLESS_CALLS_PER_HOST = 64
"""The same for one host, so that it cannot block the probes of others."""
KEYLESS_READ_S = 5.0
"""How long such a message may take to arrive."""
KEYLESS_GROWTH_BYTES = 64 << 20
"""How much the process may grow in the meantime."""
_WATCH_INTERVAL_S = 0.02


class Malformed:
    """Stands for a message that could not be read, so that the call ends with our error instead of a traceback."""

    def __init__(self, exc: GradwireError) -> None:
        self.exc = exc


@dataclass(frozen=True)
class Received:
    """A message of a stream and its encoding, so that it can be passed on without encoding it again."""

    outline: Any
    """The message, if it is large without what its tensors hold: parsing that copies it."""
    encoded: bytes
    memory_bytes: int
    """About how much memory it takes, with a copy on its way."""

    @property
    def message(self) -> Any:
        """All of the message, parsed at each look."""
        return type(self.outline).FromString(self.encoded)


class Messages:
    """Reads the messages of a server's calls.

    Args:
        max_message_bytes: The largest one it accepts.
        checks: Checks their fields; None accepts any.
    """

    def __init__(self, *, max_message_bytes: int, checks: RequestChecks | None) -> None:
        self._max_message_bytes = max_message_bytes
        self._checks = checks
        self._held_bytes: Counter[str] = Counter()
        """Memory held by messages of the calls being served, by owner."""
        self._keyless = _Keyless()

    @contextlib.asynccontextmanager
    async def only_one(
        self, context: grpc.aio.ServicerContext, kind: type[Message], owner: str, method: str
    ) -> AsyncGenerator[Message]:
        """The only message of a call; it counts for its owner while the call is served.

        Raises:
            GradwireError: LIMIT_EXCEEDED, PROTOCOL_VIOLATION.
        """
        data = _message(await context.read())
        held_bytes = 0 if len(data) <= _SMALL_MESSAGE_BYTES else memory_bytes(data, kind)
        if held_bytes and self._held_bytes[owner] + held_bytes > MAX_HELD_BYTES:
            text = (
                f"Calls of this API key that are being served hold {self._held_bytes[owner]} bytes, and this one needs "
                f"{held_bytes} more; together they may hold {MAX_HELD_BYTES}. Wait for answers, or send operations "
                "through the Train stream."
            )
            raise error("LIMIT_EXCEEDED", text, limit=MAX_HELD_BYTES, retry_after_s=1.0)
        self._held_bytes[owner] += held_bytes
        try:
            message = self.parse(data, kind)
            if self._checks is not None:
                self._checks.check(method, message)
            yield message
        finally:
            self._held_bytes[owner] -= held_bytes

    @contextlib.asynccontextmanager
    async def only_one_without_key(
        self, context: grpc.aio.ServicerContext, kind: type[Message], method: str
    ) -> AsyncGenerator[Message]:
        """Like only_one, for a call without a key; the call counts for its method and host.

        Raises:
            GradwireError: LIMIT_EXCEEDED, PROTOCOL_VIOLATION.
        """
        with self._keyless.call(method, context.peer()):
            yield self.parse(await self._keyless.read(context), kind)

    def received(self, data: bytes, kind: type[Message]) -> Received:
        """A message of a stream.

        Raises:
            GradwireError: As `parse`.
        """
        return Received(self.parse(data, kind, in_outline=True), data, memory_bytes(data, kind))

    def parse(self, data: bytes, kind: type[Message], *, in_outline: bool = False) -> Message:
        """A message.

        Args:
            data: Its encoding.
            kind: Its type.
            in_outline: Leave out what large `bytes` fields hold.

        Raises:
            ResourceExhaustedError: LIMIT_EXCEEDED: it is too large, or too much of it is not tensors.
            InvalidArgumentError: PROTOCOL_VIOLATION: it is not a message of this type.
        """
        if len(data) > self._max_message_bytes:
            text = f"The message has {len(data)} bytes, but at most {self._max_message_bytes} are allowed."
            raise error("LIMIT_EXCEEDED", text, limit=self._max_message_bytes, got=len(data))
        try:
            if self._checks is not None:
                self._checks.check_encoded(data, kind.DESCRIPTOR)
            typed = 0 if len(data) <= MAX_TYPED_BYTES else typed_bytes(data, kind)
            message = None
            if typed <= MAX_TYPED_BYTES:
                message = kind.FromString(_in_outline(data, kind) if in_outline else data)
        except (DecodeError, ValueError, IndexError):
            text = f"The message ({len(data)} bytes) cannot be parsed; it is not of the type that this call takes."
            raise error("PROTOCOL_VIOLATION", text) from None
        if message is None:
            text = (
                f"More than {MAX_TYPED_BYTES} of the message's {len(data)} bytes are something other than the `data` "
                "of tensors, or it has too many fields. Send tensors as bytes, in `batch`, or send less at a time."
            )
            raise error("LIMIT_EXCEEDED", text, limit=MAX_TYPED_BYTES)
        return message


class _Keyless:
    """Calls whose caller is unknown."""

    def __init__(self) -> None:
        self._calls: Counter[tuple[str, str]] = Counter()
        """Calls under way, by method and host; "" stands for all hosts."""
        self._arriving: set[asyncio.Timeout] = set()
        self._watch: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def call(self, method: str, peer: str) -> Iterator[None]:
        """Counts a call; `peer` is as gRPC spells it, "ipv4:192.0.2.1:50000"."""
        counted = {(method, peer.rpartition(":")[0]): KEYLESS_CALLS_PER_HOST, (method, ""): KEYLESS_CALLS}
        for count, limit in counted.items():
            if self._calls[count] >= limit:
                text = f"{limit} of these calls without an API key are under way, and no more are allowed; send a key."
                raise error("LIMIT_EXCEEDED", text, limit=limit, retry_after_s=1.0)
        self._calls.update(counted.keys())
        try:
            yield
        finally:
            self._calls.subtract(counted.keys())
            # Counts of 0 are removed, since there are many hosts.
            self._calls = +self._calls

    async def read(self, context: grpc.aio.ServicerContext) -> bytes:
        """A message, unless it takes too long or the process grows while it arrives."""
        try:
            async with asyncio.timeout(KEYLESS_READ_S) as end:
                self._arriving.add(end)
                if self._watch is None or self._watch.done():
                    self._watch = asyncio.create_task(self._watch_memory(), name="keyless-messages")
                try:
                    data = _message(await context.read())
                finally:
                    self._arriving.discard(end)
        except TimeoutError:
            raise _too_large_without_key() from None
        if len(data) > _SMALL_MESSAGE_BYTES:
            raise _too_large_without_key()
        return data

    async def _watch_memory(self) -> None:
        """Gives up all such messages once the process has grown: gRPC does not say how much of one has arrived."""
        before = _resident_bytes()
        while self._arriving:
            await asyncio.sleep(_WATCH_INTERVAL_S)
            now = _resident_bytes()
            # Memory freed elsewhere is not for them to fill.
            before = min(before, now)
            if now > before + KEYLESS_GROWTH_BYTES:
                for end in self._arriving:
                    end.reschedule(asyncio.get_running_loop().time())


def _too_large_without_key() -> GradwireError:
    text = (
        f"The message is larger than {_SMALL_MESSAGE_BYTES} bytes or did not arrive within {KEYLESS_READ_S:g} s; "
        "without an API key, that is not allowed."
    )
    return error("LIMIT_EXCEEDED", text, limit=_SMALL_MESSAGE_BYTES)


def _message(data: Any) -> bytes:
    if not isinstance(data, bytes):
        raise error("PROTOCOL_VIOLATION", "The call ended without a message; it needs one.")
    return data


def _in_outline(data: bytes, kind: type[Message]) -> bytes:
    if len(data) <= _SMALL_MESSAGE_BYTES:
        return data
    try:
        return outline(memoryview(data), kind.DESCRIPTOR)
    except (ValueError, IndexError):
        return data  # Parsing tells whether it is a message all the same.


def typed_bytes(data: bytes, kind: type[Message]) -> int:
    """How much of an encoded message is something other than `bytes` fields; stops counting beyond MAX_TYPED_BYTES.

    Raises:
        ValueError, IndexError: It is not a message.
    """
    found = looked_at = 0
    left: list[tuple[memoryview, Any]] = [(memoryview(data), kind.DESCRIPTOR)]
    while left:
        encoded, descriptor = left.pop()
        for number, whole, content in fields(encoded):
            looked_at += 1
            field = descriptor.fields_by_number.get(number)
            if not content or field is None or len(whole) <= _SMALL_FIELD_BYTES:
                found += len(whole)
            elif field.message_type is not None:
                found += len(whole) - len(content)
                left.append((content, field.message_type))
            else:
                found += len(whole) - len(content) * (field.type == FieldDescriptor.TYPE_BYTES)
            if looked_at > _MAX_FIELDS:
                return max(found, MAX_TYPED_BYTES + 1)
            if found > MAX_TYPED_BYTES:
                return found
    return found


def memory_bytes(data: bytes, kind: type[Message]) -> int:
    """About how much memory a message and its encoding take once it is parsed."""
    try:
        typed = len(data) if len(data) <= _SMALL_MESSAGE_BYTES else typed_bytes(data, kind)
    except (ValueError, IndexError):
        typed = 0  # It is refused later.
    return 2 * len(data) + _TYPED_GROWTH * min(typed, len(data), MAX_TYPED_BYTES)


def _resident_bytes() -> int:
    """Memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
