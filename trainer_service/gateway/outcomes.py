"""The outcome of a request: a result, or a failure in terms that the client's SDK knows."""

import json
from dataclasses import dataclass
from typing import Any

from google.rpc import code_pb2
from gradwire.errors import GradwireError

JSON = "application/json"
PROTOBUF = "application/x-protobuf"

_STATUS: dict[int, int] = {
    code_pb2.UNAUTHENTICATED: 401,
    code_pb2.PERMISSION_DENIED: 403,
    code_pb2.NOT_FOUND: 404,
    code_pb2.UNAVAILABLE: 503,
    code_pb2.DEADLINE_EXCEEDED: 503,
    code_pb2.DATA_LOSS: 500,
    code_pb2.INTERNAL: 500,
    code_pb2.UNKNOWN: 500,
}
"""By gRPC code; any other is 400. Neither 409 nor 429 nor 5xx for what only the caller can mend: the SDKs repeat those
for minutes without a word."""


class Refusal(Exception):
    """A request that is answered with an HTTP status and a sentence.

    Attributes:
        status: The HTTP status.
        message: The sentence.
        reason: As GradwireError.reason.
    """

    def __init__(self, status: int, message: str, *, reason: str = "INVALID_FIELD") -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.reason = reason


def unserved(what: str, instead: str) -> Refusal:
    """A part of the foreign surface that is not served here.

    Args:
        what: The subject of the sentence, such as "Publishing a checkpoint".
        instead: What to do instead, a sentence.
    """
    return Refusal(400, f"{what} is not served by this gateway. {instead}", reason="NOT_IMPLEMENTED")


def refusal_of(exc: GradwireError) -> Refusal:
    """A trainer's error as an HTTP answer."""
    return Refusal(_STATUS.get(exc.code, 400), exc.message, reason=exc.reason or "UNAVAILABLE")


def category_of(status: int) -> str:
    """Whose fault a failure is, as tinker names it."""
    return "server" if status >= 500 else "user"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a future resolves to, as it goes over the wire, with status 200 either way."""

    media_type: str
    body: bytes
    failed: bool = False

    @staticmethod
    def result(**fields: Any) -> "Outcome":
        """A result as JSON."""
        return Outcome(JSON, json.dumps(fields).encode())

    @staticmethod
    def failure(exc: Exception) -> "Outcome":
        """A failure."""
        refusal = refusal_of(exc) if isinstance(exc, GradwireError) else exc
        if not isinstance(refusal, Refusal):
            refusal = Refusal(500, "The gateway failed at this; its log says more.", reason="INTERNAL")
        body = {"error": refusal.message, "category": category_of(refusal.status), "reason": refusal.reason}
        return Outcome(JSON, json.dumps(body).encode(), failed=True)

    def encode(self) -> bytes:
        """The outcome as bytes for the store."""
        mark = b"F" if self.failed else b"J" if self.media_type == JSON else b"P"
        return mark + self.body

    @staticmethod
    def decode(stored: bytes) -> "Outcome":
        """An outcome from the bytes that `encode` made."""
        mark, body = stored[:1], stored[1:]
        return Outcome(PROTOBUF if mark == b"P" else JSON, body, failed=mark == b"F")
