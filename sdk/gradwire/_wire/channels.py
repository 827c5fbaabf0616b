"""Channels to a trainer or a control plane, from their URLs."""

import ipaddress
from urllib.parse import urlsplit

import grpc
import grpc.aio


def parse_base_url(base_url: str, *, what: str = "base_url") -> tuple[str, bool]:
    """(gRPC target, whether to use TLS) of a base_url.

    "https://host" is TLS on port 443 unless it names one; "http://host:port" and "host:port" are plaintext;
    "unix:/path" is a socket.

    Args:
        base_url: The URL.
        what: What the caller calls it, for the error.

    Raises:
        ValueError: No host, no port where one is needed, or another scheme.
    """
    if base_url.startswith("unix:"):
        return base_url, False
    try:
        parts = urlsplit(base_url if "://" in base_url else f"http://{base_url}")
    except ValueError as exc:
        raise ValueError(f'{what} {base_url!r} is not a URL: {exc}; use "http://host:port".') from None
    if parts.scheme not in ("http", "https"):
        raise ValueError(f'{what} {base_url!r} has scheme "{parts.scheme}"; use "http://host:port" or "https://host".')
    try:
        port = parts.port
    except ValueError:
        raise ValueError(f"{what} {base_url!r} has an invalid port; ports are 0 to 65535.") from None
    if port is None and parts.scheme == "https":
        port = 443
    if not parts.hostname or port is None:
        raise ValueError(
            f'{what} {base_url!r} names no {"port" if parts.hostname else "host"}; use "http://host:port".'
        )
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{host}:{port}", parts.scheme == "https"


def host_of(target: str) -> str:
    """The host of a gRPC target, in lower case."""
    return target.rpartition(":")[0].strip("[]").lower()


def reaches_this_machine(target: str) -> bool:
    """Whether a gRPC target is on this machine: a unix socket, "localhost", a loopback or the wildcard address."""
    if target.startswith("unix:"):
        return True
    host = host_of(target)
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        # A name that ends with a dot is complete.
        name = host.removesuffix(".")
        return name == "localhost" or name.endswith(".localhost")
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    address = mapped or address
    return address.is_loopback or address.is_unspecified


def open_channel(target: str, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    """A channel for large messages, with a connection of its own.

    Args:
        target: As parse_base_url gives it.
        credentials: For TLS; None speaks plaintext.
    """
    options = [
        # The server says its own limit and its clients keep to it; grpc's client-side 4 MiB would come first.
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_send_message_length", -1),
        # A peer that vanished without a word is noticed within half a minute.
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        # Two clients in one process get a connection each, so that one's bulk does not delay the other.
        ("grpc.use_local_subchannel_pool", 1),
        # A proxy would look for "this machine" on its own.
        ("grpc.enable_http_proxy", 0 if reaches_this_machine(target) else 1),
        # A megabyte and more in few system calls: grpc's defaults are made for small messages.
        ("grpc.http2.max_frame_size", 1 << 22),
        ("grpc.http2.lookahead_bytes", 1 << 24),
        ("grpc.http2.write_buffer_size", 1 << 22),
        ("grpc.experimental.tcp_read_chunk_size", 1 << 18),
        ("grpc.experimental.tcp_max_read_chunk_size", 1 << 22),
    ]
    if credentials is None:
        return grpc.aio.insecure_channel(target, options)
    return grpc.aio.secure_channel(target, credentials, options)
