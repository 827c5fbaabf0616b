"""Whose runs are whose, on every call that names one; revocation; limits of a key; what logs may tell."""

import asyncio
import hashlib
import logging
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import message_factory
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1 import trainer_service_pb2 as pb
from gradwire.v1.checkpoint_service_pb2 import DownloadCheckpointRequest
from gradwire.v1.sampling_service_pb2 import SampleRequest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.fakes import FakeWorker
from tests.front_end import FrontEnd, Stream, front_end
from tests.owners import ALICE, BOB, KEYS, OPS, create, error_of, with_key, without_id
from trainer_service.config import Limits
from trainer_service.paths import STATE, CheckpointPath


async def seen(trainer: FrontEnd, metadata: Any) -> list[str]:
    return [run.run_id for run in (await trainer.stub.ListRuns(pb.ListRunsRequest(), metadata=metadata)).runs]


def replace_keys(file: Path, *lines: str) -> None:
    """As an editor does: a new file in the place of the old."""
    fresh = file.with_suffix(".new")
    fresh.write_text("\n".join(lines) + "\n")
    fresh.replace(file)


def calls_that_name_a_run() -> list[tuple[str, Any]]:
    """(name, request type) of every unary call of TrainerService whose request has a run_id."""
    methods = pb.DESCRIPTOR.services_by_name["TrainerService"].methods
    found = []
    for method in methods:
        if "run_id" in method.input_type.fields_by_name:
            found.append((method.name, message_factory.GetMessageClass(method.input_type)))
    return found


def test_the_calls_that_name_a_run_are_found():
    assert {"GetRun", "DeleteRun", "ForwardBackward", "SaveState"} <= {name for name, _ in calls_that_name_a_run()}


@pytest.mark.parametrize(("method", "request_type"), calls_that_name_a_run())
async def test_somebody_elses_run_answers_as_one_that_does_not_exist(method: str, request_type: Any):
    async with front_end(api_keys=KEYS) as trainer:
        run_id = await create(trainer, ALICE)
        call = getattr(trainer.stub, method)
        theirs = await error_of(call(request_type(run_id=run_id), metadata=BOB))
        nobodys = await error_of(call(request_type(run_id="run-000000000000"), metadata=BOB))
        assert theirs.reason == "RUN_NOT_FOUND"
        assert theirs.code == grpc.StatusCode.NOT_FOUND.value[0]
        assert without_id(theirs, run_id) == without_id(nobodys, "run-000000000000")
        assert trainer.operations() == []
        assert await seen(trainer, ALICE) == [run_id]


async def test_the_stream_attaches_to_no_run_of_somebody_else_and_does_not_disturb_its_owner():
    async with front_end(api_keys=KEYS) as trainer:
        run_id = await create(trainer, ALICE)
        owner = await trainer.attach(run_id, metadata=ALICE)
        refused = []
        for asked in (run_id, "run-000000000000"):
            stream = Stream(trainer.stub.Train(metadata=BOB))
            await stream.send(attach=pb.AttachRequest(run_id=asked))
            refused.append(without_id(await stream.ended(), asked))
        assert refused[0] == refused[1]
        assert refused[0][0] == "RUN_NOT_FOUND"
        await owner.send(1, zero_grad={})
        assert (await owner.receive()).WhichOneof("result") == "zero_grad"


async def test_lists_show_ones_own_runs_and_an_admin_all():
    async with front_end(api_keys=KEYS) as trainer:
        alices, bobs = await create(trainer, ALICE), await create(trainer, BOB)
        assert await seen(trainer, ALICE) == [alices]
        assert await seen(trainer, BOB) == [bobs]
        assert await seen(trainer, OPS) == [bobs, alices]
        await trainer.stub.ZeroGrad(ops.ZeroGradRequest(run_id=alices), metadata=OPS)
        await trainer.stub.DeleteRun(pb.DeleteRunRequest(run_id=alices), metadata=OPS)
        assert await seen(trainer, ALICE) == []


async def test_one_request_id_of_two_keys_makes_two_runs():
    async with front_end(api_keys=KEYS) as trainer:
        alices = await create(trainer, ALICE, request_id="same")
        bobs = await create(trainer, BOB, request_id="same")
        assert alices != bobs
        assert await create(trainer, ALICE, request_id="same") == alices
        await trainer.stub.DeleteRun(pb.DeleteRunRequest(run_id=alices), metadata=ALICE)
        assert await create(trainer, BOB, request_id="same") == bobs


