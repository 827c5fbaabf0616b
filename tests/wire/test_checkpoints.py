"""CheckpointService, and saves and loads on their way through the trainer."""

import asyncio
import hashlib
import threading
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import fsspec
import grpc
import pytest
from gradwire.errors import from_status
from gradwire.v1 import checkpoint_pb2, trainer_service_pb2
from gradwire.v1 import checkpoint_service_pb2 as pb
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1 import sampling_service_pb2 as pb_sampling

from tests.front_end import FrontEnd, front_end
from tests.owners import ALICE, BOB, KEYS, OPS, create, error_of, with_key, without_id
from trainer_service.config import Limits
from trainer_service.paths import SAMPLER_WEIGHTS, STATE, CheckpointPath


async def save(trainer: FrontEnd, name: str = "a", metadata: Any = None, run_id: str = "") -> str:
    run_id = run_id or await create(trainer, metadata)
    return (await trainer.stub.SaveState(ops.SaveStateRequest(run_id=run_id, name=name), metadata=metadata)).path


async def until(look: Callable[[], Awaitable[Any]], good: Callable[[Any], bool]) -> None:
    """Looks until what is seen is good."""
    while not good(await look()):  # noqa: ASYNC110  (a disk and a store have no event)
        await asyncio.sleep(0.05)


async def listed(trainer: FrontEnd, metadata: Any = None, **fields: Any) -> list[str]:
    answer = await trainer.checkpoints.ListCheckpoints(pb.ListCheckpointsRequest(**fields), metadata=metadata)
    return [checkpoint.path for checkpoint in answer.checkpoints]


async def download(trainer: FrontEnd, path: str, file: str, **fields: Any) -> bytes:
    request = pb.DownloadCheckpointRequest(path=path, file=file, **fields)
    messages = [message async for message in trainer.checkpoints.DownloadCheckpoint(request)]
    offset = fields.get("offset", 0)
    for message in messages:
        assert message.offset == offset
        assert 0 < len(message.data) <= 1 << 20
        offset += len(message.data)
    return b"".join(message.data for message in messages)


async def test_a_checkpoint_is_listed_described_downloaded_and_deleted():
    async with front_end() as trainer:
        path = await save(trainer)
        assert await listed(trainer) == [path]
        assert await listed(trainer, kind=checkpoint_pb2.CHECKPOINT_KIND_SAMPLER_WEIGHTS) == []
        checkpoint = (await trainer.checkpoints.GetCheckpoint(pb.GetCheckpointRequest(path=path))).checkpoint
        assert (checkpoint.name, checkpoint.step, checkpoint.architecture) == ("a", 3, "Fake")
        assert not checkpoint.HasField("expires_at")
        files = {file.name: file for file in checkpoint.files}
        zeros = await download(trainer, path, "zeros", sha256=files["zeros"].sha256)
        assert len(zeros) == files["zeros"].size_bytes == 3_000_000
        assert hashlib.sha256(zeros).hexdigest() == files["zeros"].sha256
        assert await download(trainer, path, "zeros", offset=2_999_990) == bytes(10)
        assert await download(trainer, path, "zeros", offset=3_000_000) == b""
        await trainer.checkpoints.DeleteCheckpoint(pb.DeleteCheckpointRequest(path=path))
        assert await listed(trainer) == []


async def test_checkpoints_outlive_their_run_and_the_trainer(tmp_path: Path):
    async with front_end(data_dir=tmp_path) as trainer:
        path = await save(trainer)
        run_id = CheckpointPath.parse(path).run_id
        await trainer.stub.DeleteRun(trainer_service_pb2.DeleteRunRequest(run_id=run_id))
        assert await listed(trainer, run_id=run_id) == [path]
    async with front_end(data_dir=tmp_path) as trainer:
        assert await listed(trainer) == [path]
        other = await trainer.create_run()
        await trainer.stub.LoadState(ops.LoadStateRequest(run_id=other, path=path))


