"""How gRPC is set up in our servers: what it takes from a peer before anybody looks at it."""

from trainer_service import descriptors
from trainer_service.config import Limits

_WINDOW_BYTES = 1 << 17
"""What a call may send before somebody reads it; while its message arrives, up to 1 MiB more: enough for 190 Mbit/s
where an answer takes 50 ms. The larger windows that grpc's bandwidth probe opens made nothing faster on one machine,
and whoever floods us with calls fills one for each."""
_MAX_PENDING_CALLS = 1500
"""Calls that have come and that the event loop has not got to, of all connections; gRPC refuses more."""


def server_options(
    *, max_message_bytes: int, max_connections: int, max_calls: int = Limits.max_sample_requests
) -> list[tuple[str, int]]:
    """Channel arguments of a server.

    Args:
        max_message_bytes: The largest message taken.
        max_connections: Connections at once.
        max_calls: Calls of one client that should be able to run at once.
    """
    return [
        *descriptors.connection_options(max_connections),
        # Twice the limit, so that a message somewhat over it is refused in our words rather than grpc's.
        ("grpc.max_receive_message_length", 2 * max_message_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.so_reuseport", 0),
        # Further calls of a connection wait at the client, which knows the limit.
        ("grpc.max_concurrent_streams", max_calls + 128),
        ("grpc.server.max_pending_requests", _MAX_PENDING_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", _MAX_PENDING_CALLS),
        # Nothing compressed: a few hundred kilobytes of gzip become hundreds of megabytes before anybody sees them.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        ("grpc.per_message_decompression", 0),
        # A megabyte and more in few system calls: grpc's defaults are made for small messages.
        ("grpc.http2.max_frame_size", 1 << 22),
        ("grpc.http2.lookahead_bytes", _WINDOW_BYTES),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.write_buffer_size", 1 << 22),
        ("grpc.experimental.tcp_read_chunk_size", 1 << 18),
        ("grpc.experimental.tcp_max_read_chunk_size", 1 << 22),
        # Clients ping to notice a dead server; grpc's default would cut them off for it.
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 20_000),
    ]
