"""HTTP/1.1 as our server speaks it: uvicorn's protocols, with bounds, and with fewer calls of the system. Ground floor;
needs uvicorn.
"""

import asyncio
import importlib.util
from typing import Any

_MAX_HEAD_BYTES = 64 * 1024
"""The longest head of a request; h11's bound is the same."""


def http_protocol() -> type[asyncio.Protocol]:
    """The protocol by httptools, which the extra `gateway` installs; without it by h11, which does the same and takes
    longer."""
    return _by_h11() if importlib.util.find_spec("httptools") is None else _by_httptools()


def _by_h11() -> type[asyncio.Protocol]:
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class ByH11(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            joined: Any = _HeadWithBody(transport, self.loop)
            super().connection_made(joined)

    return ByH11


def _by_httptools() -> type[asyncio.Protocol]:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class ByHttptools(HttpToolsProtocol):
        """httptools takes heads, trailers and chunks' extensions without an end; this does not."""

        _endless_bytes = 0
        """Received since a head, a piece of a body, or a message was over."""

        def connection_made(self, transport: Any) -> None:
            joined: Any = _HeadWithBody(transport, self.loop)
            super().connection_made(joined)

        def data_received(self, data: bytes) -> None:
            self._endless_bytes += len(data)
            super().data_received(data)
            if self._endless_bytes > _MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response("The head of the request is too long.")

        def on_headers_complete(self) -> None:
            self._endless_bytes = 0
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self._endless_bytes = 0
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._endless_bytes = 0
            super().on_message_complete()

    return ByHttptools


class _HeadWithBody:
    """A transport on which a response's head leaves with the first of its body: uvicorn writes the two one by one, and
    each would be a call of the system and wake the peer.

    Args:
        transport: What is written to; all but writes goes there as it is.
        loop: Its event loop.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._head = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """See asyncio.Transport."""
        if self._head:
            head, self._head = self._head, b""
            self._transport.write(head + data)
        elif data.startswith(b"HTTP/1."):
            self._head = data
            # Where the body lets wait for it.
            self._loop.call_soon(self._flush)
        else:
            self._transport.write(data)

    def close(self) -> None:
        """See asyncio.Transport."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        head, self._head = self._head, b""
        if head:
            self._transport.write(head)
