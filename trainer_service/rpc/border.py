"""What every call passes through: key, protocol version, request id, error translation, log and metrics."""

import asyncio
import contextlib
import inspect
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import grpc
import grpc.aio
from google.protobuf.message import Message
from gradwire._wire.protocol_version import check_client
from gradwire.errors import GradwireError, error, to_status
from grpc_status import rpc_status

from trainer_service.access import ANYBODY, ApiKeys, Caller, current_caller
from trainer_service.logs import request_id
from trainer_service.metrics import Metrics
from trainer_service.rpc.bounded_messages import Malformed, Messages, Received
from trainer_service.rpc.request_checks import RequestChecks
from trainer_service.tracing import traced_call

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

logger = logging.getLogger(__name__)

_OPEN_SERVICES = ("/grpc.health.v1.Health/",)
"""Probes have no key, and health reveals nothing worth protecting."""

_QUIET_METHODS = {
    "/grpc.health.v1.Health/Check",
    *(
        f"/gradwire.v1.TrainerService/{name}"
        for name in ("GetServerInfo", "GetRun", "GetAnswer", "GetMetrics", "ListRuns")
    ),
    *(f"/gradwire.v1.TrainerJobService/{name}" for name in ("GetTrainerJob", "ListTrainerJobs")),
}
"""Polled by clients that wait; logged only when they fail."""
_UNTRACED_METHODS = {*_QUIET_METHODS, "/gradwire.v1.TrainerService/Train"}
"""Train carries a run's operations for hours: each has a span of its own."""
_MAX_STATUS_BYTES = 1500
"""A status travels in HTTP/2 headers, twice (as text and as details); peers accept 8 KiB of headers."""
_PLAIN = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")
"""Characters that take one byte in a header; each byte of any other takes three."""
_MAX_CALL_ID_CHARS = 64
REVOCATION_POLL_S = 1.0
"""How long a stream can outlive its key."""