async def test_a_revoked_key_is_refused_at_once_and_its_stream_ends_while_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("trainer_service.rpc.border.REVOCATION_POLL_S", 0.02)
    file = tmp_path / "keys"
    file.write_text("\n".join(KEYS))
    async with front_end(api_key_file=file) as trainer:
        alices, bobs = await create(trainer, ALICE), await create(trainer, BOB)
        alice, bob = await trainer.attach(alices, metadata=ALICE), await trainer.attach(bobs, metadata=BOB)
        replace_keys(file, *KEYS[1:], "alice new-key")
        ended = await alice.ended()
        assert (ended.reason, "revoked" in ended.message) == ("INVALID_API_KEY", True)
        refused = await error_of(trainer.stub.ListRuns(pb.ListRunsRequest(), metadata=ALICE))
        assert refused.reason == "INVALID_API_KEY"
        await bob.send(1, zero_grad={})
        assert (await bob.receive()).WhichOneof("result") == "zero_grad"
        # A new key of the same name finds its runs as they were.
        assert await seen(trainer, with_key("new-key")) == [alices]


async def test_a_key_may_have_so_many_runs_and_lost_ones_do_not_count():
    async with front_end(api_keys=KEYS, limits=Limits(max_runs=5, max_runs_per_key=2)) as trainer:
        first = await create(trainer, ALICE)
        await create(trainer, ALICE)
        refused = await error_of(trainer.stub.CreateRun(pb.CreateRunRequest(), metadata=ALICE))
        assert (refused.reason, refused.metadata) == ("LIMIT_EXCEEDED", {"limit": "2", "got": "3"})
        assert "This API key has 2 runs" in refused.message
        await create(trainer, BOB)
        await trainer.stub.DeleteRun(pb.DeleteRunRequest(run_id=first), metadata=ALICE)
        await create(trainer, ALICE)


async def test_runs_of_a_key_made_at_the_same_time_count_against_each_other():
    limits = Limits(max_runs=20, max_runs_per_key=2)
    async with front_end(worker=FakeWorker(latency_s=0.02), api_keys=KEYS, limits=limits) as trainer:
        first = await create(trainer, ALICE)
        forks = [trainer.stub.ForkRun(pb.ForkRunRequest(run_id=first), metadata=ALICE) for _ in range(3)]
        made = await asyncio.gather(create(trainer, ALICE), create(trainer, BOB), *forks, return_exceptions=True)
        assert sum(isinstance(each, Exception) for each in made) == 3
        assert [len(await seen(trainer, key)) for key in (ALICE, BOB)] == [2, 1]
        # What failed is not counted.
        await trainer.stub.DeleteRun(pb.DeleteRunRequest(run_id=first), metadata=ALICE)
        await create(trainer, ALICE)


async def test_a_full_disk_allowance_refuses_saves_in_order_and_everything_else_goes_on(tmp_path: Path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "old").write_bytes(bytes(20_000_000))
    async with front_end(data_dir=tmp_path, limits=Limits(max_disk_bytes=20_000_000)) as trainer:
        stream = await trainer.attach(await trainer.create_run())
        await stream.send(1, save_weights_for_sampler={"name": "first"})
        await stream.send(2, zero_grad={})
        refused = (await stream.receive()).error
        assert refused.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        assert "and it may keep at most 20000000" in refused.message
        assert (await stream.receive()).WhichOneof("result") == "zero_grad"
        (tmp_path / "kept" / "old").unlink()
        await stream.send(3, save_weights_for_sampler={"name": "second"})
        await stream.receive()
        assert trainer.operations() == [(2, "zero_grad"), (3, "save_weights_for_sampler")]


async def test_every_answer_that_streams_ends_when_its_key_is_revoked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("trainer_service.rpc.border.REVOCATION_POLL_S", 0.02)
    file = tmp_path / "keys"
    file.write_text("\n".join(KEYS))
    async with front_end(api_key_file=file, data_dir=tmp_path) as trainer:
        path = trainer.worker.save(CheckpointPath("run-1", STATE, "a"), 64 << 20)
        download = DownloadCheckpointRequest(path=path, file="zeros")
        calls = [trainer.sampling.Sample(SampleRequest(), metadata=metadata) for metadata in (OPS, BOB)]
        calls.append(trainer.checkpoints.DownloadCheckpoint(download, metadata=OPS))
        for call in calls:
            await call.read()
        operators, bobs, downloads = calls
        replace_keys(file, *KEYS[:2])
        for call in (operators, downloads):
            ended = await error_of(_to_its_end(call))
            assert (ended.reason, "revoked" in ended.message) == ("INVALID_API_KEY", True)
        assert not bobs.done()
        assert len(trainer.server.sampling) == 1
        bobs.cancel()


