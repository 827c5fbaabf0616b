"""Channels to a trainer or a control plane, and the one background event loop all clients share."""

import asyncio
import atexit
import logging
import multiprocessing.context
import os
import random
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future as ConcurrentFuture
from concurrent.futures import TimeoutError as ConcurrentTimeoutError
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import grpc
import grpc.aio

from gradwire.errors import FailedPreconditionError, GradwireError, OperationTimeoutError, from_rpc_error
from gradwire.forks import keep_for_ever
from gradwire.proxies import proxy_used, reaches_this_machine
from gradwire.version import PROTOCOL_VERSION

logger = logging.getLogger("gradwire")

T = TypeVar("T")

_RETRIED_REASONS = {"", "WORKER_NOT_READY"}
"""Reasons of an UNAVAILABLE that pass by themselves; "" is grpc's own: nobody listens, or the connection broke."""
_SETTLED = {
    "CERTIFICATE_VERIFY_FAILED": "its certificate does not come from a root trusted here; name its root, ca_file or "
    "GRADWIRE_TLS_CA_FILE",
    "Hostname Verification Check failed": "its certificate is for another host name",
    "WRONG_VERSION_NUMBER": "it does not speak TLS; use http://",
    "HTTP proxy returned response code 4": "the proxy refuses to connect there",
}
"""What grpc says of connections that no waiting will make, and what that means."""


def is_passing(error: GradwireError) -> bool:
    """Whether a call that failed so may be tried again as it is: the server is away, or not ready yet."""
    return error.code == grpc.StatusCode.UNAVAILABLE.value[0] and error.reason in _RETRIED_REASONS


class LoopThread:
    """An asyncio event loop on a daemon thread of its own, started on first use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self.lost = False
        """Whether this process is a fork of one whose loop ran: then none will run here."""

    def loop(self) -> asyncio.AbstractEventLoop:
        """The running loop.

        Raises:
            FailedPreconditionError: This process was forked from one whose loop ran.
        """
        self.refuse_if_lost()
        with self._lock:
            if self._loop is None:
                loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=loop.run_forever, name="gradwire-loop", daemon=True)
                self._thread.start()
                self._loop = loop
            return self._loop

    def refuse_if_lost(self) -> None:
        """Raises FailedPreconditionError where no loop can run; see `lost`."""
        if self.lost:
            raise FailedPreconditionError(
                "This process was forked from one that had already called a Gradwire server, and gRPC connections do "
                "not survive a fork; the parent is not disturbed. Start such processes with "
                'multiprocessing.get_context("spawn") or "forkserver" (for torch, '
                'DataLoader(multiprocessing_context="spawn")), and give them a base_url or a pickled SamplingClient; '
                "or fork before the first call."
            )

    def call_soon(self, callback: Callable[..., object], *args: object) -> None:
        """Runs `callback(*args)` on the loop; calls from one thread run in the order made."""
        self.loop().call_soon_threadsafe(callback, *args)

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> "ConcurrentFuture[T]":
        """Runs a coroutine on the loop, from any thread."""
        try:
            loop = self.loop()
        except BaseException:
            coroutine.close()
            raise
        return asyncio.run_coroutine_threadsafe(coroutine, loop)

    def start(self, coroutine: Coroutine[Any, Any, T], name: str) -> "asyncio.Task[T]":
        """Runs a coroutine on the loop, from the loop's own thread. It lives until it is over, whoever forgets it."""
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        # A loop refers to its tasks only weakly.
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

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
        """In a forked child, where the thread does not exist: a loop that ran is not touched again."""
        self._lock = threading.Lock()
        loop, self._loop, self._thread = self._loop, None, None
        if loop is not None:
            self.lost = True
            keep_for_ever([loop, *asyncio.all_tasks(loop), *_CONNECTIONS])


LOOP = LoopThread()
_CONNECTIONS: "weakref.WeakSet[Connection]" = weakref.WeakSet()
atexit.register(LOOP.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=LOOP.forget)


class Closable(Protocol):
    """What ends with its connection."""

    def close(self) -> None:
        """Ends it, on the loop's thread."""
        ...


