"""What all endpoints share: who calls, and how refusals become answers."""

import logging
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from gradwire.errors import GradwireError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from trainer_service.gateway.gateway import Gateway
from trainer_service.gateway.outcomes import Refusal, category_of, refusal_of
from trainer_service.gateway.sessions import Caller
from trainer_service.tracing import trace_headers

logger = logging.getLogger(__name__)

POLL_S = 20.0
"""How long a request waits for an answer before the client has to ask again; tinker's SDK hangs up after 45 s."""

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_MAX_TRACESTATE_CHARS = 512
"""As many as W3C Trace Context asks everybody to pass on."""

Handler = Callable[[Gateway, Caller, Request], Awaitable[Any]]
"""Gets the gateway, the caller and the request; returns a Response, or what becomes one of JSON."""
OnRefusal = Callable[[Refusal], Response]


def tinker_refusal(refusal: Refusal) -> Response:
    """A refusal as tinker's SDK tells it to its user."""
    body = {"error": refusal.message, "category": category_of(refusal.status), "reason": refusal.reason}
    return JSONResponse(body, refusal.status)


def caller_of(request: Request) -> Caller:
    """The caller, by the key of the request.

    Raises:
        Refusal: 401: the key cannot be sent on.
    """
    headers = request.headers
    key = headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ")
    if len(key) > 4096 or not (key.isascii() and key.isprintable()):
        raise Refusal(401, "The API key has characters other than printable ASCII.", reason="INVALID_API_KEY")
    return Caller(key)


def trace_of(request: Request) -> dict[str, str]:
    """The caller's `traceparent` and `tracestate`, by W3C Trace Context; empty where there is none, or nonsense."""
    traceparent = request.headers.get("traceparent", "")
    if _TRACEPARENT.fullmatch(traceparent) is None:
        return {}
    found = {"traceparent": traceparent}
    tracestate = ",".join(request.headers.getlist("tracestate"))
    if 0 < len(tracestate) <= _MAX_TRACESTATE_CHARS and tracestate.isascii() and tracestate.isprintable():
        found["tracestate"] = tracestate
    return found


def check_key(gateway: Gateway, caller: Caller) -> None:
    """Refuses a key that is none of the gateway's own, where it has some: the trainer behind it may have none.

    Raises:
        Refusal: 401.
    """
    api_keys = gateway.api_keys
    if api_keys.required and api_keys.find(caller.key) is None:
        what = "is not one this gateway knows" if caller.key else "is missing"
        raise Refusal(401, f"The API key {what}; send it as X-API-Key, or as a Bearer token.", reason="INVALID_API_KEY")


def route(
    path: str,
    handler: Handler,
    gateway: Gateway,
    *,
    method: str = "POST",
    on_refusal: OnRefusal = tinker_refusal,
    keyless: bool = False,
) -> Route:
    """An endpoint.

    Args:
        path: As Starlette writes it.
        handler: What answers.
        gateway: Handed to it.
        method: Of HTTP.
        on_refusal: The form of refusals.
        keyless: Open to everybody.
    """

    return Route(path, _Endpoint(handler, gateway, on_refusal, keyless), methods=[method])


@dataclass(frozen=True)
class _Endpoint:
    """An endpoint as ASGI calls it: Starlette's own way there, for functions, costs as much as a small handler."""

    handler: Handler
    gateway: Gateway
    on_refusal: OnRefusal
    keyless: bool

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._answer(Request(scope, receive, send))
        await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        try:
            caller = caller_of(request)
            if not self.keyless:
                check_key(self.gateway, caller)
            self.gateway.heard(caller)
            trace_headers.set(trace_of(request))
            answer = await self.handler(self.gateway, caller, request)
        except Refusal as exc:
            return self.on_refusal(exc)
        except GradwireError as exc:
            return self.on_refusal(refusal_of(exc))
        except ClientDisconnect:
            return Response(status_code=400)
        except Exception:
            logger.exception("A request failed.", extra={"fields": {"path": request.url.path[:200]}})
            return self.on_refusal(Refusal(500, "The gateway failed at this; its log says more.", reason="INTERNAL"))
        return answer if isinstance(answer, Response) else JSONResponse(answer)
