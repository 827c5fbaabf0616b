"""Health of a joining machine, for a cluster's probes: whether it lives, and whether it has joined."""

import grpc.aio
from gradwire.v1 import node_service_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from trainer_service.open_files import connection_options
from trainer_service.ports import open_port

SERVICE = node_service_pb2.DESCRIPTOR.services_by_name["NodeService"].full_name
"""What is SERVING while the node has joined; "" is while the process lives."""
_PROBES = 64
"""Simultaneous connections."""


class NodeHealth:
    """Serves gRPC's health protocol, in plaintext and to everyone, as probes neither speak TLS nor have a token.

    Args:
        listen: host:port.
    """

    def __init__(self, listen: str) -> None:
        self._listen = listen
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Serves.

        Raises:
            OSError: The address cannot be used.
        """
        options = [*connection_options(_PROBES), ("grpc.so_reuseport", 0)]
        server = grpc.aio.server(options=options, maximum_concurrent_rpcs=2 * _PROBES)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        open_port(server, self._listen, None)
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        await self.set_joined(False)
        await server.start()
        self._server = server

    async def set_joined(self, joined: bool) -> None:
        """Sets what is answered for SERVICE."""
        status = health_pb2.HealthCheckResponse.SERVING if joined else health_pb2.HealthCheckResponse.NOT_SERVING
        await self._health.set(SERVICE, status)

    async def stop(self) -> None:
        """Answers no more."""
        if self._server is not None:
            await self._server.stop(grace=None)