class Border(grpc.aio.ServerInterceptor):
    """Wraps every handler of a server.

    Args:
        api_keys: The keys it accepts.
        metrics: Counts calls.
        max_message_bytes: The largest message it accepts; the error for a larger one names the limit.
        checks: Checks the fields of messages; None accepts any.
        tracer: Makes a span of each call; None of none.
    """

    def __init__(
        self,
        *,
        api_keys: ApiKeys,
        metrics: Metrics,
        max_message_bytes: int,
        checks: RequestChecks | None = None,
        tracer: "Tracer | None" = None,
    ) -> None:
        self._api_keys = api_keys
        self._metrics = metrics
        self._tracer = tracer
        self._messages = Messages(max_message_bytes=max_message_bytes, checks=checks)
        self._streams: dict[asyncio.Timeout, Caller] = {}
        """Streamed answers under way: what ends each, and whose key opened it."""
        self._watch: asyncio.Task[None] | None = None

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The call's handler with everything around it."""
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return handler
        method = handler_call_details.method
        metadata = dict(handler_call_details.invocation_metadata or ())
        call_id = str(metadata.get("gradwire-request-id", ""))[:_MAX_CALL_ID_CHARS] or uuid.uuid4().hex[:16]
        try:
            call = _Call(method, call_id, self._caller(method, metadata), metadata)
            if "gradwire-protocol-version" in metadata and not method.startswith(_OPEN_SERVICES):
                check_client(str(metadata["gradwire-protocol-version"]))
        except GradwireError as exc:
            return self._refusing(_Call(method, call_id, ANYBODY), exc)
        return self._passed(handler, call)

    def _refusing(self, call: "_Call", refusal: GradwireError) -> grpc.RpcMethodHandler:
        """A handler that reads nothing. It can replace a handler of any kind, since a handler of streams runs before
        anything of the call is read. A flood of strangers costs no more than this, so it sends everything in one
        batch."""

        async def refused(_: Any, context: grpc.aio.ServicerContext) -> None:
            async with self._passing(call, context):
                context.set_trailing_metadata(call.metadata)
                raise refusal

        return grpc.stream_stream_rpc_method_handler(refused)

    def _passed(self, handler: Any, call: "_Call") -> grpc.RpcMethodHandler:
        """A handler with everything around it. It also reads the only message of a unary request: grpc would read that
        before it calls the handler."""
        behaviour = getattr(handler, _KINDS[handler.request_streaming, handler.response_streaming])
        message_type: type[Message] = handler.request_deserializer.__self__

        def requests(messages: Any, context: grpc.aio.ServicerContext) -> contextlib.AbstractAsyncContextManager[Any]:
            if handler.request_streaming:
                return contextlib.nullcontext(_unwrapped(messages))
            if call.caller is ANYBODY and self._api_keys.required:
                return self._messages.only_one_without_key(context, message_type, call.method)
            return self._messages.only_one(context, message_type, call.caller.owner, call.method)

        async def unary(messages: Any, context: grpc.aio.ServicerContext) -> Any:
            async with self._passing(call, context), self._traced(call):
                await context.send_initial_metadata(call.metadata)
                async with requests(messages, context) as request:
                    return await behaviour(request, context)

        async def streamed(messages: Any, context: grpc.aio.ServicerContext) -> None:
            async with self._passing(call, context), self._while_key_opens(call.caller), self._traced(call):
                await context.send_initial_metadata(call.metadata)
                await respond(messages, context)

        async def respond(messages: Any, context: grpc.aio.ServicerContext) -> None:
            async with requests(messages, context) as request:
                if not inspect.isasyncgenfunction(behaviour):
                    await behaviour(request, context)
                    return
                # Written here rather than yielded to grpc: nothing here could end its wait for the client.
                async with contextlib.aclosing(behaviour(request, context)) as responses:
                    async for response in responses:
                        await context.write(response)

        def received(data: bytes) -> Received | Malformed:
            try:
                return self._messages.received(data, message_type)
            except GradwireError as exc:
                return Malformed(exc)

        streams = handler.response_streaming
        make = grpc.stream_stream_rpc_method_handler if streams else grpc.stream_unary_rpc_method_handler
        return make(
            streamed if streams else unary,
            request_deserializer=received if handler.request_streaming else None,
            response_serializer=_unless_encoded(handler.response_serializer),
        )

    @contextlib.asynccontextmanager
    async def _passing(self, call: "_Call", context: grpc.aio.ServicerContext) -> AsyncGenerator[None]:
        """Turns a call's exception into a status, and counts and logs the call."""
        request_id.set(call.call_id)
        current_caller.set(call.caller)
        start = time.perf_counter()
        code = "OK"
        try:
            yield
        except GradwireError as exc:
            code = _code_name(exc)
            await _abort(context, exc)
        except grpc.aio.AbortError:
            code = "ABORTED"
            raise
        except grpc.aio.InternalError as exc:
            # The connection broke during the answer. grpc logs a traceback for anything but a cancellation.
            code = "ABORTED"
            raise asyncio.CancelledError from exc
        except Exception:
            code = "INTERNAL"
            logger.exception("A call failed.", extra={"fields": {"method": call.method}})
            text = f"Internal error in the trainer; its log has the details under request id {call.call_id}."
            await _abort(context, error("INTERNAL", text, request_id=call.call_id))
        except asyncio.CancelledError:
            # The client went away, as it may.
            code = "CANCELLED"
            raise
        finally:
            self._metrics.calls.labels(call.method, code).inc()
            took_ms = round((time.perf_counter() - start) * 1000, 2)
            level = logging.DEBUG if code == "OK" and call.method in _QUIET_METHODS else logging.INFO
            fields = {"method": call.method, "code": code, "ms": took_ms}
            if call.caller.name:
                fields["key"] = call.caller.name
            logger.log(level, "Call.", extra={"fields": fields})

    @contextlib.asynccontextmanager
    async def _traced(self, call: "_Call") -> AsyncGenerator[None]:
        with traced_call(None if call.method in _UNTRACED_METHODS else self._tracer, call.method, call.sent):
            yield

    @contextlib.asynccontextmanager
    async def _while_key_opens(self, caller: Caller) -> AsyncGenerator[None]:
        """Ends the body soon after the caller's key is revoked.

        Raises:
            UnauthenticatedError: INVALID_API_KEY: the key was revoked.
        """
        if caller is ANYBODY:
            yield
            return
        end = asyncio.timeout(None)
        try:
            async with end:
                self._streams[end] = caller
                if self._watch is None or self._watch.done():
                    self._watch = asyncio.create_task(self._end_revoked(), name="revoked-keys")
                try:
                    yield
                finally:
                    self._streams.pop(end, None)
        except TimeoutError:
            if not end.expired():
                raise
            raise error("INVALID_API_KEY", "The API key of this stream was revoked.") from None

    async def _end_revoked(self) -> None:
        """Checks the keys of all streams as long as there are any: a changed key file sends no event."""
        while self._streams:
            await asyncio.sleep(REVOCATION_POLL_S)
            for end, caller in list(self._streams.items()):
                if not self._api_keys.still_opens(caller):
                    del self._streams[end]
                    end.reschedule(asyncio.get_running_loop().time())

    def _caller(self, method: str, metadata: dict[str, Any]) -> Caller:
        """Who calls.

        Raises:
            UnauthenticatedError: INVALID_API_KEY: the call needs a key and has none that we know.
        """
        if not self._api_keys.required:
            return ANYBODY
        got = str(metadata.get("authorization", "")).removeprefix("Bearer ")
        caller = self._api_keys.find(got)
        if caller is not None:
            return caller
        if method.startswith(_OPEN_SERVICES):
            return ANYBODY
        what = "is not one this server knows" if got else "is missing"
        text = f"The API key {what}; send it as metadata `authorization: Bearer <key>`."
        raise error("INVALID_API_KEY", text)


