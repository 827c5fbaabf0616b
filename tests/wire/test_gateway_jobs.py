"""Trainer jobs of Fireworks' API before a trainer that stands already, and passes whose bodies are JSON."""

from pathlib import Path
from typing import Any

import pytest

from tests.front_end import front_end
from tests.http_gateway import HttpGateway, http_gateway
from trainer_service.gateway.wire import tinker_wire_pb2 as wire

JOBS = "/v1/accounts/gradwire/rlorTrainerJobs"
CONFIG = {"trainingConfig": {"baseModel": "fake", "loraRank": 4, "maxContextLength": 1 << 20}, "displayName": "mine"}


def one_pass(model_id: str, seq_id: int, arm: str = "forward_backward_input", **tensors: Any) -> dict[str, Any]:
    """A pass over one datum of two tokens."""
    inputs = {
        "target_tokens": {"data": [2, 3], "dtype": "int64", "shape": [2]},
        "weights": {"data": [1, 0.5], "dtype": "float32", "shape": [2]},
    }
    datum = {"model_input": {"chunks": [{"tokens": [1, 2]}]}, "loss_fn_inputs": {**inputs, **tensors}}
    return {"model_id": model_id, "seq_id": seq_id, arm: {"data": [datum], "loss_fn": "cross_entropy"}}


class Job:
    """A job under test."""

    def __init__(self, gateway: HttpGateway, name: str) -> None:
        self.url = f"/v1/{name}"
        self._gateway = gateway
        self._below = f"/training/v1/rlorTrainerJobs/gradwire/{name.rpartition('/')[2]}/api/v1"

    async def post(self, path: str, /, **body: Any) -> Any:
        """What a call below the job answers, which must be 200."""
        response = await self._gateway.http.post(f"{self._below}/{path}", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    async def model(self, **lora: Any) -> tuple[str, str]:
        """(session, model)."""
        session_id = (await self.post("create_session", tags=[], sdk_version="1.2.30", type="create_session"))[
            "session_id"
        ]
        config = {"rank": 4, "alpha": 16, "train_mlp": True, "train_attn": True, "train_unembed": True, **lora}
        made = await self.post(
            "create_model", session_id=session_id, model_seq_id=0, base_model="fake", lora_config=config
        )
        assert (await self._gateway.result(made["request_id"])).json()["model_id"] == made["model_id"]
        return session_id, made["model_id"]


async def new_job(gateway: HttpGateway, job_id: str = "") -> Job:
    """A job of the trainer's model."""
    response = await gateway.http.post(JOBS, json=CONFIG, params={"rlorTrainerJobId": job_id})
    assert response.status_code == 200, response.text
    return Job(gateway, response.json()["name"])


async def test_a_job_runs_at_once_and_its_end_ends_its_sessions(tmp_path: Path):
    async with front_end() as trainer, http_gateway(trainer.address, tmp_path) as gateway:
        assert (await gateway.http.get("/v1/accounts?pageSize=2")).json() == {
            "accounts": [{"name": "accounts/gradwire"}]
        }
        job = await new_job(gateway, "job-1")
        told = (await gateway.http.get(job.url)).json()
        assert told["state"] == "JOB_STATE_RUNNING"
        assert told["name"] == "accounts/gradwire/rlorTrainerJobs/job-1"
        # The trainer's own, whatever was asked.
        assert 0 < told["trainingConfig"]["maxContextLength"] < 1 << 20
        again = await gateway.http.post(JOBS, json=CONFIG, params={"rlorTrainerJobId": "job-1"})
        assert again.status_code == 409
        session_id, _ = await job.model()
        assert (await gateway.http.delete(job.url)).status_code == 200
        beat = await gateway.http.post("/api/v1/session_heartbeat", json={"session_id": session_id})
        assert beat.status_code == 410
        assert (await gateway.http.get(job.url)).status_code == 404
        assert (await gateway.http.get(JOBS)).json() == {"rlorTrainerJobs": []}


async def test_jobs_are_there_after_a_restart(tmp_path: Path):
    async with front_end() as trainer:
        async with http_gateway(trainer.address, tmp_path) as gateway:
            job = await new_job(gateway)
        async with http_gateway(trainer.address, tmp_path) as gateway:
            assert (await gateway.http.get(job.url)).json()["state"] == "JOB_STATE_RUNNING"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"nodeCount": 2}, "nodeCount is not served"),
        ({"trainingConfig": {"baseModel": "fake", "acceleratorType": "H200"}}, "trainingConfig.acceleratorType"),
        ({"trainingConfig": {"baseModel": "gpt-5"}}, "served: fake"),
        ({"frobnicate": 1}, "frobnicate is not known"),
    ],
)
async def test_a_job_that_cannot_be_is_refused_in_a_sentence(changed: dict[str, Any], message: str, tmp_path: Path):
    async with front_end() as trainer, http_gateway(trainer.address, tmp_path) as gateway:
        response = await gateway.http.post(JOBS, json={**CONFIG, **changed})
        assert 400 <= response.status_code < 500
        assert message in response.json()["error"]