async def test_a_stream_whose_key_stays_outlives_its_file_being_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("trainer_service.rpc.border.REVOCATION_POLL_S", 0.02)
    file = tmp_path / "keys"
    file.write_text("\n".join(KEYS))
    async with front_end(api_key_file=file) as trainer:
        bob = await trainer.attach(await create(trainer, BOB), metadata=BOB)
        for half in ("", "alice ali", "alice alices-key\n", "alice alices-key\nbob bo"):
            file.write_text(half)
            refused = await error_of(trainer.stub.ListRuns(pb.ListRunsRequest(), metadata=with_key("bo")))
            assert refused.reason == "INVALID_API_KEY"
            await asyncio.sleep(0.05)
        file.write_text("\n".join(KEYS[:2]))
        await bob.send(1, zero_grad={})
        assert (await bob.receive()).WhichOneof("result") == "zero_grad"


async def test_reflection_and_health_streams_end_with_the_key_they_came_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("trainer_service.rpc.border.REVOCATION_POLL_S", 0.02)
    file = tmp_path / "keys"
    file.write_text("\n".join(KEYS))
    async with front_end(api_key_file=file) as trainer:
        channel: Any = trainer.channel
        health: Any = health_pb2_grpc.HealthStub(channel)
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        reflections = [reflection.ServerReflectionInfo(metadata=metadata) for metadata in (OPS, BOB)]
        for call in reflections:
            await call.write(question)
        watches = [health.Watch(health_pb2.HealthCheckRequest(), metadata=metadata) for metadata in (OPS, BOB, None)]
        for call in (*reflections, *watches):
            await call.read()
        replace_keys(file, *KEYS[:2])
        for call in (reflections[0], watches[0]):
            ended = await error_of(_to_its_end(call))
            assert (ended.reason, "revoked" in ended.message) == ("INVALID_API_KEY", True)
        await reflections[1].write(question)
        assert (await reflections[1].read()).list_services_response.service
        for call in (reflections[1], *watches[1:]):
            assert not call.done()
            call.cancel()


async def _to_its_end(call: Any) -> None:
    while await call.read():
        pass


async def test_logs_name_keys_and_never_tell_one(caplog: pytest.LogCaptureFixture, tmp_path: Path):
    caplog.set_level(logging.DEBUG)
    file = tmp_path / "keys"
    file.write_text("\n".join(KEYS))
    async with front_end(api_key_file=file, api_keys=("lonely-key",)) as trainer:
        for metadata in (ALICE, OPS, with_key("lonely-key")):
            stream = await trainer.attach(await create(trainer, metadata), metadata=metadata)
            await stream.close()
        await error_of(trainer.stub.ListRuns(pb.ListRunsRequest(), metadata=with_key("wrong-key")))
        replace_keys(file, "alice alices-key nonsense")
        await trainer.stub.ListRuns(pb.ListRunsRequest(), metadata=ALICE)
        replace_keys(file, "alice alices-key")
        await trainer.stub.ListRuns(pb.ListRunsRequest(), metadata=ALICE)
        await asyncio.sleep(0)
    told = "\n".join(f"{record.getMessage()} {vars(record)}" for record in caplog.records)
    assert {"alice", "ops", "unnamed"} <= {
        record.fields.get("key")  # pyright: ignore[reportAttributeAccessIssue]
        for record in caplog.records
        if record.getMessage() == "Call."
    }
    for key in ("alices-key", "ops-key", "lonely-key", "wrong-key"):
        assert key not in told
        assert hashlib.sha256(key.encode()).hexdigest() not in told


def files_below(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


async def test_nothing_on_disk_holds_a_key_or_its_digest(tmp_path: Path):
    async with front_end(api_keys=("lonely-key", "alice alices-key"), data_dir=tmp_path) as trainer:
        for metadata in (with_key("lonely-key"), ALICE):
            stream = await trainer.attach(await create(trainer, metadata), metadata=metadata)
            await stream.send(1, save_state={"name": "kept"})
            assert (await stream.receive()).WhichOneof("result") == "save_state"
            await stream.close()
    written = files_below(tmp_path)
    assert {"journal.sqlite", "owner.json"} <= {path.name for path in written}
    for key in ("lonely-key", "alices-key"):
        digest = hashlib.sha256(key.encode())
        for secret in (key.encode(), digest.digest(), digest.hexdigest().encode()):
            assert [path for path, content in written.items() if secret in content] == []
