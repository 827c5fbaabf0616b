"""Servers that carry the bytes of benchmarks/stream.py, each in a process of its own: `python stream_servers.py KIND`.

Every one of them takes chunks and answers each with a quarter of its bytes, and prints the port it listens on.
"""

import asyncio
import functools
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np

ANSWER_PART = 4
"""An answer has this part of its question's bytes: float32 logprobs for int32 tokens, int64 targets and float32
weights."""
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


async def raw_grpc() -> None:
    """A gRPC server that only carries bytes, with grpc's own settings."""

    async def answer(messages: AsyncIterator[bytes], _context: object) -> AsyncIterator[bytes]:
        async for message in messages:
            yield bytes(len(message) // ANSWER_PART)

    class Handler(grpc.GenericRpcHandler):
        def service(self, handler_call_details: object) -> grpc.RpcMethodHandler:
            return grpc.stream_stream_rpc_method_handler(answer)

    server = grpc.aio.server(options=UNLIMITED)
    server.add_generic_rpc_handlers((Handler(),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()


def flight() -> None:
    """An Arrow Flight server, in C++ but for what it does with a batch."""
    import pyarrow as pa  # pyright: ignore[reportMissingImports]
    import pyarrow.flight as fl  # pyright: ignore[reportMissingImports]

    schema = pa.schema([("logprobs", pa.float32())])

    class Server(fl.FlightServerBase):
        def do_exchange(self, context: object, descriptor: object, reader: Any, writer: Any) -> None:
            writer.begin(schema)
            for chunk in reader:
                logprobs = np.zeros(chunk.data.num_rows, dtype=np.float32)
                writer.write_batch(pa.record_batch([pa.array(logprobs)], schema=schema))

    server = Server("grpc://127.0.0.1:0")
    print(server.port, flush=True)
    server.serve()


class AnsweringWorker:
    """A Worker (trainer_service/fleet/worker.py) that has an answer at once, and no model."""

    status_message = "ready"
    responding = True
    counters: Mapping[str, float] = {}

    def __init__(self) -> None:
        from gradwire.v1.trainer_service_pb2 import LossInfo, ModelInfo
        from gradwire.v1.worker_service_pb2 import WorkerReady

        model = ModelInfo(base_model="none", vocab_size=1 << 20, max_context_length=1 << 20, dtype="float32")
        self.ready = WorkerReady(model=model, losses=[LossInfo(name="cross_entropy", loss_fn_inputs=["weights"])])
        self.became_ready: Callable[[], object] = lambda: None

    def submit(self, command: Any, deliver: Callable[[Any], object], *, request: bytes = b"") -> None:
        asyncio.get_running_loop().call_soon(deliver, self._reply(len(request)))

    @functools.cache  # noqa: B019  (it lives as long as the process)
    def _reply(self, request_bytes: int) -> Any:
        """The answer to a forward_backward of that many bytes; to a command that is no operation for 0."""
        from gradwire._wire.codec import tensor_message
        from gradwire.v1 import operation_pb2 as ops
        from gradwire.v1.trainer_service_pb2 import TrainResponse
        from gradwire.v1.worker_service_pb2 import WorkerDone, WorkerEvent

        from trainer_service.fleet.worker import Reply

        if not request_bytes:
            return Reply(WorkerEvent(done=WorkerDone()), memoryview(b""))
        logprobs = np.zeros(request_bytes // ANSWER_PART // 4, dtype=np.float32)
        answer = ops.ForwardBackwardResponse(cu_seqlens=tensor_message(np.array([0, len(logprobs)])))
        answer.loss_fn_outputs["logprobs"].CopyFrom(tensor_message(logprobs))
        response = TrainResponse(forward_backward=answer)
        return Reply(WorkerEvent(response=response), memoryview(response.SerializeToString()))

    def on_ready(self, callback: Callable[[], object]) -> None:
        self.became_ready = callback

    def on_death(self, callback: Callable[[Any], object]) -> None:
        """Never called back: this worker does not die."""

    def on_responding(self, callback: Callable[[], object]) -> None:
        """Never called back: this worker always responds."""

    async def stop(self) -> None:
        """There is nothing to stop."""


async def front_end() -> None:
    """The trainer's front end as it is, over a worker without a model."""
    from trainer_service.config import TrainerConfig
    from trainer_service.trainer import TrainerServer

    worker = AnsweringWorker()
    with tempfile.TemporaryDirectory() as folder:
        config = TrainerConfig(base_model="none", listen="127.0.0.1:0", data_dir=Path(folder))
        server = TrainerServer(config, worker)
        await server.start()
        worker.became_ready()
        print(server.address.rpartition(":")[2], flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    {"raw": lambda: asyncio.run(raw_grpc()), "flight": flight, "front-end": lambda: asyncio.run(front_end())}[
        sys.argv[1]
    ]()
