"""Who may take part in a worker of several machines, what others are told, and who comes back. Without ranks."""

import asyncio
import contextlib
import dataclasses
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.pem import Pem, make_pem
from tests.waiting import until
from trainer_service.config import NodeConfig, NodeSettings, NodeTls, ServerTls
from trainer_service.fleet import joining
from trainer_service.fleet import joining as joining_module
from trainer_service.fleet import nodes as nodes_module
from trainer_service.fleet.join_policy import JoinPolicy
from trainer_service.fleet.joining import JoiningNode, JoinRefusedError
from trainer_service.fleet.nodes import Nodes

TOKEN = "a token that is long enough"


def model(folder: Path, weights: bytes = b"1234") -> str:
    """Files that pass for a model's."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return str(folder)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@pytest.fixture
def trainers_model(tmp_path: Path) -> str:
    return model(tmp_path / "trainers_model")


@contextlib.asynccontextmanager
async def listening(
    base_model: str, folder: Path, *, port: int = 0, tls: ServerTls | None = None
) -> AsyncIterator[Nodes]:
    """The trainer's end, for two nodes."""
    policy = JoinPolicy(TOKEN, 2, base_model, num_gpus=0, local_world_size=1, shared=(folder / "data",))
    nodes = Nodes(NodeSettings(2, f"127.0.0.1:{port or free_port()}"), policy, tls=tls)
    await nodes.open()
    try:
        yield nodes
    finally:
        await nodes.close()


@contextlib.asynccontextmanager
async def joining_node(config: NodeConfig, token: str = TOKEN) -> AsyncIterator["asyncio.Task[None]"]:
    """A node that wants to join, and its end."""
    task = asyncio.create_task(JoiningNode(config, token).run())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def refusal(config: NodeConfig, token: str = TOKEN) -> str:
    async with joining_node(config, token) as task, asyncio.timeout(30):
        with pytest.raises(JoinRefusedError) as caught:
            await task
    return str(caught.value)


REFUSALS = {
    "no such token": ({"token": "another that is long enough"}, "The join token is missing or not the trainer's"),
    "the trainer's rank": ({"node_rank": 0}, "Node rank 0 is the trainer's own machine; others begin at 1."),
    "one too many": ({"node_rank": 2}, "Node rank 2 is one too many: --nnodes is 2, so only 1 is left."),
    "another model": ({"model": b"1235"}, "Node 1 has another model in "),
    "no model": ({"base_model": "/nowhere"}, 'Node 1 has no model: base_model "/nowhere" does not exist'),
    "another version": ({"version": "0.0.0"}, "Node 1 is gradwire 0.0.0, but the trainer is "),
    "no shared folder": ({"moved": True}, "/data with the trainer: every rank writes and reads there"),
}