async def test_a_time_to_live_ends_a_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("trainer_service.trainer._SWEEP_INTERVAL_S", 0.05)
    async with front_end(data_dir=tmp_path) as trainer:
        path = await save(trainer)
        await trainer.checkpoints.SetCheckpointTtl(pb.SetCheckpointTtlRequest(path=path, ttl_seconds=1))
        kept = await save(trainer)
        await until(lambda: listed(trainer), lambda paths: paths == [kept])
        refused = await error_of(trainer.checkpoints.GetCheckpoint(pb.GetCheckpointRequest(path=path)))
        assert refused.reason == "CHECKPOINT_NOT_FOUND"
        folder = CheckpointPath.parse(path).folder(tmp_path / "checkpoints")
        await until(lambda: asyncio.to_thread(folder.exists), lambda there: not there)
        for ttl_seconds in (0, 1 << 62):
            request = pb.SetCheckpointTtlRequest(path=kept, ttl_seconds=ttl_seconds)
            refused = await error_of(trainer.checkpoints.SetCheckpointTtl(request))
            assert refused.field_violations[0][0] == "ttl_seconds"


def calls_that_name_a_checkpoint() -> list[tuple[str, Any]]:
    """(name, request type) of every call of CheckpointService whose request has a path."""
    methods = pb.DESCRIPTOR.services_by_name["CheckpointService"].methods
    return [(m.name, getattr(pb, m.input_type.name)) for m in methods if "path" in m.input_type.fields_by_name]


def test_all_but_the_list_name_a_checkpoint():
    assert len(calls_that_name_a_checkpoint()) == 4


async def refusal(trainer: FrontEnd, method: str, request: Any, metadata: Any = None) -> Any:
    call = getattr(trainer.checkpoints, method)(request, metadata=metadata)
    if isinstance(call, grpc.aio.UnaryStreamCall):
        return await error_of(call.read())
    return await error_of(call)


@pytest.mark.parametrize(("method", "request_type"), calls_that_name_a_checkpoint())
async def test_somebody_elses_checkpoint_answers_as_one_that_does_not_exist(method: str, request_type: Any):
    async with front_end(api_keys=KEYS) as trainer:
        path = await save(trainer, metadata=ALICE)
        nobodys = "gradwire://run-000000000000/state/a"
        theirs = await refusal(trainer, method, request_type(path=path), BOB)
        missing = await refusal(trainer, method, request_type(path=nobodys), BOB)
        assert theirs.reason == "CHECKPOINT_NOT_FOUND"
        assert theirs.code == grpc.StatusCode.NOT_FOUND.value[0]
        assert without_id(theirs, path) == without_id(missing, nobodys)
        assert await listed(trainer, ALICE) == [path]


async def test_lists_show_ones_own_checkpoints_and_an_admin_all():
    async with front_end(api_keys=KEYS) as trainer:
        alices, bobs = await save(trainer, metadata=ALICE), await save(trainer, metadata=BOB)
        assert await listed(trainer, ALICE) == [alices]
        assert await listed(trainer, BOB, run_id=CheckpointPath.parse(alices).run_id) == []
        assert await listed(trainer, OPS) == [bobs, alices]


async def test_a_run_loads_its_owners_states_and_nobody_elses():
    async with front_end(api_keys=KEYS) as trainer:
        alices = await save(trainer, metadata=ALICE)
        for metadata, path, reason in (
            (ALICE, alices, ""),
            (OPS, alices, ""),
            (BOB, alices, "CHECKPOINT_NOT_FOUND"),
            (BOB, "gradwire://run-1/state/../../x", "INVALID_FIELD"),
        ):
            stream = await trainer.attach(await create(trainer, metadata), metadata=metadata)
            await stream.send(1, load_state={"path": path})
            await stream.send(2, zero_grad={})
            answer = await stream.receive()
            assert answer.WhichOneof("result") == ("error" if reason else "load_state")
            assert reason in str(answer.error.details)
            assert (await stream.receive()).WhichOneof("result") == "zero_grad"
            await stream.close()


@pytest.mark.parametrize("name", ["../a", "/a", "a\0", "a\n", "..", "x" * 100_000])
@pytest.mark.parametrize(("method", "request_type"), calls_that_name_a_checkpoint())
async def test_paths_that_lead_elsewhere_are_refused(method: str, request_type: Any, name: str):
    async with front_end() as trainer:
        for path in (f"gradwire://run-1/state/{name}", f"gradwire://{name}/state/a", name):
            refused = await refusal(trainer, method, request_type(path=path))
            assert refused.field_violations[0][0] == "path"