async def test_passes_as_json_are_done_as_those_in_protobuf(tmp_path: Path):
    async with front_end() as trainer, http_gateway(trainer.address, tmp_path) as gateway:
        job = await new_job(gateway)
        _, model_id = await job.model()
        sparse = {"data": [1], "dtype": "float32", "shape": [2, 1]}
        asked = [
            await job.post("forward_backward", **one_pass(model_id, 1)),
            await job.post("forward", **one_pass(model_id, 2, "forward_input")),
            await job.post(
                "forward_backward",
                **one_pass(
                    model_id,
                    3,
                    target_tokens={"data": [2, 3], "dtype": "int64", "shape": [2, 1]},
                    weights={**sparse, "sparse_crow_indices": [0, 1, 1], "sparse_col_indices": [0]},
                ),
            ),
        ]
        for one in asked:
            answer = await gateway.result(one["request_id"])
            assert answer.headers["content-type"] == "application/x-protobuf", answer.text
            assert wire.ForwardBackwardOutput.FromString(answer.content).loss_fn_outputs[0].num_datums == 1
        kinds = [kind for _, kind in trainer.operations()]
        assert kinds == ["forward_backward", "forward", "forward_backward"]
        gone = await job.post("unload_model", model_id=model_id, type="unload_model")
        assert (await gateway.result(gone["request_id"])).json() == {"type": "unload_model", "model_id": model_id}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weights": {"data": ["x"], "dtype": "float32"}}, "data[0].loss_fn_inputs.weights.data is no list of float32"),
        ({"target_tokens": {"data": [1.5, 2], "dtype": "int64"}}, "target_tokens.data is no list of int64"),
        ({"target_tokens": {"data": [1 << 70, 2], "dtype": "int64"}}, "target_tokens.data is no list of int64"),
        ({"weights": {"data": [[1], [2]], "dtype": "float32"}}, "weights.data is no list of float32"),
        ({"weights": {"data": [1, 1], "dtype": "bfloat16"}}, "weights.dtype must be float32 or int64"),
        ({"weights": 7}, "weights is a number; it must be an object"),
    ],
)
async def test_what_is_wrong_with_a_json_pass_is_told_by_its_future(
    tensors: dict[str, Any], message: str, tmp_path: Path
):
    """Its number counts, or the model would hang."""
    async with front_end() as trainer, http_gateway(trainer.address, tmp_path) as gateway:
        job = await new_job(gateway)
        _, model_id = await job.model()
        asked = await job.post("forward_backward", **one_pass(model_id, 1, **tensors))
        stepped = await job.post("optim_step", model_id=model_id, seq_id=2, adam_params={"learning_rate": 1e-3})
        failed = (await gateway.result(asked["request_id"])).json()
        assert message in failed["error"]
        assert failed["category"] == "user"
        assert (await gateway.result(stepped["request_id"])).status_code == 200
        assert trainer.operations()[-1] == (2, "optim_step")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"checkpoint_type": "base"}, "path"),
        ({"checkpoint_type": "nothing"}, "must be base, delta or merged_base"),
        ({"checkpoint_type": "merged_base", "export_precision": "nvfp4"}, "is not served"),
        ({"metadata": {"decision_calibration": {}}, "checkpoint_type": "base"}, "metadata is not served"),
    ],
)
async def test_how_sampler_weights_are_written_may_be_said(asked: dict[str, Any], expected: str, tmp_path: Path):
    async with front_end() as trainer, http_gateway(trainer.address, tmp_path) as gateway:
        job = await new_job(gateway)
        _, model_id = await job.model()
        saved = await job.post("save_weights_for_sampler", model_id=model_id, seq_id=1, path="x", **asked)
        assert expected in (await gateway.result(saved["request_id"])).text
