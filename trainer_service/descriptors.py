"""File descriptors: as many as the system gives, and some always left for what must not fail. Ground floor.

Every connection takes one. A client needs no key to connect, so connections are bounded, and journals, worker processes
and checkpoints have the rest to themselves.
"""

import contextlib
import resource

from trainer_service.options import SettingsError

_ENOUGH = 65_536
"""More is not asked for: a connection also costs memory."""
_LEAST_CONNECTIONS = 16


def raise_limit() -> None:
    """Raises this process's limit on open files, and that of processes it starts, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        # A system may refuse what it says it allows, as macOS does; then it stays as it is.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def max_connections(*, reserved: int) -> int:
    """How many connections a server may hold at once.

    Args:
        reserved: Descriptors that others need at least; of a large limit they get a quarter.

    Raises:
        SettingsError: The limit leaves too few.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _ENOUGH if soft == resource.RLIM_INFINITY else soft
    left = limit - max(reserved, limit // 4)
    if left < _LEAST_CONNECTIONS:
        raise SettingsError(
            f"This process may open {limit} files at once, and needs at least {reserved + _LEAST_CONNECTIONS}; raise "
            "its limit (ulimit -n, LimitNOFILE=)."
        )
    return left


def connection_options(connections: int) -> list[tuple[str, int]]:
    """A gRPC server's options that bound its connections. One too many is closed as soon as it is accepted; its client
    finds the server unavailable, and may try again."""
    return [
        ("grpc.max_allowed_incoming_connections", connections),
        # Who connects and says nothing, or vanished without a word while no call was under way, does not keep a place.
        ("grpc.server_handshake_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
