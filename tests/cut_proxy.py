"""A TCP proxy whose connections a test can cut or hold."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator


class CutProxy:
    """Forwards bytes between clients and one server.

    Args:
        target: host:port of the server.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        self._closed = False
        self._flowing = threading.Event()
        self._flowing.set()
        self.refusing = False
        """Whether new connections are closed at once."""
        self.connections = 0
        """Connections taken so far."""
        self.cut_after_bytes: int | None = None
        """Bytes from the client after which the next connection is cut; None forwards all."""
        self.bytes_to_client = 0
        """Forwarded from the server so far."""
        self.when_client_has: tuple[int, Callable[[], object]] | None = None
        """As soon as that many bytes were forwarded from the server, this is done, once."""
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def base_url(self) -> str:
        """Where clients connect."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def cut(self) -> None:
        """Breaks every connection there is."""
        with self._lock:
            sockets, self._open = self._open, []
        for each in sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def stall(self, seconds: float) -> None:
        """Forwards nothing for a while; connections stay open."""
        self._flowing.clear()
        threading.Timer(seconds, self._flowing.set).start()

    def hold(self) -> None:
        """Forwards nothing until `flow`; connections stay open."""
        self._flowing.clear()

    def flow(self) -> None:
        """Forwards again."""
        self._flowing.set()

    def close(self) -> None:
        """Ends the proxy."""
        self._closed = True
        self._flowing.set()
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.refusing:
                client.close()
                continue
            self.connections += 1
            try:
                server = socket.create_connection(self._target)
            except OSError:
                client.close()  # The server is away.
                continue
            with self._lock:
                self._open += [client, server]
            threading.Thread(target=self._pump, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, False), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, upward: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if upward and self.cut_after_bytes is not None:
                    self.cut_after_bytes -= len(data)
                    if self.cut_after_bytes <= 0:
                        self.cut_after_bytes = None
                        self.cut()
                        return
                self._flowing.wait()
                sink.sendall(data)
                if not upward:
                    self._count(len(data))
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _count(self, num_bytes: int) -> None:
        with self._lock:
            self.bytes_to_client += num_bytes
            due = self.when_client_has
            if due is None or self.bytes_to_client < due[0]:
                return
            self.when_client_has = None
        due[1]()


@contextlib.contextmanager
def cut_proxy(target: str) -> Iterator[CutProxy]:
    """A proxy before `target` for the length of a test."""
    proxy = CutProxy(target)
    try:
        yield proxy
    finally:
        proxy.close()