async def test_files_that_are_not_the_checkpoints_own_are_refused():
    async with front_end() as trainer:
        path = await save(trainer)
        for file in ("../../owner.json", "manifest.json", "/etc/passwd", ""):
            request = pb.DownloadCheckpointRequest(path=path, file=file)
            assert (await refusal(trainer, "DownloadCheckpoint", request)).field_violations[0][0] == "file"
        request = pb.DownloadCheckpointRequest(path=path, file="zeros", offset=3_000_001)
        assert (await refusal(trainer, "DownloadCheckpoint", request)).field_violations[0][0] == "offset"
        changed = pb.DownloadCheckpointRequest(path=path, file="zeros", sha256="0" * 64)
        assert (await refusal(trainer, "DownloadCheckpoint", changed)).reason == "CHECKPOINT_CHANGED"


async def test_a_save_is_answered_once_it_is_stored_and_another_trainer_loads_it(tmp_path: Path):
    url = f"memory://{uuid.uuid4().hex}"
    async with front_end(api_keys=KEYS, data_dir=tmp_path / "one", storage_url=url) as trainer:
        stream = await trainer.attach(await create(trainer, ALICE), metadata=ALICE)
        await stream.send(1, save_state={"name": "a"})
        path = (await stream.receive()).save_state.path
        stored = fsspec.filesystem("memory").find(url.removeprefix("memory:/"))
        assert sum(name.endswith(("manifest.json", "zeros", "owner.json")) for name in stored) == 3
    async with front_end(api_keys=KEYS, data_dir=tmp_path / "two", storage_url=url) as trainer:
        assert await listed(trainer, BOB) == []
        assert await listed(trainer, ALICE) == [path]
        stream = await trainer.attach(await create(trainer, ALICE), metadata=ALICE)
        await stream.send(1, load_state={"path": path})
        assert (await stream.receive()).WhichOneof("result") == "load_state"
        assert (CheckpointPath.parse(path).folder(tmp_path / "two" / "checkpoints") / "zeros").exists()


async def test_a_store_out_of_reach_fails_the_save_which_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("trainer_service.trainer._SWEEP_INTERVAL_S", 0.05)
    url = f"memory://{uuid.uuid4().hex}"

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionRefusedError("nobody there")

    async with front_end(data_dir=tmp_path, storage_url=url) as trainer:
        stream = await trainer.attach(await trainer.create_run())
        fs = fsspec.filesystem("memory")
        with monkeypatch.context() as patched:
            patched.setattr(fs, "put_file", unreachable)
            await stream.send(1, save_state={"name": "a"})
            refused = (await stream.receive()).error
            assert refused.code == grpc.StatusCode.FAILED_PRECONDITION.value[0]
            assert "nobody there" in refused.message
            assert "on the trainer's disk" in refused.message
        await until(
            lambda: asyncio.to_thread(fs.find, url.removeprefix("memory:/")),
            lambda names: any(name.endswith("manifest.json") for name in names),
        )


async def test_an_unkeyed_caller_is_refused_and_a_checkpoint_without_owner_is_an_admins():
    async with front_end(api_keys=KEYS) as trainer:
        assert (await refusal(trainer, "ListCheckpoints", pb.ListCheckpointsRequest())).reason == "INVALID_API_KEY"
        wrong = with_key("wrong")
        assert (await refusal(trainer, "ListCheckpoints", pb.ListCheckpointsRequest(), wrong)).reason
        path = trainer.worker.save(CheckpointPath("run-x", STATE, "a"))
        assert await listed(trainer, ALICE) == []
        assert await listed(trainer, OPS) == [path]


async def test_snapshots_in_the_workers_memory_are_not_for_the_store(tmp_path: Path):
    async with front_end(data_dir=tmp_path, storage_url=f"memory://{uuid.uuid4().hex}") as trainer:
        stream = await trainer.attach(await trainer.create_run())
        await stream.send(1, save_weights_for_sampler={"ephemeral": True})
        assert (await stream.receive()).save_weights_for_sampler.path.endswith("/frozen_weights/1")
        run_id = await trainer.create_run()
        request = ops.SaveWeightsForSamplerRequest(run_id=run_id, ephemeral=True)
        assert (await trainer.stub.SaveWeightsForSampler(request)).path.endswith("/frozen_weights/1")


