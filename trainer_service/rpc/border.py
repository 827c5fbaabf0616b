"""What every call passes: key, protocol version, request id, error translation, log and metrics."""

import asyncio
import contextlib
import inspect
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import grpc
import grpc.aio
from gradwire.errors import GradwireError, error, to_status
from gradwire.version import PROTOCOL_VERSION
from grpc_status import rpc_status

from trainer_service.access import ANYBODY, ApiKeys, Caller, current_caller
from trainer_service.config import MIN_PROTOCOL_VERSION
from trainer_service.observability import Metrics, request_id

logger = logging.getLogger(__name__)

_OPEN_SERVICES = ("/grpc.health.v1.Health/",)
"""Probes have no key, and health says nothing worth one."""


_QUIET_METHODS = {f"/gradwire.v1.TrainerService/{name}" for name in ("GetServerInfo", "GetRun", "ListRuns")} | {
    f"/gradwire.v1.TrainerJobService/{name}" for name in ("GetTrainerJob", "ListTrainerJobs")
}
"""Asked again and again by those who wait; logged only when they fail."""
_MAX_STATUS_BYTES = 1500
"""A status travels in HTTP/2 headers, twice (as text and as details); peers take 8 KiB of them."""
_PLAIN = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")
"""What takes one byte in a header; of everything else each byte takes three."""
_MAX_CALL_ID_CHARS = 64
REVOCATION_POLL_S = 1.0
"""How long a stream may outlive its key."""


class Malformed:
    """Stands for a message that could not be read, so that the call ends with a sentence instead of a traceback."""

    def __init__(self, exc: GradwireError) -> None:
        self.exc = exc


@dataclass(frozen=True)
class Received:
    """A message of a stream, with its encoding, so that it can be handed on without encoding it again."""

    message: Any
    encoded: bytes


