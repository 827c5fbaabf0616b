"""An HTTP server on this process's event loop: one socket, optional TLS, and it stops only when we say so. Ground
floor, but needs uvicorn, which belongs to the extras `page` and `gateway`.
"""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Generator
from typing import Any

import uvicorn

from trainer_service.addresses import join_address, split_address
from trainer_service.config import ServerTls
from trainer_service.http_protocols import http_protocol

_BACKLOG = 2048
"""Connections that wait to be accepted."""
_KEEP_ALIVE_S = 20
"""How long an idle connection stays open: longer than clients keep theirs, so that they close it first."""


class HttpServer:
    """A listening socket and its server. The address is bound at once.

    Args:
        listen: host:port; port 0 takes a free one.
        tls: Its certificates; None serves plaintext.

    Raises:
        OSError: The address cannot be used.
    """

    def __init__(self, listen: str, *, tls: ServerTls | None) -> None:
        self._tls = tls
        self._socket = listening_socket(listen)
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None
        bound, self.port = self._socket.getsockname()[:2]
        self.address = join_address(split_address(listen)[0], self.port)
        """host:port it listens on."""
        self.url = f"http{'s' if tls else ''}://{join_address(bound, self.port)}/"
        """Its URL, for a browser."""

    async def start(self, app: Any, *, stop_grace_s: int, max_connections: int | None = None) -> None:
        """Serves an ASGI application.

        Args:
            app: The application.
            stop_grace_s: How long requests under way may take to end.
            max_connections: Simultaneous connections, beyond which it answers 503; None for no limit.

        Raises:
            OSError: A TLS file cannot be used.
        """
        tls = self._tls
        client_ca_file = None if tls is None else tls.client_ca_file
        config = uvicorn.Config(
            app,
            http=http_protocol(),
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=max_connections,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=stop_grace_s,
            ssl_certfile=None if tls is None else str(tls.cert_file),
            ssl_keyfile=None if tls is None else str(tls.key_file),
            ssl_ca_certs=None if client_ca_file is None else str(client_ca_file),
            ssl_cert_reqs=ssl.CERT_NONE if client_ca_file is None else ssl.CERT_REQUIRED,
        )
        config.load()
        self._server = _Server(config)
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]), name="http-server")
        while not self._server.started and not self._serving.done():  # noqa: ASYNC110  (uvicorn has no event for it)
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        """Accepts no more requests; those under way have stop_grace_s to end."""
        if self._server is not None and self._serving is not None:
            self._server.should_exit = True
            await self._serving
        self._socket.close()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """We handle signals, not uvicorn."""
        yield


def listening_socket(listen: str) -> socket.socket:
    """A socket that listens on host:port.

    Raises:
        OSError: The address cannot be used.
    """
    host, port = split_address(listen)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Only if the protocol is named does asyncio send without delay; otherwise a body is sent 40 ms after its headers.
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen(_BACKLOG)
    except OSError as exc:
        made.close()
        raise OSError(f"cannot listen on {listen}: {exc.strerror or exc}") from exc
    return made
