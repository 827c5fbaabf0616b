"""The page's requests, without a browser: who may, from where, and what answers carry."""

import http.client
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gradwire.v1 import operation_pb2 as ops

from tests.page.conftest import POST, PageTrainer, page_trainer
from trainer_service.access import ApiKeys, Caller
from trainer_service.command_lines import SettingsError
from trainer_service.page import feed
from trainer_service.page.feed import read_cursors
from trainer_service.startup_checks import check_page

STATIC = Path(feed.__file__).parent / "static"
KEYS = ("alice a-key", "bob b-key", "ops o-key admin")


@pytest.fixture(scope="module")
def open_trainer() -> Iterator[PageTrainer]:
    with page_trainer() as trainer:
        yield trainer


@pytest.fixture(scope="module")
def keyed() -> Iterator[PageTrainer]:
    with page_trainer(api_keys=KEYS) as trainer:
        yield trainer


def caller_of(key: str) -> Caller:
    found = ApiKeys(KEYS).find(key)
    assert found is not None
    return found


def connect(trainer: PageTrainer) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(trainer.url.split("/")[2], timeout=20)


def ask(
    trainer: PageTrainer, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of one request."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection = connect(trainer)
    try:
        connection.request(method, path, None if body is None else json.dumps(body), named)
        response = connection.getresponse()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
    finally:
        connection.close()


def post(trainer: PageTrainer, path: str, body: Any, cookie: str = "", **headers: str) -> tuple[int, Any]:
    status, _, answer = ask(trainer, "POST", path, body, **{**POST, "cookie": cookie, **headers})
    return status, json.loads(answer)


def log_in(trainer: PageTrainer, key: str) -> str:
    """A cookie."""
    status, headers, _ = ask(trainer, "POST", "/api/login", {"key": key}, **POST)
    assert status == 200
    return headers["set-cookie"].partition(";")[0]


def reason(answer: Any) -> str:
    return answer["error"]["reason"]


def read_events(
    trainer: PageTrainer, query: str, wanted: int, cookie: str = "", **headers: str
) -> list[tuple[str, Any]]:
    """The first events of a page: (name, data), and ("id", text) before those that have one."""
    connection = connect(trainer)
    try:
        connection.request("GET", f"/api/events?{query}", headers={"cookie": cookie, **headers})
        response = connection.getresponse()
        assert response.status == 200, response.read()
        found: list[tuple[str, Any]] = []
        name = ""
        while sum(kind != "id" for kind, _ in found) < wanted:
            line = response.readline().decode().rstrip("\n")
            field, _, value = line.partition(": ")
            if field == "event":
                name = value
            elif field == "id":
                found.append(("id", value))
            elif field == "data":
                found.append((name, json.loads(value)))
        return found
    finally:
        connection.close()


# ── who may ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_without_a_key_a_keyed_page_tells_nothing(keyed: PageTrainer):
    for path in ("/api/events", "/api/checkpoints", "/api/holders"):
        status, _, body = ask(keyed, "GET", path)
        assert (status, reason(json.loads(body))) == (401, "INVALID_API_KEY")
    assert post(keyed, "/api/sample", {"prompt": "x", "source": "base"})[0] == 401
    assert json.loads(ask(keyed, "GET", "/api/me")[2]) == {
        "key_required": True,
        "known": False,
        "name": "",
        "admin": False,
    }


@pytest.mark.parametrize("key", ["", "wrong", "a-key ", "é", 7, None, "x" * 5000])
def test_a_wrong_key_opens_nothing(keyed: PageTrainer, key: Any):
    # Blanks around a key are those of pasting it.
    if key == "a-key ":
        assert log_in(keyed, key)
        return
    status, headers, body = ask(keyed, "POST", "/api/login", {"key": key}, **POST)
    assert (status, reason(json.loads(body))) == (401, "INVALID_API_KEY")
    assert "set-cookie" not in headers


def test_a_key_is_asked_for_once_and_its_cookie_does_not_tell_it(keyed: PageTrainer):
    _, headers, _ = ask(keyed, "POST", "/api/login", {"key": "a-key"}, **POST)
    cookie, _, attributes = headers["set-cookie"].partition(";")
    assert {part.strip() for part in attributes.split(";")} >= {"HttpOnly", "SameSite=Strict", "Path=/"}
    assert "a-key" not in cookie
    assert json.loads(ask(keyed, "GET", "/api/me", cookie=cookie)[2])["name"] == "alice"
    assert ask(keyed, "GET", "/api/checkpoints", cookie=cookie)[0] == 200
    # Signed out, the same cookie is worth nothing.
    assert post(keyed, "/api/logout", {}, cookie)[0] == 200
    assert ask(keyed, "GET", "/api/checkpoints", cookie=cookie)[0] == 401


def test_a_key_sees_its_own_and_an_admin_everything(keyed: PageTrainer):
    alice = keyed.make_run("alice's", caller=caller_of("a-key"))
    bob = keyed.make_run("bob's", caller=caller_of("b-key"))
    [(_, told)] = read_events(keyed, "", 1, log_in(keyed, "a-key"))
    ids = {run["run_id"] for run in told["runs"]}
    assert alice.run_id in ids
    assert bob.run_id not in ids
    assert all("owner" not in run for run in told["runs"])
    [(_, told)] = read_events(keyed, "", 1, log_in(keyed, "o-key"))
    assert {run["run_id"]: run["owner"] for run in told["runs"]}.items() >= {
        alice.run_id: "alice",
        bob.run_id: "bob",
    }.items()
    # Somebody else's run is as one that is not there.
    keyed.train(alice)
    keyed.train(bob)
    told = read_events(keyed, f"runs={bob.run_id},{alice.run_id}", 3, log_in(keyed, "a-key"))
    assert [found.get("run_id") for kind, found in told if kind in ("points", "operations")] == [alice.run_id] * 2
    assert ask(keyed, "GET", "/api/holders", cookie=log_in(keyed, "a-key"))[0] == 403
    holders = json.loads(ask(keyed, "GET", "/api/holders", cookie=log_in(keyed, "o-key"))[2])["holders"]
    assert {holder["owner"] for holder in holders} == {"alice", "bob"}
    assert all(holder["runs"] >= 1 and holder["journal_bytes"] > 0 for holder in holders)


def test_a_checkpoint_of_another_key_is_not_there(keyed: PageTrainer):
    alice = caller_of("a-key")
    run = keyed.make_run(caller=alice)
    keyed.front.server.catalog.claim(run.run_id, "alice")
    keyed.execute(run, save_state=ops.SaveStateRequest(name="mine"))
    path = f"gradwire://{run.run_id}/state/mine"
    bob = log_in(keyed, "b-key")
    for where, more in (("delete", {}), ("ttl", {"ttl_seconds": 5})):
        status, answer = post(keyed, f"/api/checkpoints/{where}", {"path": path, **more}, bob)
        assert (status, reason(answer)) == (404, "CHECKPOINT_NOT_FOUND")
    status, found = post(keyed, "/api/checkpoints/ttl", {"path": path, "ttl_seconds": 3600}, log_in(keyed, "a-key"))
    assert status == 200
    assert found["expires_s"] - time.time() == pytest.approx(3600, abs=60)
    assert post(keyed, "/api/checkpoints/delete", {"path": path}, log_in(keyed, "a-key"))[0] == 200


def test_a_stream_ends_when_its_key_is_revoked(tmp_path: Any):
    file = tmp_path / "keys"
    file.write_text("alice a-key\nops o-key admin\n")
    with page_trainer(api_key_file=file) as trainer:
        cookie = log_in(trainer, "a-key")
        connection = connect(trainer)
        connection.request("GET", "/api/events", headers={"cookie": cookie})
        response = connection.getresponse()
        assert response.status == 200
        other = tmp_path / "new"
        other.write_text("ops o-key admin\n")
        other.rename(file)
        response.read()  # To its end.
        connection.close()
        assert ask(trainer, "GET", "/api/checkpoints", cookie=cookie)[0] == 401


# ── from where ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_name_made_to_lead_here_is_refused(open_trainer: PageTrainer):
    port = open_trainer.url.rsplit(":", 1)[1].strip("/")
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}", "127.0.0.1", "LOCALHOST"):
        assert ask(open_trainer, "GET", "/api/checkpoints", host=host)[0] == 200, host
    for host in (
        f"evil.example:{port}",
        "evil.example",
        f"127.0.0.1.evil.example:{port}",
        "localhost.evil.example",
        "",
    ):
        status, _, body = ask(open_trainer, "GET", "/api/checkpoints", host=host)
        assert status in (400, 403), host
        assert b"checkpoints" not in body


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},  # What a form of another site may send.
        {**POST, "origin": "https://evil.example"},
        {**POST, "origin": "null"},
        {**POST, "sec-fetch-site": "cross-site"},
        {**POST, "sec-fetch-site": "same-site"},
    ],
)
def test_another_sites_requests_change_nothing(open_trainer: PageTrainer, headers: dict[str, str]):
    run = open_trainer.make_run()
    open_trainer.execute(run, save_state=ops.SaveStateRequest(name="kept"))
    path = f"gradwire://{run.run_id}/state/kept"
    status, _, body = ask(open_trainer, "POST", "/api/checkpoints/delete", {"path": path}, **headers)
    assert (status, reason(json.loads(body))) == (403, "NOT_FROM_PAGE")
    found = json.loads(ask(open_trainer, "GET", "/api/checkpoints")[2])["checkpoints"]
    assert path in [each["path"] for each in found]


