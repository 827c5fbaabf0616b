"""The gateway keeps the order of a model's operations, whatever order they arrive in."""

import asyncio
import itertools
from pathlib import Path

import pytest
from gradwire.errors import error

from tests.fakes import FakeWorker
from tests.front_end import front_end
from tests.http_gateway import HttpGateway, http_gateway, one_pass
from trainer_service.gateway.sessions import Caller
from trainer_service.gateway.wire import tinker_wire_pb2 as wire


@pytest.mark.parametrize("order", [(2, 3, 4, 1), (1, 2, 3, 4), (4, 3, 2, 1)])
async def test_operations_run_in_the_order_of_their_numbers(order: tuple[int, ...], tmp_path: Path):
    async with front_end() as trainer, http_gateway(trainer.address, tmp_path) as gateway:
        model_id = await gateway.model(await gateway.session())
        futures = [(await gateway.forward_backward(model_id, number, tokens=number)).json() for number in order]
        answers = await asyncio.gather(*(gateway.result(one["request_id"]) for one in futures))
        assert all(one.headers["content-type"] == "application/x-protobuf" for one in answers)
        assert trainer.operations() == [(number, "forward_backward") for number in (1, 2, 3, 4)]


async def test_an_operation_that_comes_again_is_done_once(tmp_path: Path):
    async with front_end() as trainer, http_gateway(trainer.address, tmp_path) as gateway:
        model_id = await gateway.model(await gateway.session())
        first = await gateway.forward_backward(model_id, 1)
        again = await gateway.forward_backward(model_id, 1)
        assert first.json() == again.json()
        assert (await gateway.result(first.json()["request_id"])).content
        late = await gateway.forward_backward(model_id, 1)
        assert late.json() == first.json()
        other = await gateway.forward_backward(model_id, 1, weight=2.0)
        assert (other.status_code, other.json()["reason"]) == (400, "SEQ_ID_CONFLICT")
        assert trainer.operations() == [(1, "forward_backward")]


async def test_a_refused_operation_uses_its_number_up(tmp_path: Path):
    async with front_end() as trainer, http_gateway(trainer.address, tmp_path) as gateway:
        model_id = await gateway.model(await gateway.session())
        refused = [
            await gateway.forward_backward(model_id, 1, loss_fn="stable_reinforce"),
            await gateway.http.post(
                "/api/v1/save_weights_external",
                json={"model_id": model_id, "seq_id": 2, "age_encryption_recipients": ["age1x"]},
            ),
            await gateway.http.post(
                "/api/v1/optim_step", json={"model_id": model_id, "seq_id": 3, "optimizer_params": {"type": "dimuon"}}
            ),
            await gateway.http.post(
                "/api/v1/save_weights", json={"model_id": model_id, "seq_id": 4, "path": "a", "colour": "red"}
            ),
        ]
        behind = await gateway.post("optim_step", model_id=model_id, seq_id=5, adam_params={"learning_rate": 0.1})
        for one in refused:
            assert one.status_code == 200
            answer = await gateway.result(one.json()["request_id"])
            assert answer.status_code == 200
            assert answer.json()["category"] == "user"
            assert len(answer.json()["error"]) > 20
        assert (await gateway.result(behind["request_id"])).json()["type"] == "optim_step"
        kinds = [kind for _, kind in trainer.operations()]
        assert kinds == ["cancel"] * 4 + ["optim_step"]


async def test_a_pass_over_what_is_no_text_is_refused(tmp_path: Path):
    async with front_end() as trainer, http_gateway(trainer.address, tmp_path) as gateway:
        model_id = await gateway.model(await gateway.session())
        for seq_id, kind in enumerate(("image", "dmel"), 1):
            message = wire.ForwardBackwardRequest.FromString(one_pass(model_id, seq_id))
            getattr(message.data[0].model_input.add(), kind).SetInParent()
            sent = await gateway.http.post("/api/v1/forward_backward", content=message.SerializeToString())
            answer = (await gateway.result(sent.json()["request_id"])).json()
            assert answer["category"] == "user"
            assert f"data[0].model_input.chunks[1] is {kind}" in answer["error"]


async def test_what_the_trainer_fails_with_is_told_by_the_future(tmp_path: Path):
    async with front_end() as trainer, http_gateway(trainer.address, tmp_path) as gateway:
        model_id = await gateway.model(await gateway.session())
        run_id = next(iter(trainer.worker.steps))
        trainer.worker.failures[run_id, 1] = error("NON_FINITE", "The loss is NaN.")
        future = (await gateway.forward_backward(model_id, 1)).json()
        answer = (await gateway.result(future["request_id"])).json()
        assert answer == {"error": "The loss is NaN.", "category": "user", "reason": "NON_FINITE"}
        assert (await gateway.forward_backward(model_id, 2)).status_code == 200


