"""One of our gRPC servers: its port, TLS, limits on peers, health, reflection and shutdown."""

import logging
from typing import TYPE_CHECKING

import grpc
import grpc.aio
from gradwire._wire.protocol_version import __version__
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from trainer_service import open_files
from trainer_service.access import ApiKeys
from trainer_service.addresses import listens_on_loopback
from trainer_service.config import GrpcServerConfig
from trainer_service.metrics import Metrics
from trainer_service.ports import open_port
from trainer_service.rpc.border import Border
from trainer_service.rpc.request_checks import RequestChecks

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

logger = logging.getLogger(__name__)

_PROBES = 64
"""Simultaneous connections to the health port."""
_WINDOW_BYTES = 1 << 17
"""How much a call may send before we read it, and up to 1 MiB more while its message arrives: enough for 190 Mbit/s at
a round trip of 50 ms. The larger windows that grpc's bandwidth probe opens made nothing faster on one machine, and a
flood of calls fills one window for each call."""
_MAX_PENDING_CALLS = 1500
"""Calls that wait for the event loop, over all connections; gRPC refuses more."""
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class GrpcServer:
    """Serves our services behind a border. Add servicers to `server`, bind it, then start it.

    Args:
        config: Where and how it listens.
        api_keys: The keys it accepts.
        metrics: Counts its calls.
        max_message_bytes: The largest message it accepts.
        max_calls: How many calls one client must be able to run at once.
        reserved_descriptors: File descriptors kept for anything but client connections.
        checks: Checks the fields of messages; None accepts any.
        tracer: Makes a span of each call; None of none.

    Raises:
        SettingsError: The limit on open files is too low.
    """

    def __init__(
        self,
        config: GrpcServerConfig,
        *,
        api_keys: ApiKeys,
        metrics: Metrics,
        max_message_bytes: int,
        max_calls: int,
        reserved_descriptors: int,
        checks: RequestChecks | None = None,
        tracer: "Tracer | None" = None,
    ) -> None:
        self._config = config
        self._api_keys = api_keys
        border = Border(
            api_keys=api_keys, metrics=metrics, max_message_bytes=max_message_bytes, checks=checks, tracer=tracer
        )
        options = _options(
            max_message_bytes=max_message_bytes,
            max_connections=open_files.max_connections(reserved=reserved_descriptors),
            max_calls=max_calls,
        )
        self.server = grpc.aio.server(interceptors=[border], options=options)
        """What servicers are added to."""
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
        self._health_server: grpc.aio.Server | None = None
        self.address = ""
        """host:port it listens on, once bound."""

    def bind(self, *services: str, reflected: bool = True) -> None:
        """Binds its ports, and adds the health service.

        Args:
            services: Full names of its services.
            reflected: Whether clients such as grpcurl can list and describe them.

        Raises:
            OSError: An address cannot be used.
        """
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        if reflected:
            reflection.enable_server_reflection((*services, health.SERVICE_NAME, reflection.SERVICE_NAME), self.server)
        self.address = open_port(self.server, self._config.listen, self._config.tls)
        if self._config.health_listen is not None:
            # In plaintext and without a border: a cluster's probes neither speak TLS nor have a key.
            options = _options(max_message_bytes=1024, max_connections=_PROBES, max_calls=1)
            self._health_server = grpc.aio.server(options=options, maximum_concurrent_rpcs=2 * _PROBES)
            health_pb2_grpc.add_HealthServicer_to_server(self._health, self._health_server)
            open_port(self._health_server, self._config.health_listen, None)

    async def start(self) -> None:
        """Serves. Health reports SERVING for "" from now on."""
        await self.set_serving("", True)
        if self._health_server is not None:
            await self._health_server.start()
        await self.server.start()
        keys_in_plaintext = self._config.tls is None and self._api_keys.required
        if keys_in_plaintext and not listens_on_loopback(self._config.listen):
            logger.warning("API keys cross the network in plaintext; give --tls-cert-file, or put TLS in front.")
        logger.info("Listening.", extra={"fields": {"address": self.address, "version": __version__}})

    async def set_serving(self, service: str, serving: bool) -> None:
        """Sets what health checks of a service answer; "" stands for the process."""
        await self._health.set(service, _SERVING if serving else _NOT_SERVING)

    async def stop_serving(self) -> None:
        """Answers every health check with NOT_SERVING from now on; it still accepts calls."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, *, grace_s: float) -> None:
        """Accepts no more calls; those under way have grace_s to end."""
        await self.server.stop(grace=grace_s)
        if self._health_server is not None:
            await self._health_server.stop(grace=None)


def _options(*, max_message_bytes: int, max_connections: int, max_calls: int) -> list[tuple[str, int]]:
    """How much a server accepts from a peer before anything checks it, as gRPC channel arguments."""
    return [
        *open_files.connection_options(max_connections),
        # Twice the limit, so that a message slightly over it gets our error rather than grpc's.
        ("grpc.max_receive_message_length", 2 * max_message_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.so_reuseport", 0),
        # Further calls of a connection wait at the client, which knows the limit.
        ("grpc.max_concurrent_streams", max_calls + 128),
        ("grpc.server.max_pending_requests", _MAX_PENDING_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", _MAX_PENDING_CALLS),
        # No compression: a few hundred kilobytes of gzip become hundreds of megabytes before anything checks them.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        ("grpc.per_message_decompression", 0),
        # A megabyte or more in a few system calls: grpc's defaults suit small messages.
        ("grpc.http2.max_frame_size", 1 << 22),
        ("grpc.http2.lookahead_bytes", _WINDOW_BYTES),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.write_buffer_size", 1 << 22),
        ("grpc.experimental.tcp_read_chunk_size", 1 << 18),
        ("grpc.experimental.tcp_max_read_chunk_size", 1 << 22),
        # Clients ping to notice a dead server; by default grpc would disconnect them for it.
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 20_000),
    ]
