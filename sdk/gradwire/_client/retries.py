"""Which failures are worth another try, and how long to wait before it."""

import random

import grpc
import grpc.aio

from gradwire.errors import GradwireError, UnavailableError

_PASSING_REASONS = {"", "WORKER_NOT_READY"}
"""Reasons of an UNAVAILABLE that pass by themselves; "" is grpc's own: nobody listens, or the connection broke."""
_BROKEN_CODES = {grpc.StatusCode.INTERNAL.value[0], grpc.StatusCode.UNKNOWN.value[0]}
"""What grpc itself calls a connection cut in the middle of a message; the trainer's own errors carry a reason."""
_SETTLED = {
    "CERTIFICATE_VERIFY_FAILED": "its certificate does not come from a root trusted here; name its root, ca_file or "
    "GRADWIRE_TLS_CA_FILE",
    "Hostname Verification Check failed": "its certificate is for another host name",
    "WRONG_VERSION_NUMBER": "it does not speak TLS; use http://",
    "HTTP proxy returned response code 4": "the proxy refuses to connect there",
}
"""What grpc says of connections that no waiting will make, and what that means."""

_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.1, 2.0


class Backoff:
    """Delays between tries: twice as long each time, up to two seconds, with jitter so that clients spread out."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """The last try went well."""
        self._delay_s = _FIRST_DELAY_S

    def next_s(self, asked_s: float | None = None) -> float:
        """Seconds to wait before the next try; about `asked_s` where the server named a time."""
        delay_s, self._delay_s = self._delay_s, min(_LONGEST_DELAY_S, self._delay_s * 2)
        return (asked_s or delay_s) * random.uniform(0.8, 1.2)  # noqa: S311  (jitter, not a secret)


def is_passing(error: GradwireError) -> bool:
    """Whether a call that failed so may be tried again as it is: the server is away, or not ready yet."""
    return error.code == grpc.StatusCode.UNAVAILABLE.value[0] and error.reason in _PASSING_REASONS


def is_broken_stream(error: GradwireError) -> bool:
    """Whether another connection may go on where a stream ended so."""
    return isinstance(error, UnavailableError) or (not error.reason and error.code in _BROKEN_CODES)


def why_hopeless(exc: grpc.aio.AioRpcError) -> str:
    """Why no retry will make the connection; "" where one may."""
    return next((why for said, why in _SETTLED.items() if said in (exc.details() or "")), "")
