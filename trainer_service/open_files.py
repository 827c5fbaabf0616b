"""File descriptors: as many as the system allows, and always some left for what must not fail. Ground floor.

Every connection takes one, and a client needs no key to connect. So connections are bounded, and the rest is reserved
for journals, worker processes and checkpoints.
"""

import contextlib
import resource

from trainer_service.command_lines import SettingsError

_ENOUGH = 65_536
"""We ask for no more: a connection also costs memory."""
_LEAST_CONNECTIONS = 16


def raise_limit() -> None:
    """Raises the limit on open files, for this process and those it starts, as far as allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        # A system may refuse what it claims to allow, as macOS does; then the limit stays.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def max_connections(*, reserved: int) -> int:
    """How many connections a server may hold at once.

    Args:
        reserved: Descriptors that everything else needs at least; it gets a quarter of a large limit.

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
    """Options of a gRPC server that bound its connections. One too many is closed as soon as it is accepted; its client
    finds the server unavailable, and may try again."""
    return [
        ("grpc.max_allowed_incoming_connections", connections),
        # A client that sends nothing, or vanishes between calls, does not keep its connection.
        ("grpc.server_handshake_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
