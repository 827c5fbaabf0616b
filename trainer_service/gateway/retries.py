"""Which of a trainer's failures the gateway waits out."""

import grpc
from gradwire.errors import GradwireError

_PASSING_REASONS = {"", "WORKER_NOT_READY", "DRAINING", "WORKER_DIED"}
"""Reasons of an UNAVAILABLE that pass by themselves."""
_BROKEN_CODES = {
    grpc.StatusCode.INTERNAL.value[0],
    grpc.StatusCode.UNKNOWN.value[0],
    grpc.StatusCode.CANCELLED.value[0],
}
"""What grpc itself calls a connection that was cut; the trainer's own errors carry a reason."""


def is_passing(exc: GradwireError) -> bool:
    """Whether the same call may go through a little later: the trainer is away or not ready."""
    return exc.code == grpc.StatusCode.UNAVAILABLE.value[0] and exc.reason in _PASSING_REASONS


def is_broken_stream(exc: GradwireError) -> bool:
    """Whether another connection may go on where a stream ended so."""
    return is_passing(exc) or (exc.code in _BROKEN_CODES and not exc.reason)