def test_another_site_cannot_read_either(open_trainer: PageTrainer):
    status, headers, _ = ask(open_trainer, "GET", "/api/checkpoints", **{"sec-fetch-site": "cross-site"})
    assert status == 403
    assert "access-control-allow-origin" not in headers
    assert ask(open_trainer, "OPTIONS", "/api/checkpoints/delete", origin="https://evil.example")[0] == 403


def test_every_answer_says_what_a_browser_may_do_with_it(open_trainer: PageTrainer):
    for path in ("/", "/static/app.js", "/api/me", "/static/../../config.py", "/nowhere", "/api/nowhere"):
        _, headers, _ = ask(open_trainer, "GET", path)
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["cache-control"] in ("no-store", "no-cache")


def test_only_the_pages_own_files_are_served(open_trainer: PageTrainer):
    status, headers, body = ask(open_trainer, "GET", "/static/vendor/uPlot.LICENSE")
    assert (status, b"MIT" in body, headers["content-type"]) == (200, True, "text/plain; charset=utf-8")
    for path in ("/static/../server.py", "/static/%2e%2e/server.py", "/static//etc/passwd", "/static/nope.js"):
        assert ask(open_trainer, "GET", path)[0] == 404
    _, headers, _ = ask(open_trainer, "GET", "/static/app.js")
    assert ask(open_trainer, "GET", "/static/app.js", if_none_match=headers["etag"])[0] == 304


