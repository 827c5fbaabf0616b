"""Whose requests to sample take the trainer's places, and how a client that stops wanting gives its own back."""

import asyncio
import time
from typing import Any

import grpc.aio
import pytest
from gradwire import ServiceClient
from gradwire.errors import GradwireError, UnavailableError, from_rpc_error
from gradwire.v1 import sampling_service_pb2 as pb
from gradwire.v1.datum_pb2 import ModelInput

from tests.front_end import FrontEnd, front_end, front_end_on_a_thread
from tests.waiting import until, wait_until
from trainer_service.config import Limits

KEYS = ("alice alice-key", "bob bob-key")
ALICE: Any = (("authorization", "Bearer alice-key"),)
BOB: Any = (("authorization", "Bearer bob-key"),)
ENDLESS = pb.SampleRequest(prompt=ModelInput(tokens=[1, 2]))


async def begin(trainer: FrontEnd, key: Any) -> Any:
    """A request that goes on, once its first token came."""
    call = trainer.sampling.Sample(ENDLESS, metadata=key)
    assert (await call.read()).samples
    return call


async def refusal(call: Any) -> GradwireError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


async def test_one_owners_requests_keep_no_other_from_a_share_of_its_own():
    async with front_end(api_keys=KEYS, limits=Limits(max_sample_requests=8)) as trainer:
        calls = [await begin(trainer, ALICE) for _ in range(8)]
        refused = await refusal(begin(trainer, ALICE))
        assert (refused.reason, refused.metadata["limit"]) == ("LIMIT_EXCEEDED", "8")
        assert "8 of them yours" in refused.message
        calls += [await begin(trainer, BOB) for _ in range(2)]
        assert (await refusal(begin(trainer, BOB))).reason == "LIMIT_EXCEEDED"
        assert trainer.worker.sample_owners == ["alice"] * 8 + ["bob"] * 2
        for call in calls:
            call.cancel()


async def test_a_lease_of_more_than_ten_minutes_is_refused():
    async with front_end() as trainer:
        refused = await refusal(trainer.sampling.OpenSampler(pb.OpenSamplerRequest(lease_ms=600_001)))
        assert refused.field_violations[0][0] == "lease_ms"


def test_a_coroutine_cancelled_while_it_awaits_a_sample_frees_its_place_as_cancelling_the_future_does():
    with front_end_on_a_thread() as trainer, ServiceClient(f"http://{trainer.address}", timeout_s=20) as service:
        sampler = service.create_sampling_client()

        async def give_up() -> None:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await sampler.sample([1, 2])

        asyncio.run(give_up())
        wait_until(lambda: trainer.worker.sample_owners and not trainer.worker.sampling)
        future = sampler.sample([1, 2])
        wait_until(lambda: trainer.worker.sampling)
        assert future.cancel()
        wait_until(lambda: not trainer.worker.sampling)


async def test_a_sample_under_which_the_worker_dies_begins_again_and_is_given_up_the_third_time():
    async with front_end() as trainer:
        with ServiceClient(f"http://{trainer.address}", timeout_s=20) as service:
            sampler = await asyncio.to_thread(service.create_sampling_client)
            future = sampler.sample([1, 2])
            for _ in range(3):
                await until(lambda: len(trainer.worker.sampling) == 1)
                assert not future.done()
                trainer.worker.die()
                trainer.worker.become_ready()
            with pytest.raises(UnavailableError) as given_up:
                await asyncio.wait_for(future, 20)
            assert given_up.value.reason == "WORKER_DIED"


def test_the_lease_of_frozen_weights_is_renewed_while_their_client_is_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gradwire.sampling_client.LEASE_MS", 200)
    with front_end_on_a_thread() as trainer, ServiceClient(f"http://{trainer.address}", timeout_s=20) as service:
        client = service.create_training_client()
        sampler = client.save_weights_and_get_sampling_client()
        path = sampler.model_path
        wait_until(lambda: trainer.worker.leases.count((path, 200)) >= 3)
        sampler.close()
        count = len(trainer.worker.leases)
        time.sleep(0.3)
        assert len(trainer.worker.leases) <= count + 1
        # A checkpoint, and the base model, stay by themselves.
        service.create_sampling_client()
        assert trainer.worker.leases[-1] == ("", 0)
        client.delete_run()
