"""Connections to a trainer or a control plane."""

import asyncio
import multiprocessing.context
import os
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import grpc
import grpc.aio

from gradwire._client.loop import LOOP
from gradwire._client.proxies import proxy_used
from gradwire._client.retries import Backoff, is_passing, why_hopeless
from gradwire._client.tls import ClientTls
from gradwire._client.tracing import start_span
from gradwire._wire.channels import open_channel, parse_base_url
from gradwire._wire.protocol_version import PROTOCOL_VERSION
from gradwire.errors import GradwireError, from_rpc_error


class Closable(Protocol):
    """Something open on a connection, closed with it."""

    def close(self) -> None:
        """Closes it, on the loop's thread."""
        ...


class Connection:
    """A channel to one server, shared by every call and stream to it.

    Args:
        base_url: See parse_base_url.
        api_key: Sent as `authorization: Bearer …`; None sends none.
        tls: PEM files for an "https://" base_url; None reads them from the environment.
        connect_timeout_s: How long nobody may listen before a call fails; a trainer listens within a second of its
            start, so a wrong address shows soon.

    Raises:
        ValueError: A base_url that leads nowhere, a key that cannot be sent, PEM files without "https://".
        OSError: A PEM file cannot be read.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        tls: ClientTls | None = None,
        connect_timeout_s: float = 20.0,
    ) -> None:
        self.base_url = base_url
        self._arguments = (base_url, tls, connect_timeout_s)
        self._api_key = api_key
        self._connect_timeout_s = connect_timeout_s
        self._target, self._tls = parse_base_url(base_url)
        if tls is not None and not self._tls:
            # The caller meant the connection to be private; it must not become plaintext unnoticed.
            raise ValueError(f'base_url {base_url!r} is plaintext, but TLS files were given; use "https://".')
        self._credentials = (tls or ClientTls.from_environment()).credentials() if self._tls else None
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ValueError("api_key has characters other than printable ASCII; check for a stray newline.")
        self.metadata: list[tuple[str, str]] = [("gradwire-protocol-version", str(PROTOCOL_VERSION))]
        if api_key:
            self.metadata.append(("authorization", f"Bearer {api_key}"))
        self._channel: grpc.aio.Channel | None = None
        self.streams: set[Closable] = set()
        """What is open on it, closed with it. On the loop's thread only."""
        LOOP.connections.add(self)

    def channel(self) -> grpc.aio.Channel:
        """The channel; on the loop's thread only."""
        if self._channel is None:
            self._channel = open_channel(self._target, self._credentials)
        return self._channel

    async def call_async(
        self,
        stub: Callable[[Any], Any],
        method: str,
        request: Any,
        timeout_s: float,
        *,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> Any:
        """One unary call, on the loop's thread; tried again with back-off while the server is away or starting.

        Args:
            stub: The generated stub class.
            method: Name of the call.
            request: Its request message. The call must be safe to repeat.
            timeout_s: For all tries together.
            headers: Metadata beside the connection's.

        Raises:
            GradwireError: The server's error, or UnavailableError: the time is up, nobody has listened for
                connect_timeout_s, or the TLS handshake fails.
        """
        deadline = time.monotonic() + timeout_s
        connect_deadline = time.monotonic() + min(timeout_s, self._connect_timeout_s)
        backoff = Backoff()
        metadata = [*self.metadata, *headers.items()]
        while True:
            remaining_s = max(0.01, deadline - time.monotonic())
            try:
                return await getattr(stub(self.channel()), method)(request, metadata=metadata, timeout=remaining_s)
            except grpc.aio.AioRpcError as exc:
                error = self.explain(exc, method, timeout_s)
                if not is_passing(error) or why_hopeless(exc):
                    raise error from None
                delay_s = backoff.next_s(error.retry_after_s)
                if error.reason:
                    connect_deadline = deadline  # Somebody listens; now it is only a matter of being ready.
                if time.monotonic() + delay_s >= min(deadline, connect_deadline):
                    raise error from None
            await asyncio.sleep(delay_s)

    def __reduce__(self) -> tuple[Any, ...]:
        """A connection of its own in the process that unpickles it.

        The key goes along only to a child process that multiprocessing is just starting, over its private pipe. In
        every other pickle, which may lie in a file, pass a queue or travel, there is none: the process that unpickles
        takes GRADWIRE_API_KEY from its own environment.
        """
        key = self._api_key if multiprocessing.context.get_spawning_popen() is not None else None
        return _connect_again, (key, *self._arguments)

    def call(self, stub: Callable[[Any], Any], method: str, request: Any, *, timeout_s: float) -> Any:
        """One unary call from any thread but the loop's; see call_async."""
        with start_span(method) as span:
            return LOOP.run(self.call_async(stub, method, request, timeout_s, headers=span.headers), timeout_s + 5)

    def explain(self, exc: grpc.aio.AioRpcError, what: str, timeout_s: float | None = None) -> GradwireError:
        """The exception of a failed call, in a sentence where the error came from grpc rather than the server."""
        error = from_rpc_error(exc)
        if error.reason:
            return error
        if exc.code() is grpc.StatusCode.UNAVAILABLE:
            details = exc.details() or ""
            why = why_hopeless(exc)
            if "failed to connect" in details and "Socket closed" in details:
                # All that a server says that wants TLS, or a certificate.
                why = f"it may want {'a client certificate' if self._tls else 'https://'}"
            error.message = f"{what}: no Gradwire server answers at {self.base_url}{why and f': {why}'} ({details})."
        elif exc.code() is grpc.StatusCode.UNIMPLEMENTED:
            error.message = f"{what}: the server at {self.base_url} does not offer this call; is it a Gradwire server?"
        elif exc.code() is grpc.StatusCode.DEADLINE_EXCEEDED and timeout_s is not None:
            error.message = f"{what}: no answer from {self.base_url} within {timeout_s:g} s."
        else:
            error.message = f"{what}: {self.base_url} answered {exc.code().name}: {exc.details()}"
        if exc.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            error.message += (proxy := proxy_used(self._target)) and f" {proxy}."
        return error

    async def close_async(self) -> None:
        """Closes what is open on the channel, then the channel; on the loop's thread."""
        for stream in list(self.streams):
            stream.close()
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    def close(self) -> None:
        """Closes the channel; calls under way fail. Does nothing in a forked child: the channel is its parent's."""
        if not LOOP.lost:
            LOOP.run(self.close_async(), 5)


def _connect_again(api_key: str | None, base_url: str, tls: ClientTls | None, connect_timeout_s: float) -> Connection:
    api_key = api_key or os.environ.get("GRADWIRE_API_KEY")
    return Connection(base_url, api_key, tls=tls, connect_timeout_s=connect_timeout_s)