def test_every_style_sheet_is_linked_as_one_after_those_of_others(open_trainer: PageTrainer):
    _, _, body = ask(open_trainer, "GET", "/")
    linked = re.findall(r'<link rel="stylesheet" href="/(static/[^"]+)"', body.decode())
    theirs, *ours = linked
    assert theirs == "static/vendor/uPlot.min.css"
    assert set(ours) == {f"static/{path.name}" for path in STATIC.glob("*.css")}
    for path in linked:
        status, headers, _ = ask(open_trainer, "GET", f"/{path}")
        assert (status, headers["content-type"]) == (200, "text/css; charset=utf-8")


# ── bad input ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/api/sample", {"source": "base"}, "prompt"),
        ("/api/sample", {"source": "base", "prompt": ""}, "prompt"),
        ("/api/sample", {"source": "base", "prompt": "\ud800"}, "prompt"),
        ("/api/sample", {"source": "base", "prompt": "x", "max_tokens": 0}, "max_tokens"),
        ("/api/sample", {"source": "base", "prompt": "x", "max_tokens": "7"}, "max_tokens"),
        ("/api/sample", {"source": "base", "prompt": "x", "temperature": -1}, "temperature"),
        ("/api/sample", {"source": "base", "prompt": "x", "temperature": float("nan")}, "temperature"),
        ("/api/sample", {"source": 3, "prompt": "x"}, "source"),
        ("/api/checkpoints/delete", {}, "path"),
        ("/api/checkpoints/ttl", {"path": "gradwire://a/state/b", "ttl_seconds": 1.5}, "ttl_seconds"),
        ("/api/checkpoints/ttl", {"path": "gradwire://a/state/b", "ttl_seconds": -1}, "ttl_seconds"),
        ("/api/checkpoints/ttl", {"path": "../../etc", "ttl_seconds": None}, "path"),
        ("/api/login", [], "JSON object"),
    ],
)
def test_what_is_wrong_with_a_request_is_said(open_trainer: PageTrainer, path: str, body: Any, field: str):
    status, answer = post(open_trainer, path, body)
    assert status == 400, answer
    assert field in answer["error"]["message"]


def test_a_body_is_bounded(open_trainer: PageTrainer):
    status, answer = post(open_trainer, "/api/login", {"key": "x" * 20_000})
    assert (status, reason(answer)) == (429, "LIMIT_EXCEEDED")
    status, answer = post(open_trainer, "/api/sample", {"source": "base", "prompt": "x" * 300_000})
    assert (status, reason(answer)) == (429, "LIMIT_EXCEEDED")


def test_a_run_that_a_client_trains_is_not_cut_into(open_trainer: PageTrainer):
    run = open_trainer.make_run()
    attachment = open_trainer.call(run.attach, "client")
    status, answer = post(open_trainer, "/api/sample", {"source": run.run_id, "prompt": "x"})
    assert (status, reason(answer)) == (409, "RUN_ATTACHED")
    open_trainer.call(run.detach, attachment)


