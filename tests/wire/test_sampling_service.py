"""SamplingService over a fake worker: streams, cancelling, owners, limits."""

import asyncio
import uuid
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1 import sampling_service_pb2 as pb
from gradwire.v1.datum_pb2 import ModelInput
from gradwire.v1.trainer_service_pb2 import CreateRunRequest, DeleteRunRequest

from tests.fakes import FakeWorker
from tests.front_end import FrontEnd, front_end
from tests.owners import error_of, with_key
from trainer_service.config import Limits
from trainer_service.paths import SAMPLER_WEIGHTS, CheckpointPath

KEYS = ("alice alices-key", "bob bobs-key", "ops ops-key admin")
ALICE, BOB, OPS = (with_key(key) for key in ("alices-key", "bobs-key", "ops-key"))
REQUESTS = {method.name: method.input_type.name for method in pb.DESCRIPTOR.services_by_name["SamplingService"].methods}


def request(max_tokens: int | None = 2, **fields: Any) -> pb.SampleRequest:
    params = pb.SamplingParams(max_tokens=max_tokens)
    return pb.SampleRequest(prompt=ModelInput(tokens=[1, 2, 3]), sampling_params=params, **fields)


async def outcome(trainer: FrontEnd, method: str, message: Any, metadata: Any = None) -> Any:
    """What a call of SamplingService answers: a message, or the last of its stream."""
    call = getattr(trainer.sampling, method)(message, metadata=metadata)
    if method != "Sample":
        return await call
    return [response async for response in call][-1]


async def under_way(trainer: FrontEnd, count: int) -> None:
    """Returns once so many requests are under way in the worker."""
    while len(trainer.worker.sampling) != count:  # noqa: ASYNC110  (the fake has no event for it)
        await asyncio.sleep(0.01)


async def test_tokens_come_one_message_after_the_other():
    async with front_end() as trainer:
        responses = [response async for response in trainer.sampling.Sample(request(3))]
        assert [list(response.samples[0].tokens) for response in responses] == [[7], [7], [7]]
        logprobs = pb.ComputeLogprobsRequest(prompt=ModelInput(tokens=[1, 2, 3]))
        found = await trainer.sampling.ComputeLogprobs(logprobs)
        assert list(found.prompt.logprobs) == [-2.0, -2.0]


async def test_a_client_that_ends_the_call_frees_its_place():
    async with front_end(limits=Limits(max_sample_requests=1)) as trainer:
        call = trainer.sampling.Sample(request(None))
        assert (await call.read()).samples
        refused = await error_of(outcome(trainer, "Sample", request()))
        assert refused.reason == "LIMIT_EXCEEDED"
        assert refused.retry_after_s is not None
        call.cancel()
        await under_way(trainer, 0)
        assert await outcome(trainer, "Sample", request())
        assert len(trainer.server.sampling) == 0


async def test_a_worker_that_dies_ends_the_stream_with_the_reason():
    worker = FakeWorker()
    async with front_end(worker=worker) as trainer:
        call = trainer.sampling.Sample(request(None))
        assert (await call.read()).samples
        worker.die()
        failed = await error_of(_rest(call))
        assert failed.reason == "WORKER_DIED"


async def _rest(call: Any) -> None:
    """Reads to the end of a stream that was begun, and raises what ended it."""
    while isinstance(await call.read(), pb.SampleResponse):
        pass
    metadata = await call.initial_metadata(), await call.trailing_metadata()
    raise grpc.aio.AioRpcError(await call.code(), *metadata, await call.details(), None)


async def test_a_trainer_that_drains_refuses_new_requests_and_ends_those_under_way():
    async with front_end() as trainer:
        call = trainer.sampling.Sample(request(None))
        assert (await call.read()).samples
        drained = asyncio.create_task(trainer.server.drain())
        assert (await error_of(_rest(call))).reason == "DRAINING"
        await drained


def test_every_call_of_the_service_names_a_sampler():
    assert {"Sample", "ComputeLogprobs", "OpenSampler", "CloseSampler"} <= REQUESTS.keys()
    assert all("sampler" in getattr(pb, name).DESCRIPTOR.fields_by_name for name in REQUESTS.values())