async def test_a_disk_that_takes_no_fetch_fails_the_load_alone(tmp_path: Path):
    url = f"memory://{uuid.uuid4().hex}"
    async with front_end(data_dir=tmp_path / "one", storage_url=url) as trainer:
        path = await save(trainer)
    async with front_end(data_dir=tmp_path / "two", storage_url=url) as trainer:
        root = trainer.server.catalog.root
        root.mkdir(parents=True)
        (root / ".incoming").write_text("in the way")
        stream = await trainer.attach(await trainer.create_run())
        await stream.send(1, load_state={"path": path})
        await stream.send(2, zero_grad={})
        refused = from_status((await stream.receive()).error)
        assert refused.reason == "STORAGE_FAILED"
        assert "could not be fetched from memory://" in refused.message
        assert (await stream.receive()).WhichOneof("result") == "zero_grad"


async def test_the_event_loop_never_waits_for_the_store_and_one_download_serves_all_who_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    url = f"memory://{uuid.uuid4().hex}"
    weights = CheckpointPath("run-1", SAMPLER_WEIGHTS, "a")
    async with front_end(data_dir=tmp_path / "one", storage_url=url) as trainer:
        state = await save(trainer)
        trainer.worker.save(weights)
        await trainer.server.transfers.sweep()
    async with front_end(data_dir=tmp_path / "two", storage_url=url) as trainer:
        storage = trainer.server.catalog.storage
        assert storage is not None
        asked: list[tuple[str, bool]] = []

        def noted(name: str) -> Callable[..., Any]:
            call = getattr(storage, name)

            def wrapped(*arguments: Any) -> Any:
                asked.append((name, threading.current_thread() is threading.main_thread()))
                return call(*arguments)

            return wrapped

        for name in ("manifest", "owner", "download"):
            monkeypatch.setattr(storage, name, noted(name))
        stream = await trainer.attach(await trainer.create_run())
        for seq_id, path in enumerate((state, "gradwire://run-1/state/none", state), start=1):
            await stream.send(seq_id, load_state={"path": path})
            await stream.receive()
        request = pb_sampling.SampleRequest(sampler=pb_sampling.Sampler(model_path=str(weights)))
        request.prompt.tokens.append(1)
        request.sampling_params.max_tokens = 1

        async def sample() -> None:
            assert [response async for response in trainer.sampling.Sample(request)]

        await asyncio.gather(*(sample() for _ in range(20)))
        assert {on_the_loop for _, on_the_loop in asked} == {False}
        assert [name for name, _ in asked].count("download") == 2  # The state's and the weights'.


async def test_uploads_hold_up_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    async with front_end(
        data_dir=tmp_path, storage_url=f"memory://{uuid.uuid4().hex}", limits=Limits(max_runs=40)
    ) as trainer:
        storage, go_on = trainer.server.catalog.storage, threading.Event()
        assert storage is not None
        kept, upload = await save(trainer, "kept"), storage.upload
        monkeypatch.setattr(storage, "upload", lambda *arguments: (go_on.wait(30), upload(*arguments))[1])
        # More than there are threads of any kind.
        saves = [asyncio.create_task(save(trainer)) for _ in range(36)]
        try:
            while trainer.worker.waiting or len(trainer.operations()) < 37:  # noqa: ASYNC110  (the fake has no event)
                await asyncio.sleep(0.01)
            get = trainer.checkpoints.GetCheckpoint(pb.GetCheckpointRequest(path=kept))
            assert (await asyncio.wait_for(get, 20)).checkpoint.path == kept
            ttl = trainer.checkpoints.SetCheckpointTtl(pb.SetCheckpointTtlRequest(path=kept, ttl_seconds=60))
            assert (await asyncio.wait_for(ttl, 20)).checkpoint.HasField("expires_at")
        finally:
            go_on.set()
        assert len(await asyncio.gather(*saves)) == 36