class Border(grpc.aio.ServerInterceptor):
    """Wraps every handler of a server.

    Args:
        api_keys: Keys that open the server.
        metrics: Counts calls.
        max_message_bytes: Largest message taken; a larger one is refused saying so.
    """

    def __init__(self, *, api_keys: ApiKeys, metrics: Metrics, max_message_bytes: int) -> None:
        self._api_keys = api_keys
        self._metrics = metrics
        self._max_message_bytes = max_message_bytes
        self._streams: dict[asyncio.Timeout, Caller] = {}
        """Answers that stream, each by what ends it, and whose key opened it."""
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
        caller = self._caller(method, metadata)
        refusal = caller if isinstance(caller, GradwireError) else self._refusal(method, metadata)
        who = ANYBODY if isinstance(caller, GradwireError) else caller
        call_id = str(metadata.get("gradwire-request-id", ""))[:_MAX_CALL_ID_CHARS] or uuid.uuid4().hex[:16]
        if refusal is None and not method.startswith("/gradwire."):
            return handler
        kind, make = _KINDS[handler.request_streaming, handler.response_streaming]
        behaviour = getattr(handler, kind)

        async def wrapped(request: Any, context: grpc.aio.ServicerContext) -> Any:
            async with self._passing(method, call_id, who, refusal, request, context):
                return await behaviour(request, context)

        async def streamed(request: Any, context: grpc.aio.ServicerContext) -> None:
            async with self._passing(method, call_id, who, refusal, request, context), self._while_key_opens(who):
                if not inspect.isasyncgenfunction(behaviour):
                    await behaviour(request, context)
                    return
                # Written here rather than yielded to grpc, whose waiting for the client nothing here could end.
                async with contextlib.aclosing(behaviour(request, context)) as responses:
                    async for response in responses:
                        await context.write(response)

        return make(
            streamed if handler.response_streaming else wrapped,
            request_deserializer=self._careful(handler.request_deserializer, handler.request_streaming),
            response_serializer=_unless_encoded(handler.response_serializer),
        )

    @contextlib.asynccontextmanager
    async def _passing(
        self,
        method: str,
        call_id: str,
        caller: Caller,
        refusal: GradwireError | None,
        request: Any,
        context: grpc.aio.ServicerContext,
    ) -> AsyncGenerator[None]:
        """What happens around a call: refuses it, turns its exception into a status, counts and logs it."""
        request_id.set(call_id)
        current_caller.set(caller)
        start = time.perf_counter()
        code = "OK"
        try:
            await context.send_initial_metadata((("gradwire-request-id", call_id),))
            if refusal is not None:
                raise refusal
            if isinstance(request, Malformed):
                raise request.exc
            yield
        except GradwireError as exc:
            code = _code_name(exc)
            await _abort(context, exc)
        except (grpc.aio.AbortError, grpc.aio.BaseError):
            # Aborted by the handler, or the connection broke while it answered.
            code = "ABORTED"
            raise
        except Exception:
            code = "INTERNAL"
            logger.exception("A call failed.", extra={"fields": {"method": method}})
            text = f"A fault inside the trainer; its log has the details under request id {call_id}."
            await _abort(context, error("INTERNAL", text, request_id=call_id))
        except asyncio.CancelledError:
            # The client went away, which is its right.
            code = "CANCELLED"
            raise
        finally:
            self._metrics.calls.labels(method, code).inc()
            took_ms = round((time.perf_counter() - start) * 1000, 2)
            level = logging.DEBUG if code == "OK" and method in _QUIET_METHODS else logging.INFO
            fields = {"method": method, "code": code, "ms": took_ms}
            if caller.name:
                fields["key"] = caller.name
            logger.log(level, "Call.", extra={"fields": fields})

    @contextlib.asynccontextmanager
    async def _while_key_opens(self, caller: Caller) -> AsyncGenerator[None]:
        """Ends what it surrounds soon after the key it came with was revoked.

        Raises:
            UnauthenticatedError: INVALID_API_KEY: it was.
        """
        if not self._api_keys.required:
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
            raise error("INVALID_API_KEY", "The API key this stream came with was revoked.") from None

    async def _end_revoked(self) -> None:
        """Looks at the keys of all streams, as long as there are any: the file they are in has no event."""
        while self._streams:
            await asyncio.sleep(REVOCATION_POLL_S)
            for end, caller in list(self._streams.items()):
                if not self._api_keys.still_opens(caller):
                    del self._streams[end]
                    end.reschedule(asyncio.get_running_loop().time())

    def _caller(self, method: str, metadata: dict[str, Any]) -> Caller | GradwireError:
        """Who calls, or why nobody may without a key of ours."""
        if method.startswith(_OPEN_SERVICES) or not self._api_keys.required:
            return ANYBODY
        got = str(metadata.get("authorization", "")).removeprefix("Bearer ")
        what = "is not one this server knows" if got else "is missing"
        text = f"The API key {what}; send it as metadata `authorization: Bearer <key>`."
        return self._api_keys.find(got) or error("INVALID_API_KEY", text)

    def _refusal(self, method: str, metadata: dict[str, Any]) -> GradwireError | None:
        """Why this call may not pass, if it may not."""
        if method.startswith(_OPEN_SERVICES):
            return None
        version = metadata.get("gradwire-protocol-version")
        if version is not None and version not in _SPOKEN:
            return error(
                "PROTOCOL_VERSION_UNSUPPORTED",
                f"The client speaks protocol version {version}, but this server {' or '.join(sorted(_SPOKEN))}. "
                "Install the same gradwire on both sides.",
                client=version,
                server=PROTOCOL_VERSION,
            )
        return None

    def _careful(self, deserialize: Callable[[bytes], Any], streaming: bool) -> Callable[[bytes], Any]:
        def careful(data: bytes) -> Any:
            if len(data) > self._max_message_bytes:
                text = f"The message has {len(data)} bytes, but at most {self._max_message_bytes} are taken."
                return Malformed(error("LIMIT_EXCEEDED", text, limit=self._max_message_bytes, got=len(data)))
            try:
                message = deserialize(data)
                return Received(message, data) if streaming else message
            except Exception:
                text = f"The message ({len(data)} bytes) cannot be read; it is not of the type this call takes."
                return Malformed(error("PROTOCOL_VIOLATION", text))

        return careful


_SPOKEN = {str(version) for version in range(MIN_PROTOCOL_VERSION, PROTOCOL_VERSION + 1)}
_KINDS: dict[tuple[bool, bool], tuple[str, Callable[..., grpc.RpcMethodHandler]]] = {
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}


def _unless_encoded(serialize: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    """Lets a handler answer with a message or with its encoding."""
    return lambda answer: answer if isinstance(answer, bytes) else serialize(answer)


async def _abort(context: grpc.aio.ServicerContext, exc: GradwireError) -> None:
    message = to_status(exc)
    text = _cut(exc.message)
    if text != exc.message or message.ByteSize() > 2 * _MAX_STATUS_BYTES:
        message = to_status(error(exc.reason or "INTERNAL", f"{text}…", retry_after_s=exc.retry_after_s))
    status: Any = rpc_status.to_status(message)
    trailing = (*(context.trailing_metadata() or ()), *status.trailing_metadata)
    await context.abort(status.code, status.details, trailing)


def _cut(text: str) -> str:
    """As much of a text as a status may have."""
    left = _MAX_STATUS_BYTES
    for place, character in enumerate(text):
        left -= len(quote(character, safe=_PLAIN, errors="replace"))
        if left < 0:
            return text[:place]
    return text


def _code_name(exc: GradwireError) -> str:
    return next(code.name for code in grpc.StatusCode if code.value[0] == exc.code)
