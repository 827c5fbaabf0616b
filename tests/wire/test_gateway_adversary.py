"""What a hostile or broken client sends to the gateway: refused in a sentence, never a 5xx, and seen by nobody else."""

import asyncio
import contextlib
import json
import random
import socket
from pathlib import Path
from typing import Any

import pytest
import zstandard

from tests.front_end import front_end
from tests.http_gateway import HttpGateway, http_gateway, one_pass
from tests.waiting import DEADLINE_S
from trainer_service.gateway import bodies
from trainer_service.gateway.wire import tinker_wire_pb2 as wire

KEYS = ("alice tml-alice", "bob tml-bob")
ALICE, BOB = "tml-alice", "tml-bob"
JOBS = "/v1/accounts/gradwire/rlorTrainerJobs"
POSTS = (
    *("create_session", "sessions/search", "sessions/x/finish", "create_model", "get_info", "forward_backward"),
    *("load_weights", "optim_step", "retrieve_future", "create_sampling_session", "asample", "weights_info"),
    *("retrieve_futures", "cancel_future", "save_weights", "save_weights_for_sampler", "telemetry"),
)


async def job_posts(gateway: HttpGateway, key: str = "") -> list[str]:
    """A job, and paths of what its SDK sends to it alone; the first makes jobs."""
    job = await gateway.http.post(
        JOBS, json={"trainingConfig": {"baseModel": "fake"}}, headers={"x-api-key": key} if key else {}
    )
    account, _, job_id = job.json()["name"].removeprefix("accounts/").split("/")
    below = f"/training/v1/rlorTrainerJobs/{account}/{job_id}/api/v1"
    return [JOBS, *(f"{below}/{path}" for path in ("create_session", "forward", "forward_backward", "unload_model"))]


async def test_malformed_bodies_are_the_callers_mistake(tmp_path: Path):
    rng = random.Random(7)
    hostile: list[bytes] = [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b'{"session_id": NaN}',
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
        b'{"session_id": "\\ud800", "model_id": "\\ud800", "request_id": "\\ud800"}',
        b'{"session_id": 1e999}',
        b'{"seq_id": ' + b"9" * 5000 + b"}",
        b'{"model_id": {}, "session_id": [], "request_id": true, "sampling_session_id": 4}',
        rng.randbytes(200),
    ]
    async with front_end() as trainer, http_gateway(trainer.address, tmp_path) as gateway:
        for path in POSTS:
            for body in hostile:
                response = await gateway.http.post(f"/api/v1/{path}", content=body)
                assert response.status_code < 500, (path, body[:80], response.text)
                if response.status_code >= 400:
                    assert len(response.json()["error"]) > 10
        for path in await job_posts(gateway):
            for body in hostile:
                response = await gateway.http.post(path, content=body)
                assert response.status_code < 500, (path, body[:80], response.text)
        for path in ("completions", "chat/completions"):
            for body in hostile:
                response = await gateway.http.post(f"/oai/api/v1/{path}", content=body)
                assert 400 <= response.status_code < 500, (path, body[:80], response.text)
                assert response.json()["error"]["message"]
        assert (await gateway.http.get("/api/v1/healthz")).json() == {"status": "ok"}


async def test_a_bit_flipped_pass_never_fails_the_gateway(tmp_path: Path):
    rng = random.Random(3)
    async with front_end() as trainer, http_gateway(trainer.address, tmp_path) as gateway:
        model_id = await gateway.model(await gateway.session())
        seq_id = 0
        for _ in range(60):
            body = bytearray(one_pass(model_id, seq_id + 1))
            for _ in range(rng.randrange(1, 4)):
                # Behind the model's id and the number, which lead elsewhere.
                place = rng.randrange(len(model_id) + 4, len(body))
                body[place] ^= 1 << rng.randrange(8)
            response = await gateway.http.post("/api/v1/forward_backward", content=bytes(body))
            assert response.status_code < 500, response.text
            if response.status_code == 200:
                seq_id += 1
                assert response.json()["request_id"] == f"{model_id}:{seq_id}"
                answer = await gateway.result(response.json()["request_id"])
                assert answer.status_code == 200
                if answer.headers["content-type"] == "application/json":
                    assert answer.json()["category"] == "user", answer.text


