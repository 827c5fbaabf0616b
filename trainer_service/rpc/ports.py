"""Where servers listen: their own port, in plaintext or TLS, and one for probes that ask for health alone."""

from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2_grpc

from trainer_service.addresses import split_address
from trainer_service.config import ServerTls
from trainer_service.rpc.transport import server_options

_PROBES = 64
"""Connections to the health port at once."""


def open_port(server: grpc.aio.Server, listen: str, tls: ServerTls | None = None) -> str:
    """Has a server listen, once it is started.

    Args:
        server: It.
        listen: host:port; port 0 takes a free one.
        tls: How it proves who it is; None listens in plaintext.

    Returns:
        The host:port that was taken.

    Raises:
        OSError: It cannot be had.
    """
    host, port = split_address(listen)
    bracketed = f"[{host}]" if ":" in host else host
    try:
        if tls is not None:
            port = server.add_secure_port(f"{bracketed}:{port}", _credentials(tls))
        else:
            port = server.add_insecure_port(f"{bracketed}:{port}")
    except RuntimeError as exc:
        raise OSError(f"cannot listen on {listen}: {exc}") from exc
    return f"{bracketed}:{port}"


async def serve_health(listen: str, servicer: Any) -> grpc.aio.Server:
    """A started server of health alone, in plaintext: a cluster's probes speak no TLS and have no key.

    Args:
        listen: host:port.
        servicer: Of grpc.health.v1; it may serve other ports too.

    Raises:
        OSError: The address cannot be had.
    """
    options = server_options(max_message_bytes=1024, max_connections=_PROBES, max_calls=1)
    server = grpc.aio.server(options=options, maximum_concurrent_rpcs=2 * _PROBES)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    open_port(server, listen)
    await server.start()
    return server


def _credentials(tls: ServerTls) -> grpc.ServerCredentials:
    """What the server shows, and asks for."""
    pair = (tls.key_file.read_bytes(), tls.cert_file.read_bytes())
    roots = None if tls.client_ca_file is None else tls.client_ca_file.read_bytes()
    return grpc.ssl_server_credentials([pair], root_certificates=roots, require_client_auth=roots is not None)
