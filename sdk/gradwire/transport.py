"""Channels to a trainer or a control plane, and the one background event loop all clients share."""

import asyncio
import atexit
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future as ConcurrentFuture
from concurrent.futures import TimeoutError as ConcurrentTimeoutError
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import grpc
import grpc.aio

from gradwire.errors import GradwireError, OperationTimeoutError, from_rpc_error
from gradwire.version import PROTOCOL_VERSION

logger = logging.getLogger("gradwire")

T = TypeVar("T")

_RETRIED_REASONS = {"", "WORKER_NOT_READY"}
"""Reasons of an UNAVAILABLE that pass by themselves; "" is grpc's own: nobody listens, or the connection broke."""
_CONNECT_TIMEOUT_S = 20.0
"""How long nobody may listen at all: a trainer listens within a second of its start, so a wrong address shows soon."""


def is_passing(error: GradwireError) -> bool:
    """Whether a call that failed so may be tried again as it is: the server is away, or not ready yet."""
    return error.code == grpc.StatusCode.UNAVAILABLE.value[0] and error.reason in _RETRIED_REASONS


class LoopThread:
    """An asyncio event loop on a daemon thread of its own, started on first use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def loop(self) -> asyncio.AbstractEventLoop:
        """The running loop."""
        with self._lock:
            if self._loop is None:
                loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=loop.run_forever, name="gradwire-loop", daemon=True)
                self._thread.start()
                self._loop = loop
            return self._loop

    def call_soon(self, callback: Callable[..., object], *args: object) -> None:
        """Runs `callback(*args)` on the loop; calls from one thread run in the order made."""
        self.loop().call_soon_threadsafe(callback, *args)

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> "ConcurrentFuture[T]":
        """Runs a coroutine on the loop, from any thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop())

    def run(self, coroutine: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """Runs a coroutine on the loop and waits for it; not to be called on the loop's own thread."""
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError(
                "A blocking Gradwire call was made on Gradwire's own event loop; make it on another thread."
            )
        future = self.submit(coroutine)
        try:
            return future.result(timeout_s)
        except ConcurrentTimeoutError:
            if future.done():
                raise
            future.cancel()
            raise OperationTimeoutError(f"No answer within {timeout_s:g} s.") from None
        except BaseException:
            # Ctrl-C while waiting: what was asked for is no longer wanted.
            future.cancel()
            raise

    def stop(self) -> None:
        """Ends the loop and its thread."""
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is None or thread is None or not thread.is_alive():
            return

        async def drain() -> None:
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        try:
            asyncio.run_coroutine_threadsafe(drain(), loop).result(2)
        except (ConcurrentTimeoutError, TimeoutError):
            logger.debug("The event loop did not drain within 2 s; it ends with the process.")
            return
        loop.call_soon_threadsafe(loop.stop)
        thread.join(2)

    def forget(self) -> None:
        """In a forked child, where the thread does not exist: start afresh on next use."""
        self._lock = threading.Lock()
        self._loop = self._thread = None


LOOP = LoopThread()
atexit.register(LOOP.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=LOOP.forget)


def parse_base_url(base_url: str) -> tuple[str, bool]:
    """(gRPC target, whether to use TLS) of a base_url.

    "https://host" is TLS on port 443 unless it names one; "http://host:port" and "host:port" are plaintext;
    "unix:/path" is a socket.

    Raises:
        ValueError: No host, no port where one is needed, or another scheme.
    """
    if base_url.startswith("unix:"):
        return base_url, False
    parts = urlsplit(base_url if "://" in base_url else f"http://{base_url}")
    if parts.scheme not in ("http", "https"):
        raise ValueError(
            f'base_url {base_url!r} has scheme "{parts.scheme}"; use "http://host:port" or "https://host".'
        )
    try:
        port = parts.port
    except ValueError:
        port = None
    if port is None and parts.scheme == "https":
        port = 443
    if not parts.hostname or port is None:
        raise ValueError(
            f'base_url {base_url!r} names no {"port" if parts.hostname else "host"}; use "http://host:port".'
        )
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{host}:{port}", parts.scheme == "https"


@dataclass(frozen=True)
class ClientTls:
    """PEM files of a client that speaks TLS."""

    ca_file: Path | None = None
    """Roots the server's certificate must come from; None takes the system's."""
    cert_file: Path | None = None
    """Certificate shown to a server that asks for one, and those between it and its root; None shows none."""
    key_file: Path | None = None
    """The certificate's private key."""

    @staticmethod
    def from_environment() -> "ClientTls":
        """GRADWIRE_TLS_CA_FILE, GRADWIRE_TLS_CERT_FILE and GRADWIRE_TLS_KEY_FILE."""

        def path(name: str) -> Path | None:
            value = os.environ.get(f"GRADWIRE_TLS_{name}_FILE")
            return Path(value) if value else None

        return ClientTls(ca_file=path("CA"), cert_file=path("CERT"), key_file=path("KEY"))

    def credentials(self) -> grpc.ChannelCredentials:
        """What grpc connects with.

        Raises:
            ValueError: A certificate without its key, or the other way round.
            OSError: A file cannot be read.
        """
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("A client certificate needs both cert_file and key_file.")
        ca, key, cert = (
            None if file is None else file.read_bytes() for file in (self.ca_file, self.key_file, self.cert_file)
        )
        return grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=cert)


