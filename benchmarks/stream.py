"""Rows about the stream: bytes a second between a client and the trainer's front end, beside two that only carry bytes.

Each side sends a batch of 64 MiB in messages of 1 MiB and has a quarter as many bytes back. The service's side is
`forward_backward` as a user calls it, from Datums to ForwardBackwardOutput, with everything the front end does (order,
digest, hand-over) but without a worker behind it.
"""

import asyncio
import importlib.util
import statistics
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
from gradwire import Datum, ModelInput, ServiceClient, TrainingClient
from side_by_side import Row, Setting, interleave, ratio
from stream_servers import ANSWER_PART, UNLIMITED

CHUNK_BYTES = 1 << 20
TOKEN_BYTES = 16
"""Bytes of a token with its target and weight."""


class Server:
    """One of stream_servers.py, in a process of its own."""

    def __init__(self, kind: str) -> None:
        command = [sys.executable, str(Path(__file__).with_name("stream_servers.py")), kind]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.address = f"127.0.0.1:{self._process.stdout.readline().strip()}"

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class Raw:
    """A client of the raw gRPC server."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._channel: grpc.aio.Channel | None = None

    def exchange(self, chunk: bytes, count: int) -> None:
        """Sends `count` chunks while it takes the answers."""
        asyncio.run_coroutine_threadsafe(self._exchange(chunk, count), self._loop).result(120)

    async def _exchange(self, chunk: bytes, count: int) -> None:
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self._address, UNLIMITED)
        call = self._channel.stream_stream("/raw/exchange")()

        async def send() -> None:
            for _ in range(count):
                await call.write(chunk)
            await call.done_writing()

        sending = asyncio.ensure_future(send())
        for _ in range(count):
            answer: Any = await call.read()
            assert len(answer) == len(chunk) // ANSWER_PART
        await sending


class Flight:
    """A client of the Arrow Flight server."""

    def __init__(self, address: str) -> None:
        import pyarrow.flight as fl  # pyright: ignore[reportMissingImports]

        self._client: Any = fl.connect(f"grpc://{address}")
        self._descriptor = fl.FlightDescriptor.for_path("exchange")

    def exchange(self, batch: Any, count: int) -> None:
        """Sends `count` record batches while it takes the answers."""
        writer, reader = self._client.do_exchange(self._descriptor)
        with writer:
            writer.begin(batch.schema)

            def send() -> None:
                for _ in range(count):
                    writer.write_batch(batch)
                writer.done_writing()

            thread = threading.Thread(target=send)
            thread.start()
            for _ in range(count):
                assert reader.read_chunk().data.num_rows == batch.num_rows
            thread.join()


def record_batch(num_tokens: int) -> Any:
    """What one message of the service carries, as Arrow has it."""
    import pyarrow as pa  # pyright: ignore[reportMissingImports]

    arrays = (np.zeros(num_tokens, np.int32), np.zeros(num_tokens, np.int64), np.ones(num_tokens, np.float32))
    return pa.record_batch([pa.array(array) for array in arrays], names=["tokens", "target_tokens", "weights"])


def datums(num_tokens: int, length: int) -> list[Datum]:
    """Datums of `length` tokens each."""
    tokens = np.zeros(length, dtype=np.int64)
    inputs = {"target_tokens": tokens, "weights": np.ones(length, dtype=np.float32)}
    return [Datum(ModelInput.from_ints(tokens), dict(inputs)) for _ in range(num_tokens // length)]


def carry(client: TrainingClient, data: list[Datum]) -> None:
    """Data up, logprobs down."""
    client.forward_backward(data, "cross_entropy").result(120)


def stream(setting: Setting) -> list[Row]:
    """Measures bytes a second; over Arrow Flight where pyarrow is installed."""
    others = {"raw": ("a raw gRPC stream of 1 MiB chunks", 0.7)}
    if importlib.util.find_spec("pyarrow"):
        others["flight"] = ("Arrow Flight", 1.0)
    servers = {kind: Server(kind) for kind in ("front-end", *others)}
    count = setting.pick(64, 2)
    try:
        data, chunk = datums(count * CHUNK_BYTES // TOKEN_BYTES, 4096), bytes(CHUNK_BYTES)
        with ServiceClient(f"http://{servers['front-end'].address}") as service:
            client, raw = service.create_training_client(), Raw(servers["raw"].address)
            sides = {"service": lambda: carry(client, data), "raw": lambda: raw.exchange(chunk, count)}
            if "flight" in others:
                flight, batch = Flight(servers["flight"].address), record_batch(CHUNK_BYTES // TOKEN_BYTES)
                sides["flight"] = lambda: flight.exchange(batch, count)
            times = interleave(sides, rounds=3 * setting.rounds, warmup=2)
    finally:
        for server in servers.values():
            server.close()
    size = count * CHUNK_BYTES * (1 + 1 / ANSWER_PART)
    rate = {name: f"{size / statistics.median(seconds) / 1e9:.2f} GB/s" for name, seconds in times.items()}
    return [
        Row(
            f"stream, {count} MiB up and {count // ANSWER_PART} down, over {name}",
            f"{rate['service']} / {rate[other]}",
            f"{ratio(times[other], times['service']):.2f}",
            f"at least {goal}",
        )
        for other, (name, goal) in others.items()
    ]
