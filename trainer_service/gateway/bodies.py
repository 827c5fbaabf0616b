"""Bodies of requests: bounded, decompressed, and read field by field. What is not known is refused, never dropped."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import zstandard
from starlette.requests import ClientDisconnect, Request

from trainer_service.gateway.outcomes import Refusal

MAX_BODY_BYTES = 64 * 1024 * 1024
"""The largest body, decompressed: a trainer takes no larger message."""
_MAX_DEPTH = 64
_MAX_SHOWN = 80
_INT64 = 1 << 63


async def read_body(request: Request) -> bytes:
    """The body, decompressed.

    Raises:
        Refusal: 413 beyond MAX_BODY_BYTES, 400 for one cut short or badly compressed, 415 for another compression.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "", "zstd"):
        raise Refusal(415, f"Content-Encoding is {_shown(encoding)}; send zstd, or none.")
    pieces = bytearray()
    try:
        async for piece in request.stream():
            pieces += piece
            if len(pieces) > MAX_BODY_BYTES:
                raise _too_large()
    except ClientDisconnect:
        raise Refusal(400, "The request's body was cut short.") from None
    return _decompress(pieces) if encoding == "zstd" else bytes(pieces)


def _decompress(compressed: bytearray) -> bytes:
    """At most MAX_BODY_BYTES of it; no more than that is ever held."""
    try:
        with zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(compressed) as reader:
            data = reader.read(MAX_BODY_BYTES + 1)
        if len(data) > MAX_BODY_BYTES:
            raise _too_large()
        whole = zstandard.frame_content_size(compressed)
        if whole < 0:
            # The frame does not say its size, and the reader does not say whether it came to the end.
            rest = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
            rest.decompress(compressed)
            whole = len(data) if rest.eof else -1
    except zstandard.ZstdError as exc:
        raise Refusal(400, f"The body is said to be zstd, but cannot be decompressed: {exc}.") from None
    if len(data) != whole:
        raise Refusal(400, "The body is said to be zstd, but is cut short.")
    return data


def _too_large() -> Refusal:
    return Refusal(
        413, f"The body has more than {MAX_BODY_BYTES} bytes; send fewer datums a call, their gradients add up."
    )


async def read_fields(request: Request) -> "Fields":
    """The JSON object of a body; an absent body is an empty one.

    Raises:
        Refusal: It is not a JSON object.
    """
    return parse_fields(await read_body(request))


def parse_fields(body: bytes) -> "Fields":
    """Like read_fields, for a body that was read before."""

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON number")

    try:
        found = json.loads(body or b"{}", parse_constant=constant)
    except (ValueError, RecursionError) as exc:
        raise Refusal(400, f"The body is not JSON: {exc}.") from None
    if not isinstance(found, dict):
        raise Refusal(400, f"The body is {_kind(found)}; it must be a JSON object.")
    # So few brackets cannot be nested deeper; most bodies have few.
    if body.count(b"{") + body.count(b"[") > _MAX_DEPTH and not _is_shallow(found, _MAX_DEPTH):
        raise Refusal(400, f"The body is nested more than {_MAX_DEPTH} deep.")
    return Fields(found)


class Fields:
    """A JSON object that is read field by field; `finish` refuses what nobody read.

    Args:
        found: The object.
        where: Its path in the body, with a dot behind it; "" for the body itself.
    """

    def __init__(self, found: Mapping[str, Any], where: str = "") -> None:
        self._left = dict(found)
        self._where = where

    @property
    def left(self) -> list[str]:
        """Names that nobody read yet."""
        return list(self._left)

    def has(self, name: str) -> bool:
        """Whether the field is present and not null."""
        return self._left.get(name) is not None

    def text(self, name: str, default: str | None = None) -> str:
        """A string. If absent: the default, or a refusal where there is no default."""
        return self._take(name, default, str, "a string")

    def flag(self, name: str, default: bool = False) -> bool:
        """A boolean."""
        return self._take(name, default, bool, "true or false")

    def integer(self, name: str, default: int | None = None, *, low: int = -_INT64, high: int = _INT64 - 1) -> int:
        """An integer from low to high."""
        value = self._take(name, default, int, "an integer")
        if isinstance(value, bool) or not low <= value <= high:
            raise self.wrong(name, f"is {_shown(value)}; it must be an integer from {low} to {high}.")
        return value

    def optional_integer(self, name: str, *, low: int = -_INT64, high: int = _INT64 - 1) -> int | None:
        """An integer, or None where it is absent."""
        return self.integer(name, low=low, high=high) if self.has(name) else self.drop(name)

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number."""
        value = self._take(name, default, (int, float), "a number")
        if isinstance(value, bool) or abs(value) > 1.7e308 or not math.isfinite(value):
            raise self.wrong(name, f"is {_shown(value)}; it must be a finite number.")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        """A number, or None where it is absent."""
        return self.number(name) if self.has(name) else self.drop(name)

    def items(self, name: str, default: list[Any] | None = None) -> list[Any]:
        """A list."""
        return self._take(name, default, list, "a list")

    def fields(self, name: str) -> "Fields":
        """An object; absent: an empty one."""
        return Fields(self._take(name, {}, dict, "an object"), f"{self._where}{name}.")

    def texts(self, name: str) -> dict[str, str]:
        """An object of texts; values of another kind become their JSON text, as a user's metadata may hold anything."""
        found = self._take(name, {}, dict, "an object")
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in found.items()}

    def value(self, name: str) -> Any:
        """The value as it is; None if absent."""
        return self._left.pop(name, None)

    def ignore(self, *names: str) -> None:
        """Accepts fields that change nothing here."""
        for name in names:
            self._left.pop(name, None)

    def drop(self, name: str) -> None:
        """Accepts a field that must be null if present."""
        self._left.pop(name, None)

    def refuse(self, name: str, why: str, *, unless: Callable[[Any], bool] = lambda value: not value) -> None:
        """A field that is taken only where it asks for nothing.

        Raises:
            Refusal: NOT_IMPLEMENTED, with what to do instead.
        """
        value = self._left.pop(name, None)
        if value is not None and not unless(value):
            raise Refusal(400, f"{self._where}{name} is not served by this gateway. {why}", reason="NOT_IMPLEMENTED")

    def finish(self) -> None:
        """Raises Refusal where a field is left that nobody read."""
        left = [name for name, value in self._left.items() if value is not None]
        if left:
            raise self.wrong(
                left[0][:_MAX_SHOWN], "is not known to this gateway, which drops nothing unread; leave it out."
            )

    def wrong(self, name: str, description: str) -> Refusal:
        """A refusal that names a field."""
        return Refusal(400, f"{self._where}{name} {description}")

    def _take(self, name: str, default: Any, kind: type | tuple[type, ...], called: str) -> Any:
        value = self._left.pop(name, None)
        if value is None:
            if default is None:
                raise self.wrong(name, f"is missing; it must be {called}.")
            return default
        if not isinstance(value, kind):
            raise self.wrong(name, f"is {_kind(value)}; it must be {called}.")
        if isinstance(value, str) and not _is_utf8(value):
            raise self.wrong(name, "has half a surrogate pair in it, which is no text.")
        return value


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_shallow(value: Any, depth: int) -> bool:
    if not isinstance(value, dict | list):
        return True
    inner = value.values() if isinstance(value, dict) else value
    # One check for a list of thousands of tokens.
    nested = [one for one in inner if isinstance(one, (dict, list))]
    return depth > 0 and all(_is_shallow(one, depth - 1) for one in nested)


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "an enormous number"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"
