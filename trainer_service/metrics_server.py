"""Serves Prometheus metrics over HTTP, to a bounded number of connections. Ground floor.

No key is needed to connect, so no connection may occupy a thread for as long as it likes.
"""

import logging
import socket
import socketserver
import threading
from collections.abc import Callable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from trainer_service.addresses import split_address

logger = logging.getLogger(__name__)

_MAX_CONNECTIONS = 16
"""Simultaneous connections, each with a thread; a further one replaces the oldest, which has had time for a scrape."""
_SILENCE_S = 10.0
"""How long a connection may be silent before it is closed."""


class _Handler(WSGIRequestHandler):
    timeout = _SILENCE_S

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are not logged."""


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True
    # Connections that wait to be accepted; with the library's five, a scrape may have to retry for seconds.
    request_queue_size = 128
    # Shutdown does not wait for connections: anyone may hold one open.
    block_on_close = False

    def __init__(self, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._lock = threading.Lock()
        self._open: list[socket.socket] = []  # Oldest first.
        super().__init__((host, port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            oldest = self._open.pop(0) if len(self._open) >= _MAX_CONNECTIONS else None
            self._open.append(request)
        if oldest is not None:
            _shut(oldest)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            if request in self._open:
                self._open.remove(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("A scrape of the metrics failed.", exc_info=True)


def _shut(connection: socket.socket) -> None:
    """Shuts a connection down; its thread then closes it."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        logger.debug("A connection to the metrics was gone already.", exc_info=True)


def serve_metrics(listen: str, registry: CollectorRegistry) -> tuple[str, Callable[[], None]]:
    """Serves /metrics on threads. Returns the address it listens on and a function that stops it.

    Args:
        listen: host:port; port 0 takes a free one.
        registry: What is served.

    Raises:
        OSError: The address cannot be used.
    """
    host, port = split_address(listen)
    try:
        server = _Server(host, port)
    except OSError as exc:
        raise OSError(f"cannot serve metrics on {listen}: {exc.strerror or exc}") from exc
    server.set_app(make_wsgi_app(registry))
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join(2)

    bracketed = f"[{host}]" if ":" in host else host
    return f"{bracketed}:{server.server_port}", stop