async def test_a_compressed_body_is_read_and_a_bomb_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bodies, "MAX_BODY_BYTES", 1 << 20)
    async with front_end() as trainer, http_gateway(trainer.address, tmp_path) as gateway:
        model_id = await gateway.model(await gateway.session())

        async def send(content: bytes, encoding: str = "zstd") -> Any:
            headers = {"content-encoding": encoding}
            return await gateway.http.post("/api/v1/forward_backward", content=content, headers=headers)

        pressed = zstandard.compress(one_pass(model_id, 1))
        assert (await send(pressed)).status_code == 200
        assert (await send(zstandard.compress(bytes(200 << 20)))).status_code == 413
        assert (await send(pressed[:-5])).status_code == 400
        streamed = zstandard.ZstdCompressor(write_content_size=False).compressobj()
        unsized = streamed.compress(one_pass(model_id, 2)) + streamed.flush()
        assert (await send(unsized)).json()["request_id"] == f"{model_id}:2"
        assert (await send(unsized[:-5])).status_code == 400
        assert (await send(b"no zstd at all")).status_code == 400
        assert (await send(bytes(2 << 20), "identity")).status_code == 413
        assert (await send(pressed, "br")).status_code == 415


async def test_sparse_tensors_that_would_fill_the_memory_are_refused(tmp_path: Path):
    async with front_end() as trainer, http_gateway(trainer.address, tmp_path) as gateway:
        model_id = await gateway.model(await gateway.session())
        asked = wire.ForwardBackwardRequest.FromString(one_pass(model_id, 1))
        sparse = wire.Tensor(dtype=wire.DTYPE_FLOAT32, shape=[3, 1 << 40])
        sparse.sparse_csr.crow_indices = bytes(32)
        asked.data[0].loss_fn_inputs["weights"].CopyFrom(sparse)
        response = await gateway.http.post("/api/v1/forward_backward", content=asked.SerializeToString())
        answer = (await gateway.result(response.json()["request_id"])).json()
        assert "sparse" in answer["error"]
        assert answer["category"] == "user"


