"""The store where ranks of several machines find one another: torch.distributed's Store, kept by the trainer.

torch's own TCPStore listens on every interface and lets in whoever comes. This one is asked over a unix socket that
only its user can open; other nodes pass their ranks' questions on, with the join token. It holds addresses of ranks
while they connect, some hundred bytes each.
"""

import asyncio
from collections.abc import Awaitable, Callable

import grpc
import grpc.aio
from gradwire.v1 import node_service_pb2
from gradwire.v1.node_service_pb2 import AccessRequest, AccessResponse

_SERVICE = node_service_pb2.DESCRIPTOR.services_by_name["RankStoreService"].full_name
_MAX_VALUES = 1 << 16
"""Keys of one start: some dozens a rank and process group."""
_MAX_VALUE_BYTES = 1 << 16
Access = Callable[[AccessRequest, grpc.aio.ServicerContext], Awaitable[AccessResponse]]


def rank_store_handler(access: Access) -> grpc.GenericRpcHandler:
    """The RankStoreService."""
    method = grpc.unary_unary_rpc_method_handler(
        access,
        request_deserializer=AccessRequest.FromString,
        response_serializer=AccessResponse.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(_SERVICE, {"Access": method})


class RankStores:
    """A store for each start of the worker that ranks may still ask about. For one event loop."""

    def __init__(self) -> None:
        self._stores: dict[str, dict[str, bytes]] = {}
        self._changed = asyncio.Event()

    def open(self, start_id: str) -> None:
        """Makes a start's store."""
        self._stores[start_id] = {}

    def close(self, start_id: str) -> None:
        """Forgets it; who waits for a key is told."""
        self._stores.pop(start_id, None)
        self._tell()

    async def access(self, request: AccessRequest, context: grpc.aio.ServicerContext) -> AccessResponse:
        """Serves RankStoreService.Access."""
        values = self._stores.get(request.start_id)
        if values is None:
            return await context.abort(grpc.StatusCode.NOT_FOUND, "This start of the worker is over.")
        match request.WhichOneof("access"):
            case "set":
                self._set(values, request.set.key, request.set.value)
            case "add":
                total = int(values.get(request.add.key, b"0")) + request.add.amount
                self._set(values, request.add.key, str(total).encode())
                return AccessResponse(sum=total)
            case "compare_set":
                exchange = request.compare_set
                if values.get(exchange.key, b"") == exchange.expected:
                    self._set(values, exchange.key, exchange.desired)
                return AccessResponse(values=[values.get(exchange.key, exchange.expected)])
            case "wait":
                return await self._wait(request, context)
            case "check":
                return AccessResponse(found=all(key in values for key in request.check.keys))
            case "delete":
                return AccessResponse(found=values.pop(request.delete, None) is not None)
            case _:
                return await context.abort(grpc.StatusCode.UNIMPLEMENTED, "The store knows no such access.")
        return AccessResponse()

    async def _wait(self, request: AccessRequest, context: grpc.aio.ServicerContext) -> AccessResponse:
        keys = request.wait.keys
        try:
            async with asyncio.timeout(request.wait.timeout_ms / 1000):
                while (values := self._stores.get(request.start_id)) is not None:
                    if all(key in values for key in keys):
                        return AccessResponse(values=[values[key] for key in keys])
                    await self._changed.wait()
        except TimeoutError:
            text = f"Nobody has set {', '.join(keys)} within {request.wait.timeout_ms / 1000:g} s."
            return await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, text)
        return await context.abort(grpc.StatusCode.NOT_FOUND, "This start of the worker is over.")

    def _set(self, values: dict[str, bytes], key: str, value: bytes) -> None:
        assert len(values) < _MAX_VALUES, "ranks set too many keys"
        assert len(value) <= _MAX_VALUE_BYTES, f"ranks set {key} to {len(value)} bytes"
        values[key] = value
        self._tell()

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
