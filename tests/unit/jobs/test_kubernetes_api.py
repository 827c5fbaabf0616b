"""The API server as the jobs room calls it, where it breaks off, forgets and is away."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from gradwire.errors import FailedPreconditionError
from kubernetes.aio import client

from trainer_service.config import JobsConfig, KubernetesSettings
from trainer_service.jobs.kubernetes import KubernetesJobs
from trainer_service.jobs.kubernetes_api import ApiError, KubernetesApi
from trainer_service.jobs.trainer_job import TrainerJobSpec

Answer = Callable[[web.Request], Any]


def pod(name: str, version: int) -> dict[str, Any]:
    return {"metadata": {"name": name, "resourceVersion": str(version)}}


def listed(version: int, *pods: dict[str, Any]) -> web.Response:
    return web.json_response({"metadata": {"resourceVersion": str(version)}, "items": list(pods)})


def watched(*events: tuple[str, dict[str, Any]]) -> web.Response:
    lines = [json.dumps({"type": what, "object": body}) for what, body in events]
    return web.Response(text="".join(f"{line}\n" for line in lines))


@contextlib.asynccontextmanager
async def server(*answers: web.Response | Exception) -> AsyncIterator[tuple[KubernetesApi, list[str]]]:
    """An API that gives these answers in turn, and then says nothing more; and what was asked."""
    asked: list[str] = []
    left = list(answers)

    async def answer(request: web.Request) -> web.StreamResponse:
        version = request.query.get("resourceVersion", "")
        asked.append(f"watch {version}" if "watch" in request.query else request.method.lower())
        if not left:
            await asyncio.sleep(60)
        response = left.pop(0)
        if isinstance(response, Exception):
            assert request.transport is not None
            request.transport.abort()
            raise response
        return response

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    assert site._server is not None
    port = site._server.sockets[0].getsockname()[1]  # pyright: ignore[reportAttributeAccessIssue]
    api = KubernetesApi(client.Configuration(host=f"http://127.0.0.1:{port}"), "training")
    try:
        yield api, asked
    finally:
        await api.close()
        await runner.cleanup()


async def first(api: KubernetesApi, count: int) -> list[tuple[str, list[str]]]:
    """The first changes, with the names of what they are about."""
    changes: list[tuple[str, list[str]]] = []
    async with asyncio.timeout(30), contextlib.aclosing(api.follow("Pod", "job=x")) as following:
        async for what, body in following:
            changes.append((what, [item["metadata"]["name"] for item in body.get("items", [body])]))
            if len(changes) == count:
                break
    return changes


async def test_a_watch_that_ends_goes_on_from_where_it_was():
    answers = listed(5, pod("a", 4)), watched(("ADDED", pod("b", 7))), watched(("DELETED", pod("a", 9)))
    async with server(*answers) as (api, asked):
        assert await first(api, 3) == [("LISTED", ["a"]), ("ADDED", ["b"]), ("DELETED", ["a"])]
    assert asked == ["get", "watch 5", "watch 7"]


async def test_bookmarks_move_the_place_and_are_not_told():
    answers = listed(5), watched(("BOOKMARK", pod("", 80))), watched(("ADDED", pod("b", 81)))
    async with server(*answers) as (api, asked):
        assert await first(api, 2) == [("LISTED", []), ("ADDED", ["b"])]
    assert asked == ["get", "watch 5", "watch 80"]


@pytest.mark.parametrize(
    "broken",
    [
        watched(("ERROR", {"code": 410, "message": "too old resource version"})),
        web.json_response({"reason": "Expired", "message": "too old"}, status=410),
        web.json_response({"reason": "InternalError"}, status=500),
        web.Response(text="{half a li"),
        web.json_response({"kind": "Status"}),
        ConnectionError(),
    ],
    ids=["too old", "gone", "internal error", "half a line", "no event", "cut"],
)
async def test_whatever_may_have_been_missed_is_listed_anew(broken: web.Response | Exception):
    # The client asks once more by itself when a connection that it had used before is cut.
    times = 2 if isinstance(broken, Exception) else 1
    async with server(listed(5), *[broken] * times, listed(9, pod("a", 8))) as (api, _):
        assert await first(api, 2) == [("LISTED", []), ("LISTED", ["a"])]


async def test_an_api_server_that_is_away_is_waited_for():
    async with server(ConnectionError(), ConnectionError(), listed(5, pod("a", 4))) as (api, _):
        assert await first(api, 1) == [("LISTED", ["a"])]


async def test_a_refusal_says_what_the_server_said():
    refusal = web.json_response({"reason": "Forbidden", "message": "you may not"}, status=403)
    async with server(refusal, web.Response(text="<html>", status=502), ConnectionError()) as (api, _):
        with pytest.raises(ApiError) as refused:
            await api.create("Secret", {"metadata": {}})
        assert (refused.value.status, refused.value.reason, refused.value.message) == (403, "Forbidden", "you may not")
        with pytest.raises(ApiError) as refused:
            await api.create("Secret", {"metadata": {}})
        assert refused.value.status == 502
        with pytest.raises(ApiError) as refused:
            await api.create("Secret", {"metadata": {}})
        assert refused.value.status == 0


async def test_what_is_not_there_is_deleted_already():
    async with server(web.json_response({"reason": "NotFound", "message": "no"}, status=404)) as (api, _):
        await api.delete("Secret", "gone")


async def test_a_service_whose_making_was_not_answered_is_looked_for_and_removed(tmp_path: Path):
    template = tmp_path / "trainer.yaml"
    container = {"image": "gradwire:1", "args": ["serve"]}
    stateful_set = {"kind": "StatefulSet", "spec": {"template": {"spec": {"containers": [container]}}}}
    service = {"kind": "Service", "spec": {"ports": [{"name": "grpc", "port": 7777}]}}
    template.write_text(json.dumps(stateful_set) + "\n---\n" + json.dumps(service))
    gone = web.json_response({"kind": "Status"})
    async with server(ConnectionError(), listed(5, pod("job-abcde", 4)), gone) as (api, asked):
        settings = KubernetesSettings(template=template)
        jobs = KubernetesJobs(JobsConfig(kubernetes=settings), settings, api)
        with pytest.raises(FailedPreconditionError, match="does not answer, so the control plane cannot make the job"):
            await jobs.create(TrainerJobSpec("a-model"), owner="alice", request_id="")
        assert await jobs.list() == []
    assert asked == ["post", "get", "delete"]
