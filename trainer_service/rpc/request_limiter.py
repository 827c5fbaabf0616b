"""Refuses messages with more fields, or more in some field, than is taken, before they are parsed or handled."""

import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.descriptor import Descriptor
from gradwire.v1 import checkpoint_service_pb2, sampling_service_pb2, trainer_service_pb2

from trainer_service.config import Limits
from trainer_service.request_limits import check_limits, check_num_fields

_REQUESTS: dict[str, Descriptor] = {
    f"/{service.full_name}/{method.name}": method.input_type
    for file in (checkpoint_service_pb2, sampling_service_pb2, trainer_service_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
"""Type of each call's requests."""

_OPERATIONS = frozenset(
    f"/gradwire.v1.TrainerService/{field.message_type.name.removesuffix('Request')}"
    for field in trainer_service_pb2.TrainRequest.DESCRIPTOR.oneofs_by_name["operation"].fields
    if field.message_type is not None
)
"""Operations of runs: a refused one takes its place in the run's order all the same, so the run refuses it."""


class RequestLimiter(grpc.aio.ServerInterceptor):
    """Stands behind the border, which knows who calls and turns refusals into statuses.

    Args:
        limits: The most a client may send.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The call's handler behind the checks. What is in the fields of a stream's messages is checked where they are
        read."""
        handler: Any = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith("/gradwire."):
            return handler
        serializers = self._counting(handler.request_deserializer, _REQUESTS[method]), handler.response_serializer
        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(handler.stream_stream, *serializers)
        checked = method not in _OPERATIONS
        if handler.response_streaming:
            behaviour = self._streamed(handler.unary_stream) if checked else handler.unary_stream
            return grpc.unary_stream_rpc_method_handler(behaviour, *serializers)
        behaviour = self._single(handler.unary_unary) if checked else handler.unary_unary
        return grpc.unary_unary_rpc_method_handler(behaviour, *serializers)

    def _counting(self, deserialize: Callable[[bytes], Any], descriptor: Descriptor) -> Callable[[bytes], Any]:
        def counting(encoded: bytes) -> Any:
            check_num_fields(encoded, descriptor, self._limits)
            return deserialize(encoded)

        return counting

    def _single(self, behaviour: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def checked(request: Any, context: Any) -> Any:
            check_limits(request, self._limits)
            return await behaviour(request, context)

        return checked

    def _streamed(self, behaviour: Callable[..., AsyncGenerator[Any]]) -> Callable[..., AsyncGenerator[Any]]:
        async def checked(request: Any, context: Any) -> AsyncGenerator[Any]:
            check_limits(request, self._limits)
            async with contextlib.aclosing(behaviour(request, context)) as responses:
                async for response in responses:
                    yield response

        return checked