@pytest.mark.parametrize("method", sorted(REQUESTS))
@pytest.mark.parametrize("place", ["sampler_weights/final", "frozen_weights/3"])
async def test_a_sampler_of_somebody_elses_run_answers_as_one_that_does_not_exist(method: str, place: str):
    async with front_end(api_keys=KEYS) as trainer:
        created = await trainer.stub.CreateRun(CreateRunRequest(), metadata=ALICE)
        run_id = created.run.run_id
        told = []
        for asked, metadata in ((run_id, BOB), ("run-000000000000", BOB)):
            message = getattr(pb, REQUESTS[method])(sampler=pb.Sampler(model_path=f"gradwire://{asked}/{place}"))
            refused = await error_of(outcome(trainer, method, message, metadata))
            assert refused.code == grpc.StatusCode.NOT_FOUND.value[0]
            told.append((refused.reason, refused.message.replace(asked, "RUN")))
        assert told[0] == told[1]
        assert [kind for _, _, kind in trainer.worker.executed] == ["create_run"]


async def test_an_owner_and_an_admin_may_use_a_runs_samplers():
    async with front_end(api_keys=KEYS) as trainer:
        run_id = (await trainer.stub.CreateRun(CreateRunRequest(), metadata=ALICE)).run.run_id
        sampler = pb.Sampler(model_path=f"gradwire://{run_id}/frozen_weights/1")
        for metadata in (ALICE, OPS):
            assert await outcome(trainer, "Sample", request(sampler=sampler), metadata)


async def test_what_a_deleted_run_saved_is_still_its_owners_to_use_and_nobody_elses(tmp_path: Path):
    async with front_end(api_keys=KEYS, data_dir=tmp_path) as trainer:
        run_id = (await trainer.stub.CreateRun(CreateRunRequest(), metadata=ALICE)).run.run_id
        save = ops.SaveWeightsForSamplerRequest(run_id=run_id, name="final")
        path = (await trainer.stub.SaveWeightsForSampler(save, metadata=ALICE)).path
        await trainer.stub.DeleteRun(DeleteRunRequest(run_id=run_id), metadata=ALICE)
        adapter = CheckpointPath.parse(path).folder(tmp_path / "checkpoints")
        (adapter / "adapter_config.json").write_text('{"r": 4}')
        (adapter / "adapter_model.safetensors").write_bytes(b"")
        uses = (
            lambda key: outcome(trainer, "Sample", request(sampler=pb.Sampler(model_path=path)), key),
            lambda key: trainer.stub.CreateRun(CreateRunRequest(adapter_path=path), metadata=key),
        )
        for use in uses:
            for key in (ALICE, OPS):
                assert await use(key)
            assert (await error_of(use(BOB))).reason == "CHECKPOINT_NOT_FOUND"


async def test_a_sampler_that_is_only_in_the_store_is_fetched_with_its_base_before_the_worker_is_asked(tmp_path: Path):
    url = f"memory://{uuid.uuid4().hex}"
    base, delta = (CheckpointPath("run-1", SAMPLER_WEIGHTS, name) for name in ("base", "delta"))
    async with front_end(data_dir=tmp_path / "one", storage_url=url) as trainer:
        trainer.worker.save(base)
        trainer.worker.save(delta, base_path=str(base))
        await asyncio.to_thread(trainer.server.catalog.sweep)
    async with front_end(data_dir=tmp_path / "two", storage_url=url, api_keys=KEYS) as trainer:
        places = [place.folder(trainer.server.catalog.root) for place in (base, delta)]
        message = request(sampler=pb.Sampler(model_path=str(delta)))
        # It was saved where nobody had a name.
        assert (await error_of(outcome(trainer, "Sample", message, BOB))).reason == "CHECKPOINT_NOT_FOUND"
        assert [place.exists() for place in places] == [False, False]
        assert await outcome(trainer, "Sample", message, OPS)
        assert [(place / "zeros").exists() for place in places] == [True, True]


@pytest.mark.parametrize(
    "path", ["final", "gradwire://run-1", "gradwire://run-1/state/a", "gradwire://../sampler_weights/a", "x" * 300]
)
async def test_a_path_that_is_none_is_refused_saying_its_form(path: str):
    async with front_end() as trainer:
        refused = await error_of(outcome(trainer, "Sample", request(sampler=pb.Sampler(model_path=path))))
        assert refused.reason == "INVALID_FIELD"
        assert refused.field_violations[0][0] == "model_path"
        assert "gradwire://<run_id>/sampler_weights/<name>" in refused.message


async def test_another_base_model_is_refused_naming_both():
    async with front_end() as trainer:
        refused = await error_of(outcome(trainer, "Sample", request(sampler=pb.Sampler(base_model="other"))))
        assert (refused.reason, refused.metadata) == ("BASE_MODEL_MISMATCH", {"requested": "other", "served": "fake"})
