"""Liveness, readiness, reflection, and how a trainer leaves."""

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from gradwire.errors import from_rpc_error
from gradwire.v1.operation_pb2 import ZeroGradRequest
from gradwire.v1.trainer_service_pb2 import GetServerInfoRequest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.fakes import FakeWorker
from tests.front_end import FrontEnd, front_end
from tests.waiting import DEADLINE_S

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE = "gradwire.v1.TrainerService"


async def health(trainer: FrontEnd, service: str) -> int:
    stub: Any = health_pb2_grpc.HealthStub(trainer.channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


async def becomes(trainer: FrontEnd, status: int) -> None:
    """Returns once the trainer's readiness is that."""
    async with asyncio.timeout(DEADLINE_S):
        while await health(trainer, SERVICE) != status:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_alive_at_once_and_ready_only_with_a_model():
    async with front_end(worker=FakeWorker(ready=None)) as trainer:
        assert await health(trainer, "") == SERVING
        assert await health(trainer, SERVICE) == NOT_SERVING
        trainer.worker.become_ready()
        await becomes(trainer, SERVING)
        trainer.worker.die()
        await becomes(trainer, NOT_SERVING)
        assert await health(trainer, "") == SERVING


async def test_not_ready_while_the_worker_does_not_respond():
    async with front_end() as trainer:
        assert await health(trainer, SERVICE) == SERVING
        trainer.worker.status_message = "the worker has sent nothing for 15 s"
        trainer.worker.respond(False)
        await becomes(trainer, NOT_SERVING)
        info = await trainer.stub.GetServerInfo(GetServerInfoRequest())
        assert (info.ready, info.status_message) == (False, "the worker has sent nothing for 15 s")
        assert [model.base_model for model in info.models] == ["fake"]
        trainer.worker.respond(True)
        await becomes(trainer, SERVING)
        assert (await trainer.stub.GetServerInfo(GetServerInfoRequest())).ready


async def test_health_answers_while_the_device_is_busy():
    async with front_end() as trainer:
        stream = await trainer.attach(await trainer.create_run())
        trainer.worker.gate.clear()
        await stream.send(1, forward_backward={})
        await trainer.worker.has_waiting(1)
        assert await asyncio.wait_for(health(trainer, SERVICE), DEADLINE_S) == SERVING


def grpcurl(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).parent / "grpcurl"
    return subprocess.run(
        [str(program), "-plaintext", "-max-time", "60", *arguments],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


async def test_the_real_grpcurl_lists_and_describes_what_is_served():
    async with front_end() as trainer:
        listed = await asyncio.to_thread(grpcurl, trainer.address, "list")
        assert listed.stdout.split() == [
            "gradwire.v1.CheckpointService",
            "gradwire.v1.SamplingService",
            "gradwire.v1.TrainerService",
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        ]
        described = await asyncio.to_thread(grpcurl, trainer.address, "describe", "gradwire.v1.OptimStepRequest")
        assert "optional double learning_rate = 3;" in described.stdout


async def test_reflection_can_be_switched_off():
    async with front_end(reflection=False) as trainer:
        listed = await asyncio.to_thread(grpcurl, trainer.address, "list")
        assert listed.returncode != 0
        assert "does not support the reflection API" in listed.stderr
        await trainer.stub.GetServerInfo(GetServerInfoRequest())


async def test_drain_finishes_what_is_queued_refuses_what_is_new_and_ends_streams():
    async with front_end(worker=FakeWorker(latency_s=0.1), drain_timeout_s=10) as trainer:
        run_id = await trainer.create_run()
        stream = await trainer.attach(run_id)
        for seq_id in (1, 2, 3):
            await stream.send(seq_id, optim_step={})
        await trainer.worker.has_waiting(3)
        draining = asyncio.create_task(trainer.server.drain())
        await becomes(trainer, NOT_SERVING)
        assert await health(trainer, "") == SERVING
        info = await trainer.stub.GetServerInfo(GetServerInfoRequest())
        assert (info.ready, info.status_message) == (False, "shutting down")
        for refused in (trainer.create_run(), trainer.attach(run_id)):
            with pytest.raises((grpc.aio.AioRpcError, AssertionError)) as caught:
                await refused
            if isinstance(caught.value, grpc.aio.AioRpcError):
                assert from_rpc_error(caught.value).reason == "DRAINING"
        await stream.send(4, optim_step={})
        assert [(await stream.receive()).optim_step.step for _ in range(3)] == [1, 2, 3]
        assert (await stream.ended()).reason == "DRAINING"
        await draining
        assert trainer.worker.stopped
        assert len(trainer.operations()) == 3


async def test_drain_leaves_what_cannot_finish_in_time_to_the_next_trainer(tmp_path: Path):
    async with front_end(drain_timeout_s=0.1, data_dir=tmp_path) as trainer:
        stream = await trainer.attach(await trainer.create_run())
        trainer.worker.gate.clear()
        await stream.send(1, forward_backward={})
        await trainer.worker.has_waiting(1)
        draining = asyncio.create_task(trainer.server.drain())
        assert (await stream.ended()).reason == "DRAINING"
        await draining
        run_id = trainer.worker.executed[0][0]
    async with front_end(data_dir=tmp_path) as trainer:
        stream = await trainer.attach(run_id)
        assert stream.attached.next_seq_id == 2
        await stream.send(1, forward_backward={})
        assert (await stream.receive()).WhichOneof("result") == "forward_backward"
        assert trainer.operations() == [(1, "forward_backward")]


async def test_drain_tells_a_unary_caller_that_its_operation_is_kept():
    async with front_end(drain_timeout_s=0.1) as trainer:
        run_id = await trainer.create_run()
        trainer.worker.gate.clear()
        call = trainer.stub.ZeroGrad(ZeroGradRequest(run_id=run_id))
        await trainer.worker.has_waiting(1)
        await trainer.server.drain()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert from_rpc_error(caught.value).reason == "DRAINING"


async def test_drain_does_not_wait_for_a_client_that_is_merely_attached():
    async with front_end(drain_timeout_s=2 * DEADLINE_S) as trainer:
        stream = await trainer.attach(await trainer.create_run())
        await asyncio.wait_for(trainer.server.drain(), DEADLINE_S)
        assert (await stream.ended()).reason == "DRAINING"


async def test_however_often_a_trainer_is_stopped_no_operation_is_given_up_for_it(tmp_path: Path):
    """It takes longer than the trainers wait for it, as a save may."""
    run_id = ""
    for _ in range(4):
        worker = FakeWorker(latency_s=0.2)
        async with front_end(worker=worker, data_dir=tmp_path, drain_timeout_s=0.01) as trainer:
            if not run_id:
                run_id = await trainer.create_run()
                stream = await trainer.attach(run_id)
                await stream.send(1, zero_grad={})
            async with asyncio.timeout(DEADLINE_S):
                while not (worker.executed and worker.waiting):  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
    async with front_end(data_dir=tmp_path) as trainer:
        stream = await trainer.attach(run_id)
        await stream.send(1, zero_grad={})
        assert (await stream.receive()).WhichOneof("result") == "zero_grad"