class Connection:
    """A channel to one server, shared by every call and stream to it.

    Args:
        base_url: See parse_base_url.
        api_key: Sent as `authorization: Bearer …`; None sends none.
        tls: PEM files for an "https://" base_url; None reads them from the environment.

    Raises:
        ValueError: A base_url that leads nowhere, a key that cannot be sent, PEM files without "https://".
        OSError: A PEM file cannot be read.
    """

    def __init__(self, base_url: str, api_key: str | None = None, *, tls: ClientTls | None = None) -> None:
        self.base_url = base_url
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

    def channel(self) -> grpc.aio.Channel:
        """The channel; on the loop's thread only."""
        if self._channel is None:
            options = [
                # The server says its own limit and the SDK keeps to it; grpc's client-side 4 MiB would come first.
                ("grpc.max_receive_message_length", -1),
                ("grpc.max_send_message_length", -1),
                # A peer that vanished without a word is noticed within half a minute.
                ("grpc.keepalive_time_ms", 20_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 1_000),
                # Two clients in one process get a connection each, so that one's bulk does not delay the other.
                ("grpc.use_local_subchannel_pool", 1),
                # A megabyte and more in few system calls: grpc's defaults are made for small messages.
                ("grpc.http2.max_frame_size", 1 << 22),
                ("grpc.http2.lookahead_bytes", 1 << 24),
                ("grpc.http2.write_buffer_size", 1 << 22),
                ("grpc.experimental.tcp_read_chunk_size", 1 << 18),
                ("grpc.experimental.tcp_max_read_chunk_size", 1 << 22),
            ]
            if self._credentials is not None:
                self._channel = grpc.aio.secure_channel(self._target, self._credentials, options)
            else:
                self._channel = grpc.aio.insecure_channel(self._target, options)
        return self._channel

    async def call_async(self, stub: Callable[[Any], Any], method: str, request: Any, timeout_s: float) -> Any:
        """One unary call, on the loop's thread; tried again with back-off while the server is away or starting.

        Args:
            stub: The generated stub class.
            method: Name of the call.
            request: Its request message. The call must be safe to repeat.
            timeout_s: For all tries together.

        Raises:
            GradwireError: The server's error, or UnavailableError once the time is up, or nobody listened for 20 s.
        """
        deadline = time.monotonic() + timeout_s
        connect_deadline = time.monotonic() + min(timeout_s, _CONNECT_TIMEOUT_S)
        delay_s = 0.1
        while True:
            remaining_s = max(0.01, deadline - time.monotonic())
            try:
                return await getattr(stub(self.channel()), method)(request, metadata=self.metadata, timeout=remaining_s)
            except grpc.aio.AioRpcError as exc:
                error = self.explain(exc, method, timeout_s)
                if not is_passing(error):
                    raise error from None
                delay_s = error.retry_after_s or min(2.0, delay_s * 2)
                if error.reason:
                    connect_deadline = deadline  # Somebody listens; now it is only a matter of being ready.
                if time.monotonic() + delay_s >= min(deadline, connect_deadline):
                    raise error from None
            await asyncio.sleep(delay_s * random.uniform(0.8, 1.2))  # noqa: S311  (jitter, not a secret)

    def call(self, stub: Callable[[Any], Any], method: str, request: Any, *, timeout_s: float) -> Any:
        """One unary call from any thread but the loop's; see call_async."""
        return LOOP.run(self.call_async(stub, method, request, timeout_s), timeout_s + 5)

    def explain(self, exc: grpc.aio.AioRpcError, what: str, timeout_s: float | None = None) -> GradwireError:
        """The exception of a failed call, in a sentence where the error came from grpc rather than the server."""
        error = from_rpc_error(exc)
        if error.reason:
            return error
        if exc.code() is grpc.StatusCode.UNAVAILABLE:
            error.message = f"{what}: no Gradwire server answers at {self.base_url} ({exc.details()})."
        elif exc.code() is grpc.StatusCode.UNIMPLEMENTED:
            error.message = f"{what}: the server at {self.base_url} does not offer this call; is it a Gradwire server?"
        elif exc.code() is grpc.StatusCode.DEADLINE_EXCEEDED and timeout_s is not None:
            error.message = f"{what}: no answer from {self.base_url} within {timeout_s:g} s."
        else:
            error.message = f"{what}: {self.base_url} answered {exc.code().name}: {exc.details()}"
        return error

    async def close_async(self) -> None:
        """Closes the channel, on the loop's thread."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    def close(self) -> None:
        """Closes the channel; calls under way fail."""
        LOOP.run(self.close_async(), 5)