@pytest.mark.parametrize("case", REFUSALS)
async def test_a_node_that_cannot_take_part_is_told_why_and_so_is_the_trainer_s_log(
    case: str, trainers_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    changes, wanted = REFUSALS[case]
    async with listening(trainers_model, tmp_path) as nodes:
        base_model = str(changes.get("base_model", ""))
        if isinstance(weights := changes.get("model"), bytes):
            base_model = model(tmp_path / "another_model", weights)
        if isinstance(version := changes.get("version"), str):
            monkeypatch.setattr(joining, "__version__", version)
        if changes.get("moved"):
            (tmp_path / "data" / ".shared-with-nodes").unlink()
        rank = changes.get("node_rank", 1)
        assert isinstance(rank, int)
        config = NodeConfig(join=nodes.settings.rdzv_endpoint, node_rank=rank, base_model=base_model)
        told = await refusal(config, str(changes.get("token", TOKEN)))
        assert wanted in told
        assert nodes.joined == {}
    logged = [record for record in caplog.records if record.getMessage() == "A node was refused."]
    assert [getattr(record, "fields", {})["why"] for record in logged] == [told]


async def test_a_rank_is_one_node_s(trainers_model: str, tmp_path: Path):
    async with listening(trainers_model, tmp_path) as nodes:
        config = NodeConfig(join=nodes.settings.rdzv_endpoint, node_rank=1)
        said: list[str] = []
        complete = asyncio.create_task(nodes.complete(said.append))
        async with joining_node(config):
            await asyncio.wait_for(complete, 30)
            assert f"waiting for node 1 of 2 to join at {config.join}" in said
            assert "Node 1 has joined already, from ipv4:127.0.0.1" in await refusal(config)
            assert nodes.missing == []
        await until(lambda: nodes.missing == [1])


async def test_a_copy_of_the_model_elsewhere_will_do(trainers_model: str, tmp_path: Path):
    copy = model(tmp_path / "copy")
    async with listening(trainers_model, tmp_path) as nodes:
        config = NodeConfig(join=nodes.settings.rdzv_endpoint, node_rank=1, base_model=copy)
        async with joining_node(config):
            await until(lambda: nodes.missing == [])


@pytest.mark.parametrize("says_that_it_lives", [True, False])
async def test_a_node_that_falls_silent_is_gone(
    trainers_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says_that_it_lives: bool
):
    monkeypatch.setattr(nodes_module, "_SILENT_S", 3.0)
    monkeypatch.setattr(joining_module, "HEARTBEAT_INTERVAL_S", 0.5 if says_that_it_lives else 60.0)
    async with (
        listening(trainers_model, tmp_path) as nodes,
        joining_node(NodeConfig(join=nodes.settings.rdzv_endpoint, node_rank=1)),
    ):
        await until(lambda: nodes.missing == [])
        node = nodes.joined[1]
        if says_that_it_lives:
            await asyncio.sleep(5)
            assert nodes.joined[1] is node
        else:
            await until(lambda: nodes.joined.get(1) is not node)


async def test_a_node_waits_for_a_trainer_that_is_not_there_and_joins_the_next(trainers_model: str, tmp_path: Path):
    port = free_port()
    async with joining_node(NodeConfig(join=f"127.0.0.1:{port}", node_rank=1)) as task:
        for _ in range(2):
            async with listening(trainers_model, tmp_path, port=port) as nodes:
                await until(lambda nodes=nodes: nodes.missing == [])
        assert not task.done()


async def test_a_node_that_is_told_to_stop_ends_with_the_code_that_it_was_given(monkeypatch: pytest.MonkeyPatch):
    async def told(*, exit_with_parent: bool) -> None:
        pass

    monkeypatch.setattr(joining_module, "told_to_stop", told)
    config = NodeConfig(join=f"127.0.0.1:{free_port()}", node_rank=1)
    assert await joining_module.serve_node(config, TOKEN) == 0
    assert await joining_module.serve_node(dataclasses.replace(config, stop_exit_code=143), TOKEN) == 143


async def test_probes_are_told_whether_a_node_has_joined(trainers_model: str, tmp_path: Path):
    port, address = free_port(), f"127.0.0.1:{free_port()}"
    config = NodeConfig(join=f"127.0.0.1:{port}", node_rank=1, health_listen=address)
    serving = asyncio.create_task(joining_module.serve_node(config, TOKEN))
    try:
        async with grpc.aio.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)

            watch = stub.Watch(health_pb2.HealthCheckRequest(service="gradwire.v1.NodeService"), wait_for_ready=True)

            async def told() -> str:
                async with asyncio.timeout(30):
                    return health_pb2.HealthCheckResponse.ServingStatus.Name((await watch.read()).status)

            assert await told() == "NOT_SERVING"
            async with listening(trainers_model, tmp_path, port=port):
                assert await told() == "SERVING"
            assert await told() == "NOT_SERVING"
            alive = await stub.Check(health_pb2.HealthCheckRequest(), timeout=30)
            assert alive.status == health_pb2.HealthCheckResponse.SERVING, "it waits for the next trainer"
            watch.cancel()
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


async def test_nodes_join_over_tls(trainers_model: str, tmp_path: Path):
    pem: Pem = make_pem(tmp_path)
    tls = ServerTls(cert_file=pem.server[0], key_file=pem.server[1], client_ca_file=pem.ca)
    async with listening(trainers_model, tmp_path, tls=tls) as nodes:
        address = nodes.settings.rdzv_endpoint
        trusting = NodeTls(ca_file=pem.ca, cert_file=pem.client[0], key_file=pem.client[1])
        without = NodeTls(ca_file=pem.ca)
        in_plaintext = NodeConfig(join=address, node_rank=1)
        encrypted = NodeConfig(join=f"https://{address}", node_rank=1, tls=without)
        async with joining_node(in_plaintext) as first, joining_node(encrypted) as second:
            # Neither gets in, and neither is told that it never will: the trainer may be given other files.
            await asyncio.sleep(1)
            assert nodes.joined == {}
            assert not first.done()
            assert not second.done()
        async with joining_node(dataclasses.replace(encrypted, tls=trusting)):
            await until(lambda: nodes.missing == [])
