"""Refuses messages of unary requests that have more in some field than is taken, before their handlers see them."""

import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from gradwire.v1.trainer_service_pb2 import TrainRequest

from trainer_service.config import Limits
from trainer_service.request_limits import check_limits

_OPERATIONS = frozenset(
    f"/gradwire.v1.TrainerService/{field.message_type.name.removesuffix('Request')}"
    for field in TrainRequest.DESCRIPTOR.oneofs_by_name["operation"].fields
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
        """The call's handler behind the check; streams of requests are checked where they are read."""
        handler: Any = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or handler.request_streaming or not method.startswith("/gradwire.") or method in _OPERATIONS:
            return handler
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._streamed(handler.unary_stream), handler.request_deserializer, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            self._single(handler.unary_unary), handler.request_deserializer, handler.response_serializer
        )

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
