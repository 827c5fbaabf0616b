"""The page's routes: its files, what it requests, and what it may change."""

import asyncio
import hashlib
from importlib.resources import files
from typing import Any

from gradwire.errors import GradwireError, invalid_field
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from trainer_service.access import ANYBODY, Caller, current_caller
from trainer_service.checkpoints.catalog import Catalog
from trainer_service.field_limits import check_ttl_seconds
from trainer_service.page.feed import Feed
from trainer_service.page.guard import answer_error, on_fault, on_refusal, read_json
from trainer_service.page.page_json import checkpoint_view
from trainer_service.page.sampling_box import SamplingBox
from trainer_service.page.sessions import Sessions
from trainer_service.runs import journal
from trainer_service.runs.registry import Runs

_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".LICENSE": "text/plain; charset=utf-8",
}
_MAX_SMALL_BYTES = 16 * 1024
_WRONG_KEY_DELAY_S = 0.5
_MAX_TRIES = 16
"""Simultaneous answers to wrong keys."""


class Routes:
    """Answers requests that passed the guard.

    Args:
        sessions: Keys and cookies.
        feed: Live updates.
        runs: The trainer's runs.
        catalog: Its checkpoints.
        box: Samples for the page.
        max_body_bytes: The largest request with a prompt.
    """

    def __init__(
        self,
        *,
        sessions: Sessions,
        feed: Feed,
        runs: Runs,
        catalog: Catalog,
        box: SamplingBox,
        max_body_bytes: int,
    ) -> None:
        self._sessions = sessions
        self._feed = feed
        self._runs = runs
        self._catalog = catalog
        self._box = box
        self._max_body_bytes = max_body_bytes
        self._files = _read_files()
        self._tries = 0

    def app(self) -> Starlette:
        """All routes."""
        return Starlette(
            routes=[
                Route("/", self._file),
                Route("/static/{name:path}", self._file),
                Route("/api/me", self._me),
                Route("/api/login", self._login, methods=["POST"]),
                Route("/api/logout", self._logout, methods=["POST"]),
                Route("/api/events", self._events),
                Route("/api/checkpoints", self._checkpoints),
                Route("/api/checkpoints/delete", self._delete_checkpoint, methods=["POST"]),
                Route("/api/checkpoints/ttl", self._set_ttl, methods=["POST"]),
                Route("/api/sample", self._sample, methods=["POST"]),
                Route("/api/holders", self._holders),
            ],
            exception_handlers={GradwireError: on_refusal, Exception: on_fault},
        )

    async def _file(self, request: Request) -> Response:
        found = self._files.get(request.path_params.get("name", "index.html"))
        if found is None:
            return answer_error(404, "NOT_FOUND", "There is no such file.")
        content, content_type, etag = found
        headers = {"etag": etag, "cache-control": "no-cache"}
        if request.headers.get("if-none-match") == etag:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers | {"content-type": content_type})

    async def _me(self, request: Request) -> Response:
        caller = self._sessions.caller(request.headers.get("cookie", ""))
        return JSONResponse(self._who(caller))

    async def _login(self, request: Request) -> Response:
        key = (await read_json(request, max_bytes=_MAX_SMALL_BYTES)).get("key")
        if self._tries >= _MAX_TRIES:
            return answer_error(429, "LIMIT_EXCEEDED", "Too many wrong keys at once; try again in a moment.")
        opened = self._sessions.open(key.strip()) if isinstance(key, str) and _is_ascii(key) else None
        if opened is None:
            self._tries += 1
            try:
                await asyncio.sleep(_WRONG_KEY_DELAY_S)
            finally:
                self._tries -= 1
            return answer_error(401, "INVALID_API_KEY", "This is not a key of this trainer.")
        caller, cookie = opened
        return JSONResponse(self._who(caller), headers={"set-cookie": cookie})

    async def _logout(self, request: Request) -> Response:
        cookie = self._sessions.close(request.headers.get("cookie", ""))
        return JSONResponse({}, headers={"set-cookie": cookie})

    def _who(self, caller: Caller | None) -> dict[str, Any]:
        return {
            "key_required": self._sessions.required,
            "known": caller is not None,
            "name": "" if caller is None or caller is ANYBODY else caller.name,
            "admin": caller is not None and caller.admin,
        }

    async def _events(self, request: Request) -> Response:
        run_ids = [run_id for run_id in request.query_params.get("runs", "").split(",") if run_id]
        after = request.headers.get("last-event-id") or request.query_params.get("after", "")
        events = self._feed.open(list(dict.fromkeys(run_ids)), after)
        return StreamingResponse(events, media_type="text/event-stream", headers={"x-accel-buffering": "no"})

    async def _checkpoints(self, request: Request) -> Response:
        found = await asyncio.to_thread(self._catalog.list)
        return JSONResponse({"checkpoints": [checkpoint_view(one, current_caller.get()) for one in found]})

    async def _delete_checkpoint(self, request: Request) -> Response:
        asked = await read_json(request, max_bytes=_MAX_SMALL_BYTES)
        await asyncio.to_thread(self._catalog.delete, _path(asked))
        return JSONResponse({})

    async def _set_ttl(self, request: Request) -> Response:
        asked = await read_json(request, max_bytes=_MAX_SMALL_BYTES)
        ttl_seconds = asked.get("ttl_seconds")
        if ttl_seconds is not None and (isinstance(ttl_seconds, bool) or not isinstance(ttl_seconds, int)):
            raise invalid_field("ttl_seconds", "must be a whole number of seconds, or null for forever.")
        check_ttl_seconds(ttl_seconds)
        found = await asyncio.to_thread(self._catalog.set_ttl, _path(asked), ttl_seconds)
        return JSONResponse(checkpoint_view(found, current_caller.get()))

    async def _sample(self, request: Request) -> Response:
        asked = await read_json(request, max_bytes=self._max_body_bytes)
        lines = await self._box.sample(asked)
        return StreamingResponse(lines, media_type="application/x-ndjson", headers={"x-accel-buffering": "no"})

    async def _holders(self, request: Request) -> Response:
        """Who holds what: runs, operations under way, bytes of journals and of checkpoints, by owner."""
        if not current_caller.get().admin:
            return answer_error(403, "NOT_ADMIN", "Only admins may see who holds what.")
        runs = self._runs.everybodys()

        def look() -> list[dict[str, Any]]:
            found: dict[str, dict[str, Any]] = {}

            def of(owner: str | None) -> dict[str, Any]:
                empty = {"runs": 0, "operations": 0, "journal_bytes": 0, "checkpoints": 0, "checkpoint_bytes": 0}
                return found.setdefault(owner or "", {"owner": owner or "", **empty})

            for run in runs:
                holder = of(run.owner)
                holder["runs"] += 1
                holder["operations"] += run.unanswered
                holder["journal_bytes"] += journal.size_bytes(run.folder)
            for checkpoint in self._catalog.list():
                holder = of(checkpoint.owner)
                holder["checkpoints"] += 1
                holder["checkpoint_bytes"] += sum(file.size_bytes for file in checkpoint.manifest.files.values())
            return sorted(found.values(), key=lambda holder: (-holder["runs"], holder["owner"]))

        return JSONResponse({"holders": await asyncio.to_thread(look)})


def _path(asked: dict[str, Any]) -> str:
    path = asked.get("path")
    if not isinstance(path, str):
        raise invalid_field("path", "must be a checkpoint's path.")
    return path


def _is_ascii(key: str) -> bool:
    return key.isascii() and len(key) <= 4096


def _read_files() -> dict[str, tuple[bytes, str, str]]:
    """The page's own files, by name: (content, type, ETag). No others can be requested."""
    found: dict[str, tuple[bytes, str, str]] = {}
    folders = [("", files("trainer_service.page") / "static")]
    while folders:
        prefix, folder = folders.pop()
        for entry in folder.iterdir():
            if entry.is_dir():
                folders.append((f"{prefix}{entry.name}/", entry))
                continue
            content = entry.read_bytes()
            content_type = next((kind for end, kind in _TYPES.items() if entry.name.endswith(end)), "")
            if content_type:
                etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
                found[prefix + entry.name] = content, content_type, etag
    return found
