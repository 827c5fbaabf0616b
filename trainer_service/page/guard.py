"""Checks on every request to the page, and headers of every answer.

Through the browser, any website that a user visits can reach a page on loopback. So a request must come from the page
itself: it names a host that nobody can point elsewhere (or has a cookie of that host), requests that change something
have a header that only the page's own scripts can set, and no other site can read or frame answers, which run no
scripts but ours.
"""

import ipaddress
import logging
from typing import Any

from gradwire._wire.untrusted import parse_json
from gradwire.errors import GradwireError, error
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trainer_service.access import current_caller
from trainer_service.page.sessions import Sessions

logger = logging.getLogger(__name__)

OPEN = ("/api/login", "/api/me")
"""Paths that anyone may request: they say that a key is required."""
HEADER = "x-gradwire-page"
"""Header of requests that change something. Another site's script could set it only with our consent, which we do not
give."""
_SECURITY = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
_HTTP_STATUS = {3: 400, 5: 404, 6: 409, 7: 403, 8: 429, 9: 409, 14: 503, 16: 401}
"""HTTP status by gRPC code."""


class Guard:
    """Guards the page's routes.

    Args:
        app: The routes.
        sessions: Who may pass.
    """

    def __init__(self, app: ASGIApp, sessions: Sessions) -> None:
        self._app = app
        self._sessions = sessions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_SECURITY)
                headers.setdefault("cache-control", "no-store")
            await send(message)

        headers = Headers(scope=scope)
        refusal = self._not_ours(scope["method"], headers) or self._let_in(scope["path"], headers)
        app = self._app if refusal is None else refusal
        await app(scope, receive, secured)

    def _not_ours(self, method: str, headers: Headers) -> JSONResponse | None:
        """The refusal of a request that does not come from the page itself; None if it does."""
        host = headers.get("host", "")
        if not self._sessions.required and not _cannot_be_pointed_here(host):
            # A site may point its own name here: without a cookie its scripts could pass for ours, so it is refused.
            text = f"This page is not available as {host!r}; open it by its IP address, or as localhost."
            return answer_error(403, "WRONG_HOST", text)
        origin = headers.get("origin")
        foreign = origin is not None and origin.partition("://")[2] != host
        foreign = foreign or headers.get("sec-fetch-site", "none") not in ("same-origin", "none")
        if foreign or (method not in ("GET", "HEAD") and HEADER not in headers):
            return answer_error(403, "NOT_FROM_PAGE", "This request does not come from the page itself.")
        return None

    def _let_in(self, path: str, headers: Headers) -> JSONResponse | None:
        """Sets the current caller; returns the refusal of a stranger."""
        if not path.startswith("/api/"):
            return None
        caller = self._sessions.caller(headers.get("cookie", ""))
        if caller is not None:
            current_caller.set(caller)
        elif path not in OPEN:
            return answer_error(401, "INVALID_API_KEY", "The page needs an API key of this trainer.")
        return None


def answer_error(status: int, reason: str, message: str) -> JSONResponse:
    """An error for the page's scripts."""
    return JSONResponse({"error": {"reason": reason, "message": message}}, status)


async def on_refusal(request: Request, exc: Exception) -> JSONResponse:
    """A GradwireError that a route raised."""
    assert isinstance(exc, GradwireError)
    return answer_error(_HTTP_STATUS.get(exc.code, 500), exc.reason, exc.message)


async def on_fault(request: Request, exc: Exception) -> JSONResponse:
    """Any other exception, which is a bug and is logged."""
    logger.error("A request of the page failed.", exc_info=exc, extra={"fields": {"path": request.url.path}})
    return answer_error(500, "INTERNAL", "Internal error in the trainer; its log has the details.")


def _cannot_be_pointed_here(host: str) -> bool:
    """Whether a Host header is an IP address or localhost."""
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return name.lower() == "localhost"
    return True


async def read_json(request: Request, *, max_bytes: int) -> dict[str, Any]:
    """The body of a request.

    Raises:
        InvalidArgumentError: It is not a JSON object.
        ResourceExhaustedError: LIMIT_EXCEEDED: it is too large.
    """
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > max_bytes:
            raise error("LIMIT_EXCEEDED", f"The request has more than {max_bytes} bytes.", limit=max_bytes)
    try:
        found = parse_json(body)
    except ValueError as exc:
        raise error("INVALID_FIELD", f"The request is not JSON: {exc}.") from None
    if not isinstance(found, dict):
        raise error("INVALID_FIELD", "The request must be a JSON object.")
    return found
