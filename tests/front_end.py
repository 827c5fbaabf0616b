"""A whole trainer front end around a fake worker, on this process's event loop, and a Train stream spoken by hand."""

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from anyio.from_thread import start_blocking_portal
from gradwire.errors import GradwireError, from_rpc_error
from gradwire.v1.checkpoint_service_pb2_grpc import CheckpointServiceStub
from gradwire.v1.sampling_service_pb2_grpc import SamplingServiceStub
from gradwire.v1.trainer_service_pb2 import (
    AttachRequest,
    CreateRunRequest,
    TrainRequest,
    TrainResponse,
)
from gradwire.v1.trainer_service_pb2_grpc import TrainerServiceStub

from tests.fakes import FakeWorker
from tests.waiting import DEADLINE_S, until
from trainer_service.config import Limits, TrainerConfig
from trainer_service.trainer import TrainerServer


@dataclass
class FrontEnd:
    """A trainer under test and a client of it."""

    server: TrainerServer
    worker: FakeWorker
    channel: grpc.aio.Channel
    stub: Any
    sampling: Any

    @property
    def checkpoints(self) -> Any:
        """CheckpointService's stub."""
        return CheckpointServiceStub(self.channel)

    @property
    def address(self) -> str:
        """host:port."""
        return self.server.address

    async def create_run(self, **fields: Any) -> str:
        """A new run's id."""
        return (await self.stub.CreateRun(CreateRunRequest(**fields))).run.run_id

    async def attach(self, run_id: str, client_id: str = "client", **arguments: Any) -> "Stream":
        """A stream that holds the run."""
        stream = Stream(self.stub.Train(**arguments))
        await stream.send(attach=AttachRequest(run_id=run_id, client_id=client_id))
        stream.attached = (await stream.receive()).attached
        run = self.server.runs._runs[run_id]
        attachment = run.attachment
        stream.left = lambda: run.attachment is not attachment
        return stream

    def operations(self) -> list[tuple[int, str]]:
        """(seq_id, kind) of the operations executed, in order."""
        return [(seq_id, kind) for _, seq_id, kind in self.worker.executed if seq_id]


class Stream:
    """A Train stream spoken by hand."""

    def __init__(self, call: grpc.aio.StreamStreamCall) -> None:
        self.call = call
        self.attached: Any = None
        self.left: Callable[[], bool] | None = None
        """Whether the server has noticed that it is closed; of a stream that holds a run."""

    async def send(self, seq_id: int = 0, acked_seq_id: int = 0, **operation: Any) -> None:
        """Writes one message; an operation may be given as {} for its empty message."""
        await self.call.write(TrainRequest(seq_id=seq_id, acked_seq_id=acked_seq_id, **operation))

    async def receive(self, timeout_s: float = DEADLINE_S) -> TrainResponse:
        """Reads one answer."""
        response = await asyncio.wait_for(self.call.read(), timeout_s)
        assert isinstance(response, TrainResponse), f"the stream ended: {await self.call.details()}"
        return response

    async def ended(self) -> GradwireError:
        """Reads to the end; the error that ended the stream."""
        with contextlib.suppress(grpc.aio.AioRpcError):
            while isinstance(await asyncio.wait_for(self.call.read(), DEADLINE_S), TrainResponse):
                pass
        call = self.call
        code = await call.code()
        metadata = await call.initial_metadata(), await call.trailing_metadata()
        return from_rpc_error(grpc.aio.AioRpcError(code, *metadata, await call.details(), None))

    async def close(self) -> None:
        """Drops the connection as a vanished client would; returns once the server has noticed."""
        self.call.cancel()
        if self.left is not None:
            await until(self.left)


@contextlib.asynccontextmanager
async def front_end(
    *, worker: FakeWorker | None = None, limits: Limits | None = None, tracer: Any = None, **settings: Any
) -> AsyncIterator[FrontEnd]:
    """A trainer with a fake worker on a free port, drained at the end.

    Args:
        worker: Its worker; None makes one that is ready.
        limits: As in TrainerConfig.
        tracer: As in TrainerServer.
        **settings: Of TrainerConfig.
    """
    worker = worker or FakeWorker()
    folder = tempfile.TemporaryDirectory(prefix="gradwire-test-")
    settings.setdefault("data_dir", Path(folder.name))
    config = TrainerConfig(
        **{"base_model": "fake", "listen": "127.0.0.1:0", "drain_timeout_s": 2.0, **settings}, limits=limits or Limits()
    )
    worker.checkpoint_dir = config.checkpoint_dir
    server = TrainerServer(config, worker, tracer)
    await server.start()
    if worker.ready is not None:
        worker.become_ready()
    unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    channel = grpc.aio.insecure_channel(server.address, unlimited)
    try:
        yield FrontEnd(server, worker, channel, TrainerServiceStub(channel), SamplingServiceStub(channel))
    finally:
        worker.gate.set()
        await channel.close()
        if not worker.stopped:
            await server.drain()
        folder.cleanup()


@contextlib.contextmanager
def front_end_on_a_thread(**settings: Any) -> Iterator[FrontEnd]:
    """As front_end, for tests and clients that are not coroutines; its worker is for its own thread."""
    with (
        start_blocking_portal(name="front-end") as portal,
        portal.wrap_async_context_manager(front_end(**settings)) as trainer,
    ):
        yield trainer
