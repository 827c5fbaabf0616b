"""What the base model is called, and who is told where it lies."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from gradwire.errors import GradwireError, from_rpc_error
from gradwire.v1 import checkpoint_service_pb2 as checkpoints
from gradwire.v1 import sampling_service_pb2 as sampling
from gradwire.v1 import trainer_service_pb2 as pb
from gradwire.v1.operation_pb2 import SaveStateRequest
from gradwire.v1.worker_service_pb2 import WorkerReady

from tests.fakes import READY, FakeWorker
from tests.front_end import FrontEnd, front_end
from trainer_service.command_lines import SettingsError
from trainer_service.paths import STATE, CheckpointPath
from trainer_service.served_model import ServedModel

NAME, ALIASES = "org/served", ("meta/other", "third")
KEYS = ("alice alice-key", "ops ops-key admin")
ALICE: Any = (("authorization", "Bearer alice-key"),)
OPS: Any = (("authorization", "Bearer ops-key"),)


@dataclass
class Host:
    """A trainer of a folder that is called something else."""

    trainer: FrontEnd
    folder: Path

    async def create(self, base_model: str, metadata: Any) -> str:
        request = pb.CreateRunRequest(base_model=base_model)
        return (await self.trainer.stub.CreateRun(request, metadata=metadata)).run.base_model

    async def open(self, base_model: str, metadata: Any) -> str:
        request = sampling.OpenSamplerRequest(sampler=sampling.Sampler(base_model=base_model))
        return (await self.trainer.sampling.OpenSampler(request, metadata=metadata)).base_model


async def refusal(call: Any) -> GradwireError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


def worker_of(folder: Path) -> FakeWorker:
    ready = WorkerReady()
    ready.CopyFrom(READY)
    ready.model.base_model = str(folder)
    return FakeWorker(ready=ready)


async def test_any_of_its_names_is_the_model_and_the_served_one_is_told(tmp_path: Path):
    folder = tmp_path / "secret-folder"
    folder.mkdir()
    settings: dict[str, Any] = {"base_model": str(folder), "served_model_name": NAME, "aliases": ALIASES}
    async with front_end(worker=worker_of(folder), api_keys=KEYS, **settings) as trainer:
        host = Host(trainer, folder)
        for name in ("", NAME, *ALIASES):
            assert await host.create(name, ALICE) == NAME
            assert await host.open(name, ALICE) == NAME
        info = await trainer.stub.GetServerInfo(pb.GetServerInfoRequest(), metadata=ALICE)
        assert (info.models[0].base_model, tuple(info.models[0].aliases)) == (NAME, ALIASES)
        # Its folder is a name for those alone who may know it.
        assert await host.create(str(folder), OPS) == NAME
        for call in (host.create, host.open):
            refused = await refusal(call(str(folder), ALICE))
            assert (refused.reason, refused.metadata["served"]) == ("BASE_MODEL_MISMATCH", NAME)
            assert "'third'" in refused.message
            assert (await refusal(call("org/unknown", OPS))).reason == "BASE_MODEL_MISMATCH"


async def test_the_folder_is_told_to_nobody_else_in_whatever_was_written_down_with_it(tmp_path: Path):
    folder = tmp_path / "secret-folder"
    folder.mkdir()
    data_dir = tmp_path / "data"
    # Runs and checkpoints of before it had a name.
    async with front_end(base_model=str(folder), data_dir=data_dir, api_keys=KEYS) as trainer:
        created = await trainer.stub.CreateRun(pb.CreateRunRequest(), metadata=ALICE)
        run_id = created.run.run_id
        assert created.run.base_model == str(folder)
        await trainer.stub.SaveState(SaveStateRequest(run_id=run_id, name="s"), metadata=ALICE)
        trainer.worker.save(CheckpointPath(run_id, STATE, "s"), base_model=str(folder))
    worker = worker_of(folder)
    worker.status_message = f"loading {folder} onto cpu"
    async with front_end(
        worker=worker, base_model=str(folder), data_dir=data_dir, api_keys=KEYS, served_model_name=NAME
    ) as trainer:
        worker.status_message = f"loading {folder} onto cpu"
        ask: Any = pb.GetRunRequest(run_id=run_id)
        assert (await trainer.stub.GetRun(ask, metadata=ALICE)).run.base_model == NAME
        listed = await trainer.checkpoints.ListCheckpoints(checkpoints.ListCheckpointsRequest(), metadata=ALICE)
        assert [checkpoint.base_model for checkpoint in listed.checkpoints] == [NAME]
        for metadata, wanted in ((ALICE, f"loading {NAME} onto cpu"), (OPS, f"loading {folder} onto cpu")):
            info = await trainer.stub.GetServerInfo(pb.GetServerInfoRequest(), metadata=metadata)
            assert info.status_message == wanted


@pytest.mark.parametrize(("name", "aliases"), [("a\nb", ()), (" a", ()), ("a" * 257, ()), ("a", ("",)), ("", ("b ",))])
def test_a_name_that_is_none_is_refused(name: str, aliases: tuple[str, ...]):
    with pytest.raises(SettingsError, match="--alias"):
        ServedModel("source", name, aliases)