# ── events ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_page_is_told_everything_and_then_what_is_new(open_trainer: PageTrainer):
    run = open_trainer.make_run("told")
    open_trainer.train(run, 3, reward=1.0)
    events = read_events(open_trainer, f"runs={run.run_id}", 3)
    kinds = [kind for kind, _ in events]
    assert kinds == ["state", "id", "points", "operations"]
    told = dict(events)
    assert told["state"]["full"] is True
    assert told["id"] == f"{run.run_id}=9"
    assert told["points"]["steps"] == [1, 2, 3]
    assert told["points"]["series"]["reward"] == [1.0, 1.0, 1.0]
    assert [each["kind"] for each in told["operations"]["recent"]][:3] == ["optim_step", "backward", "forward_backward"]
    open_trainer.train(run, 1)
    # A page that slept says where it was, as the browser does by itself, or in the address.
    for events in (
        read_events(open_trainer, f"runs={run.run_id}", 3, **{"last-event-id": told["id"]}),
        read_events(open_trainer, f"runs={run.run_id}&after={told['id']}", 3),
    ):
        assert dict(events)["points"]["steps"] == [4]


def test_a_curve_grows_while_a_page_is_open(open_trainer: PageTrainer):
    run = open_trainer.make_run("grows")
    connection = connect(open_trainer)
    connection.request("GET", f"/api/events?runs={run.run_id}")
    response = connection.getresponse()
    open_trainer.train(run, 2)
    steps: list[int] = []
    while steps != [1, 2]:
        line = response.readline()
        if line.startswith(b'data: {"run_id"') and b"seq_ids" in line:
            steps += json.loads(line[6:])["steps"]
    connection.close()


def test_a_hundred_runs_and_fifty_pages_are_each_told_of_every_step(keyed: PageTrainer):
    caller = caller_of("b-key")
    runs = keyed.make_runs((f"run {n}" for n in range(100)), caller)
    cookie = log_in(keyed, "b-key")
    connections = [connect(keyed) for _ in range(50)]
    try:
        responses = []
        for connection in connections:
            connection.request("GET", f"/api/events?runs={runs[0].run_id}", headers={"cookie": cookie})
            responses.append(connection.getresponse())
        keyed.train(runs[0], 1)
        for response in responses:
            while b'"steps":[1]' not in response.readline():
                pass
    finally:
        for connection in connections:
            connection.close()


def test_pages_and_runs_of_one_page_are_bounded(open_trainer: PageTrainer, monkeypatch: pytest.MonkeyPatch):
    status, _, body = ask(open_trainer, "GET", f"/api/events?runs={','.join(map(str, range(17)))}")
    assert (status, reason(json.loads(body))) == (429, "LIMIT_EXCEEDED")
    monkeypatch.setattr(feed, "MAX_PAGES", 0)
    assert ask(open_trainer, "GET", "/api/events")[0] == 429


def test_cursors_are_read_from_whatever_comes():
    assert read_cursors("run-a=12,run-b=40") == {"run-a": 12, "run-b": 40}
    assert read_cursors("") == read_cursors("=,=3,a=x,\x00") == {}
    assert read_cursors("a=99999999999999999999999") == {"a": 9999999999999999999}


# ── where it listens ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_beyond_loopback_a_key_is_needed():
    check_page("127.0.0.1:8080", guarded=False)
    check_page("0.0.0.0:8080", guarded=True)
    with pytest.raises(SettingsError, match="--page 0.0.0.0:8080 is reachable from other machines"):
        check_page("0.0.0.0:8080", guarded=False)


def test_packages_that_are_missing_are_named_with_their_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"starlette and uvicorn.*gradwire\[page\]"):
        check_page("127.0.0.1:8080", guarded=False)


def test_a_run_whose_operations_come_and_go_while_pages_are_told_disturbs_nobody(
    open_trainer: PageTrainer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(feed, "INTERVAL_S", 0.01)
    run = open_trainer.make_run("fast")
    connections = [connect(open_trainer) for _ in range(5)]
    responses = []
    for connection in connections:
        connection.request("GET", f"/api/events?runs={run.run_id}")
        responses.append(connection.getresponse())
    open_trainer.train(run, 60)
    for response, connection in zip(responses, connections, strict=True):
        steps: list[int] = []
        while len(steps) < 60:
            line = response.readline()
            if line.startswith(b'data: {"run_id"') and b"seq_ids" in line:
                steps += json.loads(line[6:])["steps"]
        # Each point once, whatever came in between.
        assert steps == list(range(1, 61))
        response.close()
        connection.close()