async def test_half_a_request_and_a_slow_reader_keep_nobody_waiting(tmp_path: Path):
    async with front_end() as trainer, http_gateway(trainer.address, tmp_path) as gateway:
        host, port = gateway.address.split(":")
        half = socket.create_connection((host, int(port)))
        half.sendall(b"POST /api/v1/forward_backward HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
        slow = socket.create_connection((host, int(port)))
        slow.sendall(b"GET /api/v1/get_server_capabilities HTTP/1.1\r\nHost: x\r\n\r\n" * 20)
        try:
            assert (await gateway.http.get("/api/v1/healthz")).status_code == 200
            await gateway.model(await gateway.session())
        finally:
            half.close()
            slow.close()
        await asyncio.sleep(0.05)
        assert (await gateway.http.get("/api/v1/healthz")).status_code == 200


async def alices_things(gateway: HttpGateway) -> dict[str, str]:
    """What Alice has."""
    session_id = await gateway.session(ALICE)
    model_id = await gateway.model(session_id, key=ALICE)
    saved = await gateway.post("save_weights", ALICE, model_id=model_id, seq_id=1, path="hers")
    path = (await gateway.result(saved["request_id"], ALICE)).json()["path"]
    sampler = await gateway.post(
        "create_sampling_session", ALICE, session_id=session_id, sampling_session_seq_id=0, base_model="fake"
    )
    sample = await gateway.post(
        "asample",
        ALICE,
        sampling_session_id=sampler["sampling_session_id"],
        seq_id=0,
        prompt={"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]},
        sampling_params={"max_tokens": 2},
    )
    assert (await gateway.result(sample["request_id"], ALICE)).status_code == 200
    return {
        "session_id": session_id,
        "model_id": model_id,
        "path": path,
        "run_id": path.removeprefix("tinker://").partition("/")[0],
        "sampler_id": sampler["sampling_session_id"],
        "request_id": saved["request_id"],
        "sample_id": sample["request_id"],
    }


async def test_two_keys_do_not_see_each_other(tmp_path: Path):
    async with front_end(api_keys=KEYS) as trainer, http_gateway(trainer.address, tmp_path) as gateway:
        hers = await alices_things(gateway)
        name = hers["path"].partition(f"{hers['run_id']}/")[2]
        run_ids = (hers["run_id"], hers["model_id"])
        posts: list[tuple[str, dict[str, Any]]] = [
            ("session_heartbeat", {"session_id": hers["session_id"]}),
            (f"sessions/{hers['session_id']}/finish", {"reason": {"type": "success"}}),
            ("create_model", {"session_id": hers["session_id"], "model_seq_id": 9, "base_model": "fake"}),
            ("get_info", {"model_id": hers["model_id"]}),
            ("get_info", {"model_id": hers["run_id"]}),
            ("optim_step", {"model_id": hers["model_id"], "seq_id": 2, "adam_params": {}}),
            ("save_weights", {"model_id": hers["model_id"], "seq_id": 2, "path": "x"}),
            ("load_weights", {"model_id": hers["model_id"], "seq_id": 2, "path": hers["path"], "optimizer": False}),
            ("retrieve_future", {"request_id": hers["request_id"]}),
            ("retrieve_future", {"request_id": hers["sample_id"]}),
            ("retrieve_future", {"request_id": f"{hers['model_id']}:0"}),
            ("asample", {"sampling_session_id": hers["sampler_id"], "seq_id": 1, "prompt": {"chunks": []}}),
            ("weights_info", {"tinker_path": hers["path"]}),
            ("retrieve_futures", {"target": {"sampling_session_id": hers["sampler_id"]}}),
        ]
        others = [("POST", f"/api/v1/{path}", body) for path, body in posts]
        others += [
            ("GET", f"/api/v1/samplers/{hers['sampler_id']}", None),
            ("GET", f"/api/v1/sessions/{hers['session_id']}", None),
        ]
        her_job, *_ = [path for path in await job_posts(gateway, ALICE) if path != JOBS]
        job_id = her_job.split("/")[5]
        others += [(method, f"{JOBS}/{job_id}", None) for method in ("GET", "DELETE")]
        others += [
            ("POST", f"{JOBS}/{job_id}:resume", None),
            ("POST", her_job, {}),
            ("GET", f"{her_job}/../healthz", None),
        ]
        for run_id in run_ids:
            at = f"/api/v1/training_runs/{run_id}"
            others += [("GET", at, None), ("DELETE", f"{at}/checkpoints/{name}", None)]
            others += [("PUT", f"{at}/checkpoints/{name}/ttl", {"ttl_seconds": 5})]
            others += [("GET", f"{at}/checkpoints/{name}/external_weights_urls", None)]
        for method, path, body in others:
            missing = (
                path.replace(hers["run_id"], "run-0").replace(hers["session_id"], "0" * 36).replace(job_id, "none")
            )
            answers = []
            for where in (path, missing):
                sent = json.loads(json.dumps(body).replace(hers["session_id"], "0" * 36)) if where is missing else body
                response = await gateway.http.request(method, where, json=sent, headers={"x-api-key": BOB})
                assert response.status_code == 404, (method, where, response.text)
                answers.append(response.json()["reason"])
            assert answers[0] == answers[1], path
        listed = [
            await gateway.http.get(f"/api/v1/{path}", headers={"x-api-key": BOB})
            for path in ("training_runs", "checkpoints", "sessions", f"training_runs/{hers['run_id']}/checkpoints")
        ]
        assert (await gateway.http.get(JOBS, headers={"x-api-key": BOB})).json() == {"rlorTrainerJobs": []}
        assert all(hers["run_id"] not in one.text and hers["session_id"] not in one.text for one in listed)
        passed = await gateway.forward_backward(hers["model_id"], 2, BOB)
        assert passed.status_code == 404
        for model in (hers["path"].replace("/weights/", "/sampler_weights/"), hers["sampler_id"]):
            spoken = await gateway.http.post(
                "/oai/api/v1/completions", json={"model": model, "prompt": "x"}, headers={"x-api-key": BOB}
            )
            assert spoken.status_code == 404, spoken.text
        # Nothing to be told apart from a future that nobody has, and nothing is cancelled.
        for request_id in (hers["sample_id"], "nobody's"):
            assert await gateway.post("cancel_future", BOB, request_id=request_id) == {}
        assert (await gateway.result(hers["sample_id"], ALICE)).status_code == 200
        # And Alice still has all of it.
        assert (await gateway.result(hers["request_id"], ALICE)).json()["path"] == hers["path"]
        beat = await gateway.http.post(
            "/api/v1/session_heartbeat", json={"session_id": hers["session_id"]}, headers={"x-api-key": ALICE}
        )
        assert beat.status_code == 200


async def test_a_files_url_opens_that_checkpoint_and_nothing_else(tmp_path: Path):
    async with front_end(api_keys=KEYS) as trainer, http_gateway(trainer.address, tmp_path) as gateway:
        model_id = await gateway.model(await gateway.session(ALICE), key=ALICE)
        asked = {"model_id": model_id, "path": "away"}
        saved = await gateway.post("save_weights_external", ALICE, **asked, seq_id=1)
        told = (await gateway.result(saved["request_id"], ALICE)).json()
        assert told["path"].endswith("/external_weights/away")
        run_id = told["path"].removeprefix("tinker://").partition("/")[0]
        at = f"/api/v1/training_runs/{run_id}/checkpoints/external_weights/away/external_weights_urls"
        urls = (await gateway.http.get(at, headers={"x-api-key": ALICE})).json()["urls"]
        assert sorted(urls) == ["name", "zeros"]
        fetched = {name: (await gateway.http.get(url)).content for name, url in urls.items()}
        assert fetched == {"name": b"external-weights.away", "zeros": bytes(3_000_000)}
        for url in (
            urls["zeros"].replace("/zeros", "/other"),
            urls["zeros"].replace("/zeros", "/..%2f..%2fmanifest.json"),
            urls["zeros"].replace("external_files/", "external_files/x"),
        ):
            assert (await gateway.http.get(url)).status_code == 404
        # What was offered is not there any more.
        await gateway.http.delete(at.removesuffix("/external_weights_urls"), headers={"x-api-key": ALICE})
        assert (await gateway.http.get(urls["zeros"])).status_code == 404
        encrypted = await gateway.post(
            "save_weights_external", ALICE, **asked, seq_id=2, age_encryption_recipients=["age1x"]
        )
        refused = (await gateway.result(encrypted["request_id"], ALICE)).json()
        assert (refused["category"], "age_encryption_recipients is not served" in refused["error"]) == ("user", True)


async def test_garbage_futures_are_not_found(tmp_path: Path):
    async with front_end() as trainer, http_gateway(trainer.address, tmp_path) as gateway:
        session_id = await gateway.session()
        model_id = await gateway.model(session_id)
        garbage = ["", "x", "::", f"{model_id}:", f"{model_id}:-1", f"{model_id}:{10**30}", f"{model_id}:\u0661", "\0"]
        garbage += [
            f"{model_id}:7",
            f"{session_id}:train:9:1",
            f"{session_id}:sample:0:0",
            f"{session_id}:train:9:unload",
        ]
        for request_id in [*garbage, "a" * 100_000]:
            response = await gateway.http.post("/api/v1/retrieve_future", json={"request_id": request_id})
            assert response.status_code == 404, (request_id[:80], response.text)
            assert len(response.json()["error"]) < 500


@pytest.mark.parametrize(
    "begun",
    [
        b"GET /api/v1/healthz HTTP/1.1\r\nhost: x\r\nx-endless: ",
        b"POST /api/v1/create_session HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx-endless: ",
    ],
    ids=["head", "trailer"],
)
async def test_a_head_without_an_end_is_not_kept(tmp_path: Path, begun: bytes):
    async with front_end() as trainer, http_gateway(trainer.address, tmp_path) as gateway:
        reader, writer = await asyncio.open_connection(gateway.http.base_url.host, gateway.http.base_url.port)
        writer.write(begun)
        with contextlib.suppress(ConnectionError):
            for _ in range(64):
                writer.write(b"a" * 65536)
                await writer.drain()
        with contextlib.suppress(ConnectionError):
            # It hangs up, which it does not while it waits for more.
            assert b" 200 " not in await asyncio.wait_for(reader.read(), DEADLINE_S)
        writer.close()


async def test_whoever_has_no_valid_key_begins_nothing(tmp_path: Path):
    async with front_end(api_keys=KEYS) as trainer, http_gateway(trainer.address, tmp_path) as gateway:
        for key in ("", "tml-mallory", "x" * 5000, "tml-\xe9"):
            headers = [(b"x-api-key", key.encode("latin-1"))]
            for path in ("client/config", "create_session"):
                assert (await gateway.http.post(f"/api/v1/{path}", json={}, headers=headers)).status_code == 401
            for path in ("get_server_capabilities", "training_runs", "checkpoints"):
                assert (await gateway.http.get(f"/api/v1/{path}", headers=headers)).status_code == 401
        refused = await gateway.http.get("/oai/api/v1/models", headers={"authorization": "Bearer nope"})
        assert refused.status_code == 401
        assert refused.json()["error"]["type"] == "authentication_error"


async def test_equal_prompts_go_together_and_each_gets_its_own(tmp_path: Path):
    async with front_end() as trainer, http_gateway(trainer.address, tmp_path) as gateway:
        session_id = await gateway.session()
        sampler = await gateway.post(
            "create_sampling_session", session_id=session_id, sampling_session_seq_id=0, base_model="fake"
        )
        asked = {
            "sampling_session_id": sampler["sampling_session_id"],
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]},
        }
        futures = await asyncio.gather(
            *(gateway.post("asample", **asked, seq_id=n, sampling_params={"max_tokens": 2}) for n in range(12)),
            *(
                gateway.post("asample", **asked, seq_id=n, sampling_params={"max_tokens": 2, "seed": 1})
                for n in (20, 21)
            ),
        )
        answers = await asyncio.gather(*(gateway.result(one["request_id"]) for one in futures))
        assert {one.status_code for one in answers} == {200}
        assert len({one["sample_sequence_ids"][0] for one in futures}) == 14
        assert 0 < gateway.gateway.queue.merged <= 11


async def test_a_gateway_with_keys_of_its_own_is_closed_to_others_though_the_trainer_has_none(tmp_path: Path):
    async with (
        front_end() as trainer,
        http_gateway(trainer.address, tmp_path, api_keys=("alice tml-alice",)) as served,
    ):
        for path in ("/api/v1/create_session", "/oai/api/v1/models", "/metrics"):
            method = "POST" if path.endswith("session") else "GET"
            for key in ("", "tml-mallory"):
                refused = await served.http.request(method, path, headers={"x-api-key": key} if key else {}, json={})
                assert (refused.status_code, "API key" in refused.text) == (401, True), path
        assert (await served.http.get("/api/v1/healthz")).status_code == 200
        assert await served.session("tml-alice")