@dataclass(frozen=True)
class _Call:
    """What is known of a call before anything of it is read."""

    method: str
    call_id: str
    caller: Caller
    sent: Mapping[str, Any] = field(default_factory=dict)
    """Metadata of a caller that was let in."""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Metadata sent with the answer."""
        return (("gradwire-request-id", self.call_id),)


_KINDS = {
    (False, False): "unary_unary",
    (False, True): "unary_stream",
    (True, False): "stream_unary",
    (True, True): "stream_stream",
}
"""The attribute that holds a handler's function, by whether requests and responses stream."""


async def _unwrapped(messages: AsyncIterator[Any]) -> AsyncGenerator[Any]:
    """The messages of a stream, without their encodings.

    Raises:
        GradwireError: A message could not be read.
    """
    async for message in messages:
        if isinstance(message, Malformed):
            raise message.exc
        yield message.message


def _unless_encoded(serialize: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    """Lets a handler return either a message or an encoded one."""
    return lambda answer: answer if isinstance(answer, bytes) else serialize(answer)


async def _abort(context: grpc.aio.ServicerContext, exc: GradwireError) -> None:
    message = to_status(exc)
    text = _cut(exc.message)
    if text != exc.message or message.ByteSize() > 2 * _MAX_STATUS_BYTES:
        message = to_status(error(exc.reason or "INTERNAL", f"{text}…", retry_after_s=exc.retry_after_s))
    status: Any = rpc_status.to_status(message)
    trailing = (*(context.trailing_metadata() or ()), *status.trailing_metadata)
    try:
        await context.abort(status.code, status.details, trailing)
    except grpc.aio.InternalError as broken:
        # The call is already over, for example after a message that grpc itself refused: nobody listens.
        raise asyncio.CancelledError from broken


def _cut(text: str) -> str:
    """As much of a text as fits into a status."""
    left = _MAX_STATUS_BYTES
    for place, character in enumerate(text):
        left -= len(quote(character, safe=_PLAIN, errors="replace"))
        if left < 0:
            return text[:place]
    return text


def _code_name(exc: GradwireError) -> str:
    return next(code.name for code in grpc.StatusCode if code.value[0] == exc.code)
