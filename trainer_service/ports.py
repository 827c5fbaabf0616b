"""Ports that gRPC servers listen on. Ground floor."""

import grpc
import grpc.aio

from trainer_service.addresses import join_address, split_address
from trainer_service.config import ServerTls


def open_port(server: grpc.aio.Server, listen: str, tls: ServerTls | None) -> str:
    """Adds a port that the server listens on once it is started. Returns its host:port.

    Raises:
        OSError: The address cannot be used.
    """
    host, port = split_address(listen)
    wanted = join_address(host, port)
    try:
        if tls is not None:
            port = server.add_secure_port(wanted, _credentials(tls))
        else:
            port = server.add_insecure_port(wanted)
    except RuntimeError as exc:
        raise OSError(f"cannot listen on {listen}: {exc}") from exc
    return join_address(host, port)


def _credentials(tls: ServerTls) -> grpc.ServerCredentials:
    """The certificates the server shows, and those it asks for."""
    pair = (tls.key_file.read_bytes(), tls.cert_file.read_bytes())
    roots = None if tls.client_ca_file is None else tls.client_ca_file.read_bytes()
    return grpc.ssl_server_credentials([pair], root_certificates=roots, require_client_auth=roots is not None)