async def test_a_stranger_cannot_wait_for_ever_for_what_never_comes(tmp_path: Path):
    async with front_end() as trainer, http_gateway(trainer.address, tmp_path) as gateway:
        model_id = await gateway.model(await gateway.session())
        for request_id in (f"{model_id}:77", f"{model_id}:0x1", "", "🦀", "a" * 10_000, f"{model_id}:{'9' * 30}"):
            assert (await gateway.result(request_id)).status_code in (400, 404)


async def test_a_gateway_that_was_killed_is_followed_by_one_that_goes_on(tmp_path: Path):
    """The first one is not closed, only cut off: nothing of it is tidied up."""
    worker = FakeWorker(latency_s=0.02)
    async with front_end(worker=worker) as trainer:
        async with http_gateway(trainer.address, tmp_path) as gateway:
            model_id = await gateway.model(await gateway.session())
            held = (await gateway.forward_backward(model_id, 2)).json()["request_id"]
            sent = (await gateway.forward_backward(model_id, 1)).json()["request_id"]
            stuck = (await gateway.forward_backward(model_id, 4)).json()["request_id"]
        async with http_gateway(trainer.address, tmp_path) as gateway:
            assert (await gateway.result(sent)).content
            assert (await gateway.result(held)).content
            await gateway.forward_backward(model_id, 3)
            assert (await gateway.result(stuck)).content
            assert trainer.operations() == [(number, "forward_backward") for number in (1, 2, 3, 4)]


async def test_two_gateways_before_one_trainer_do_not_meet(tmp_path: Path):
    async with (
        front_end() as trainer,
        http_gateway(trainer.address, tmp_path / "a") as one,
        http_gateway(trainer.address, tmp_path / "b") as other,
    ):
        models = [await gateway.model(await gateway.session()) for gateway in (one, other)]
        for number, (gateway, model_id) in itertools.product((1, 2), zip((one, other), models, strict=True)):
            future = (await gateway.forward_backward(model_id, number)).json()
            assert (await gateway.result(future["request_id"])).content
        assert sorted(trainer.operations()) == [(number, "forward_backward") for number in (1, 1, 2, 2)]


async def test_a_session_without_a_heartbeat_ends_and_its_runs_go(tmp_path: Path):
    async with front_end() as trainer, http_gateway(trainer.address, tmp_path, session_grace_s=0.4) as gateway:
        session_id = await gateway.session()
        model_id = await gateway.model(session_id)
        async with asyncio.timeout(30):
            # The fake worker tells nobody.
            while trainer.worker.steps:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        late = await gateway.http.post("/api/v1/session_heartbeat", json={"session_id": session_id})
        assert late.status_code == 410
        assert (await gateway.forward_backward(model_id, 1)).status_code == 410


async def test_a_heartbeat_keeps_a_session(tmp_path: Path):
    async with front_end() as trainer, http_gateway(trainer.address, tmp_path, session_grace_s=2.0) as gateway:
        session_id = await gateway.session()
        await gateway.model(session_id)
        for _ in range(15):
            await asyncio.sleep(0.2)
            await gateway.post("session_heartbeat", session_id=session_id)
        assert len(trainer.worker.steps) == 1


async def test_sessions_that_are_over_are_told_of_and_hold_nothing(tmp_path: Path):
    async with front_end() as trainer:
        async with http_gateway(trainer.address, tmp_path) as gateway:
            session_id = await gateway.session("tml-a")
            model_id = await gateway.model(session_id, key="tml-a")
            done = (await gateway.forward_backward(model_id, 1, "tml-a")).json()["request_id"]
            assert (await gateway.result(done, "tml-a")).content
            headers = {"x-api-key": "tml-a"}
            await gateway.http.post(f"/api/v1/sessions/{session_id}/finish", json={}, headers=headers)
            async with asyncio.timeout(30):
                # The fake worker tells nobody.
                while trainer.worker.steps or gateway.gateway.sessions.held(Caller("tml-a")):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert await over(gateway, session_id)
        async with http_gateway(trainer.address, tmp_path) as gateway:
            assert not gateway.gateway.sessions.held(Caller("tml-a"))
            assert await over(gateway, session_id)


async def over(gateway: HttpGateway, session_id: str) -> bool:
    """Whether a session of this key, and of no other, is told of as over."""
    headers = {"x-api-key": "tml-a"}
    listed = (await gateway.http.get("/api/v1/sessions", headers=headers)).json()["sessions"]
    told = await gateway.http.get(f"/api/v1/sessions/{session_id}", headers=headers)
    late = await gateway.http.post("/api/v1/session_heartbeat", json={"session_id": session_id}, headers=headers)
    strange = await gateway.http.get(f"/api/v1/sessions/{session_id}", headers={"x-api-key": "tml-b"})
    return listed == [session_id] and (told.status_code, late.status_code, strange.status_code) == (200, 410, 404)
