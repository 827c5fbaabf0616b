"""Sample requests at the gateway: those that are equal together, and one long poll that tells of all."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.front_end import front_end
from tests.http_gateway import HttpGateway, http_gateway


class Sampler:
    """A sampler under test.

    Args:
        gateway: Where.
        session_id: Whose.
        sampler_id: Its id.
    """

    def __init__(self, gateway: HttpGateway, session_id: str, sampler_id: str) -> None:
        self._gateway = gateway
        self.session_id = session_id
        self.sampler_id = sampler_id

    async def ask(self, seq_id: int, *, num_samples: int = 1, **params: Any) -> str:
        """A request's id."""
        answer = await self._gateway.post(
            "asample",
            sampling_session_id=self.sampler_id,
            seq_id=seq_id,
            num_samples=num_samples,
            prompt={"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]},
            sampling_params={"max_tokens": 2, **params},
        )
        return answer["request_id"]

    async def answered(self, *, after: int = 0, clone: int = 0, **more: Any) -> Any:
        """What a long poll tells."""
        target = {
            "type": "sampling_session",
            "sampling_session_id": self.sampler_id,
            "cloned_sampler_id": clone,
        }
        return await self._gateway.post("retrieve_futures", target=target, prev_cursor=after, **more)


async def new_sampler(gateway: HttpGateway) -> Sampler:
    """One of the base model."""
    session_id = await gateway.session()
    made = await gateway.post(
        "create_sampling_session", session_id=session_id, sampling_session_seq_id=0, base_model="fake"
    )
    return Sampler(gateway, session_id, made["sampling_session_id"])


async def test_one_poll_tells_of_every_answer_once(tmp_path: Path):
    async with front_end() as trainer, http_gateway(trainer.address, tmp_path) as gateway:
        sampler = await new_sampler(gateway)
        asked = {await sampler.ask(number) for number in range(5)}
        told: list[str] = []
        cursor = 0
        while len(told) < 5:
            found = await sampler.answered(after=cursor)
            assert found["cursor"] > cursor
            cursor = found["cursor"]
            for one in found["completions"]:
                assert one["state"] == "finished"
                body = (await gateway.result(one["request_id"])).content
                assert one["response_payload_uncompressed_size"] == len(body)
                told.append(one["request_id"])
        assert sorted(told) == sorted(asked)
        assert await sampler.answered(after=cursor, timeout=0) == {"completions": [], "cursor": cursor}


async def test_a_copy_of_a_client_is_told_of_its_own_requests(tmp_path: Path):
    async with front_end() as trainer, http_gateway(trainer.address, tmp_path) as gateway:
        sampler = await new_sampler(gateway)
        await sampler.ask(0)
        copys = await sampler.ask(7_000_000_001)
        found = await sampler.answered(clone=7)
        assert [one["request_id"] for one in found["completions"]] == [copys]


async def test_a_poll_after_a_restart_tells_what_is_new_and_begins_what_was_left(tmp_path: Path):
    async with front_end() as trainer:
        async with http_gateway(trainer.address, tmp_path) as gateway:
            sampler = await new_sampler(gateway)
            await sampler.ask(0)
            cursor = (await sampler.answered())["cursor"]
            later = [await sampler.ask(1), await sampler.ask(2, seed=1)]
        async with http_gateway(trainer.address, tmp_path) as gateway:
            sampler = Sampler(gateway, sampler.session_id, sampler.sampler_id)
            told: list[str] = []
            while len(told) < 2:
                found = await sampler.answered(after=cursor)
                told += [one["request_id"] for one in found["completions"]]
                cursor = found["cursor"]
            assert sorted(told) == sorted(later)


async def test_what_its_client_has_is_forgotten(tmp_path: Path):
    async with front_end() as trainer, http_gateway(trainer.address, tmp_path) as gateway:
        sampler, other = await new_sampler(gateway), await new_sampler(gateway)
        kept, gone = await other.ask(0), await sampler.ask(0)
        cursor = (await sampler.answered())["cursor"]
        assert (await gateway.result(kept)).status_code == 200
        await sampler.answered(after=cursor, timeout=0, retrieved_request_ids=[gone, kept, "x", 4])
        assert (await gateway.result(gone)).status_code == 404
        assert (await gateway.result(kept)).status_code == 200


async def test_a_poll_of_an_ended_session_says_so(tmp_path: Path):
    async with front_end() as trainer, http_gateway(trainer.address, tmp_path) as gateway:
        sampler = await new_sampler(gateway)
        await gateway.http.post(f"/api/v1/sessions/{sampler.session_id}/finish", json={})
        body = {"target": {"sampling_session_id": sampler.sampler_id}}
        assert (await gateway.http.post("/api/v1/retrieve_futures", json=body)).status_code == 410


async def test_equal_requests_of_a_slow_client_still_go_together(tmp_path: Path):
    async with front_end() as trainer, http_gateway(trainer.address, tmp_path) as gateway:
        sampler = await new_sampler(gateway)
        asked = [await sampler.ask(number) for number in range(12)]
        answers = await asyncio.gather(*(gateway.result(one) for one in asked))
        assert {one.status_code for one in answers} == {200}
        assert gateway.gateway.queue.merged > 0


async def test_a_cancelled_future_frees_its_place_at_the_trainer(tmp_path: Path):
    async with front_end() as trainer, http_gateway(trainer.address, tmp_path) as gateway:
        sampler = await new_sampler(gateway)
        for seed in (None, 1):
            request_id = await sampler.ask(seed or 0, max_tokens=None, seed=seed)
            await until(lambda: len(trainer.worker.sampling) == 1)
            await gateway.post("cancel_future", request_id=request_id)
            await until(lambda: not trainer.worker.sampling)


async def test_one_of_several_equal_requests_that_is_cancelled_ends_no_other(tmp_path: Path):
    async with front_end() as trainer, http_gateway(trainer.address, tmp_path) as gateway:
        sampler = await new_sampler(gateway)
        one, other = await asyncio.gather(sampler.ask(0, max_tokens=None), sampler.ask(1, max_tokens=None))
        await until(lambda: bool(trainer.worker.sampling))
        await gateway.post("cancel_future", request_id=one)
        assert trainer.worker.sampling
        await gateway.post("cancel_future", request_id=other)
        await until(lambda: not trainer.worker.sampling)


async def test_a_request_under_which_the_worker_dies_begins_again_and_is_given_up_the_third_time(tmp_path: Path):
    async with front_end() as trainer, http_gateway(trainer.address, tmp_path) as gateway:
        sampler = await new_sampler(gateway)
        request_id = await sampler.ask(0, max_tokens=None)
        for _ in range(3):
            await until(lambda: len(trainer.worker.sampling) == 1)
            trainer.worker.die()
            trainer.worker.become_ready()
        told = (await gateway.result(request_id)).json()
        assert (told["reason"], told["category"]) == ("WORKER_DIED", "server")


async def test_a_silent_clients_samples_end(tmp_path: Path):
    async with front_end() as trainer, http_gateway(trainer.address, tmp_path, session_grace_s=0.4) as gateway:
        sampler = await new_sampler(gateway)
        request_id = await sampler.ask(0, max_tokens=None)
        await until(lambda: len(trainer.worker.sampling) == 1)
        await until(lambda: not trainer.worker.sampling)
        assert (await gateway.http.post("/api/v1/retrieve_future", json={"request_id": request_id})).status_code == 410


async def test_a_prompt_that_is_no_text_is_refused(tmp_path: Path):
    async with front_end() as trainer, http_gateway(trainer.address, tmp_path) as gateway:
        sampler = await new_sampler(gateway)
        for kind in ("image", "image_asset_pointer", "dmel"):
            asked = {"sampling_session_id": sampler.sampler_id, "seq_id": 0, "sampling_params": {}}
            answer = await gateway.http.post(
                "/api/v1/asample", json={**asked, "prompt": {"chunks": [{"type": kind, "data": "AA=="}]}}
            )
            assert answer.status_code == 400
            assert answer.json()["category"] == "user"
            assert f"is '{kind}'; this trainer's models read tokens alone" in answer.json()["error"]


async def until(done: Callable[[], bool]) -> None:
    """Returns once it is so."""
    async with asyncio.timeout(30):
        # The fake worker tells nobody.
        while not done():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