def parse_base_url(base_url: str) -> tuple[str, bool]:
    """(gRPC target, whether to use TLS) of a base_url.

    "https://host" is TLS on port 443 unless it names one; "http://host:port" and "host:port" are plaintext;
    "unix:/path" is a socket.

    Raises:
        ValueError: No host, no port where one is needed, or another scheme.
    """
    if base_url.startswith("unix:"):
        return base_url, False
    try:
        parts = urlsplit(base_url if "://" in base_url else f"http://{base_url}")
    except ValueError as exc:
        raise ValueError(f'base_url {base_url!r} is no URL: {exc}; use "http://host:port".') from None
    if parts.scheme not in ("http", "https"):
        raise ValueError(
            f'base_url {base_url!r} has scheme "{parts.scheme}"; use "http://host:port" or "https://host".'
        )
    try:
        port = parts.port
    except ValueError:
        raise ValueError(f"base_url {base_url!r} has a port that is none; ports are 0 to 65535.") from None
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
    """Roots, and a certificate of its own, of a client that speaks TLS."""

    ca_file: Path | None = None
    """Roots the server's certificate must come from; None takes the system's."""
    cert_file: Path | None = None
    """Certificate shown to a server that asks for one, and those between it and its root; None shows none."""
    key_file: Path | None = None
    """The certificate's private key."""
    ca_pem: str | None = None
    """Roots as text in place of ca_file, such as TrainerJob.ca_certificate."""

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
            ValueError: A certificate without its key, or the other way round; a file that holds neither.
            OSError: A file cannot be read.
        """
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError(
                "A client certificate needs both cert_file and key_file, or GRADWIRE_TLS_CERT_FILE and "
                "GRADWIRE_TLS_KEY_FILE."
            )
        ca, key, cert = (
            None if file is None else file.read_bytes() for file in (self.ca_file, self.key_file, self.cert_file)
        )
        if self.ca_pem is not None:
            if self.ca_file is not None:
                raise ValueError("ca_file and ca_pem are both given; the roots are in one of them.")
            ca = self.ca_pem.encode()
        _check_pem(self, ca)
        return grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=cert)


def _check_pem(tls: ClientTls, ca: bytes | None) -> None:
    """Says what is wrong with PEM files; grpc would only say, and only when it connects, that it cannot."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # Whether a key is long enough is for the server to judge.
    context.set_ciphers("DEFAULT@SECLEVEL=0")
    try:
        if ca is not None:
            context.load_verify_locations(cadata=ca.decode("ascii", "ignore"))
    except ssl.SSLError as exc:
        where = "ca_pem" if tls.ca_file is None else f"ca_file {tls.ca_file}"
        raise ValueError(f"{where} has no PEM certificate in it.") from exc
    # What a shell hands over as a pipe can be read only once.
    if tls.cert_file is None or tls.key_file is None or not (tls.cert_file.is_file() and tls.key_file.is_file()):
        return
    try:
        # Without a password it would be asked for on the terminal.
        context.load_cert_chain(tls.cert_file, tls.key_file, password="")
    except ssl.SSLError as exc:
        raise ValueError(
            f"cert_file {tls.cert_file} and key_file {tls.key_file} are not a PEM certificate and its private key; "
            "the key must not be encrypted."
        ) from exc


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
        _CONNECTIONS.add(self)

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
                # A proxy would look for "this machine" on its own.
                ("grpc.enable_http_proxy", 0 if reaches_this_machine(self._target) else 1),
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
            GradwireError: The server's error, or UnavailableError: the time is up, nobody has listened for
                connect_timeout_s, or TLS does not come about.
        """
        deadline = time.monotonic() + timeout_s
        connect_deadline = time.monotonic() + min(timeout_s, self._connect_timeout_s)
        delay_s = 0.1
        while True:
            remaining_s = max(0.01, deadline - time.monotonic())
            try:
                return await getattr(stub(self.channel()), method)(request, metadata=self.metadata, timeout=remaining_s)
            except grpc.aio.AioRpcError as exc:
                error = self.explain(exc, method, timeout_s)
                if not is_passing(error) or _settled(exc):
                    raise error from None
                delay_s = error.retry_after_s or min(2.0, delay_s * 2)
                if error.reason:
                    connect_deadline = deadline  # Somebody listens; now it is only a matter of being ready.
                if time.monotonic() + delay_s >= min(deadline, connect_deadline):
                    raise error from None
            await asyncio.sleep(delay_s * random.uniform(0.8, 1.2))  # noqa: S311  (jitter, not a secret)

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
        return LOOP.run(self.call_async(stub, method, request, timeout_s), timeout_s + 5)

    def explain(self, exc: grpc.aio.AioRpcError, what: str, timeout_s: float | None = None) -> GradwireError:
        """The exception of a failed call, in a sentence where the error came from grpc rather than the server."""
        error = from_rpc_error(exc)
        if error.reason:
            return error
        if exc.code() is grpc.StatusCode.UNAVAILABLE:
            details = exc.details() or ""
            why = _settled(exc)
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
        """Closes the channel; calls under way fail. In a forked child, whose parent's it is, does nothing."""
        if not LOOP.lost:
            LOOP.run(self.close_async(), 5)


def _connect_again(api_key: str | None, base_url: str, tls: ClientTls | None, connect_timeout_s: float) -> Connection:
    api_key = api_key or os.environ.get("GRADWIRE_API_KEY")
    return Connection(base_url, api_key, tls=tls, connect_timeout_s=connect_timeout_s)


def _settled(exc: grpc.aio.AioRpcError) -> str:
    """Why a connection will not be made, however often it is tried; "" for all that may yet be."""
    return next((why for said, why in _SETTLED.items() if said in (exc.details() or "")), "")
