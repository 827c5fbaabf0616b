"""What the service costs over the engine alone. Prints one table.

    python benchmarks/overhead.py [--model models/SmolLM2-135M-Instruct] [--rounds 9]

Rows: a whole step (forward_backward + optim_step) through the service over the same step on an Engine in this process;
a custom loss over the built-in one, both through the service; the round trip of a tiny operation; tensor bytes a second
up and down the stream against a gRPC stream of the same kind of server that only carries bytes.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

# Before torch is imported: both sides use the same threads in the same way. The worker is started with this too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import grpc
import grpc.aio
import numpy as np
import torch
from gradwire import AdamParams, Datum, ModelInput, ServiceClient, TrainingClient
from gradwire.codec import batch_from_data
from side_by_side import interleave, print_table, ratio

ROOT = Path(__file__).resolve().parent.parent
ADAM = AdamParams(learning_rate=1e-6)


def make_data(vocab_size: int, lengths: list[int]) -> list[Datum]:
    """Random tokens with weight one."""
    rng = np.random.default_rng(0)
    data = []
    for length in lengths:
        tokens = rng.integers(0, vocab_size, length + 1)
        inputs = {"target_tokens": tokens[1:], "weights": np.ones(length, dtype=np.float32)}
        data.append(Datum(ModelInput.from_ints(tokens[:-1]), inputs))
    return data


def built_in(client: TrainingClient, data: list[Datum]) -> None:
    """A step with cross_entropy, as a user's loop makes it."""
    loss = client.forward_backward(data, "cross_entropy")
    client.optim_step(ADAM).result(600)
    loss.result(600)


def custom(client: TrainingClient, data: list[Datum]) -> None:
    """The same step with the loss as a closure here."""

    def fn(datums: list[Datum], logprobs_list: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        weights = [datum.loss_fn_inputs["weights"].to_torch() for datum in datums]
        return -torch.stack([torch.dot(lp, w) for lp, w in zip(logprobs_list, weights, strict=True)]).sum(), {}

    loss = client.forward_backward_custom(data, fn)
    client.optim_step(ADAM).result(600)
    loss.result(600)


class InProcess:
    """The engine without a service around it."""

    def __init__(self, model: str, folder: Path) -> None:
        from trainer_service.engine.device import pick_device, set_num_threads
        from trainer_service.engine.engine import Engine
        from trainer_service.engine.losses import LOSSES

        os.environ.pop("OMP_NUM_THREADS", None)
        set_num_threads()
        self._engine = Engine(model, device=pick_device(), checkpoint_dir=folder)
        self._engine.create_run("run")
        self._loss = LOSSES["cross_entropy"]
        self._seq_id = 0

    def step(self, data: list[Datum]) -> None:
        """Data in, step done."""
        self._seq_id += 2
        self._engine.forward_backward("run", self._seq_id - 1, batch_from_data(data), self._loss)
        self._engine.optim_step("run", self._seq_id, ADAM)


def start_trainer(model: str, folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A trainer process and its base_url."""
    ready_file = folder / "ready.json"
    command = [sys.executable, "-m", "trainer_service", "trainer", "--base-model", model, "--listen", "127.0.0.1:0"]
    command += [
        "--data-dir",
        str(folder),
        "--ready-file",
        str(ready_file),
        "--log-level",
        "WARNING",
        "--exit-with-parent",
    ]
    env = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env=env)
    while not ready_file.exists():
        if process.poll() is not None:
            sys.exit("The trainer did not start; its log is above.")
        time.sleep(0.02)
    return process, f"http://{json.loads(ready_file.read_text())['address']}"


def tiny_model(folder: Path) -> str:
    """A model so small that a step is all overhead."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1 << 20,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "tiny")
    return str(folder / "tiny")


def round_trips(client: TrainingClient, count: int = 300) -> float:
    """Median milliseconds from calling zero_grad to having its answer."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        client.zero_grad().result(60)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1000


CHUNK_BYTES = 1 << 20


class RawEcho:
    """A gRPC server that only carries bytes, in a process of its own, as the trainer is."""

    SERVER = """
import asyncio, grpc.aio, grpc, sys
CHUNK = bytes(int(sys.argv[1]))
class Handler(grpc.GenericRpcHandler):
    def service(self, details):
        async def up(messages, context):
            total = 0
            async for message in messages:
                total += len(message)
            yield str(total).encode()
        async def down(messages, context):
            async for message in messages:
                for _ in range(int(message)):
                    yield CHUNK
        return grpc.stream_stream_rpc_method_handler({"/raw/up": up, "/raw/down": down}[details.method])
async def main():
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)])
    server.add_generic_rpc_handlers((Handler(),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()
asyncio.run(main())
"""

    def __init__(self) -> None:
        command = [sys.executable, "-c", self.SERVER, str(CHUNK_BYTES)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._target = f"127.0.0.1:{self._process.stdout.readline().strip()}"
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._channel: grpc.aio.Channel | None = None

    def up(self, chunks: int) -> None:
        """Sends chunks and waits until all have arrived."""
        self._run(self._up(chunks))

    def down(self, chunks: int) -> None:
        """Asks for chunks and waits until all have arrived."""
        self._run(self._down(chunks))

    def close(self) -> None:
        """Ends the server."""
        self._process.kill()
        self._process.wait()

    def _run(self, coroutine: object) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(120)  # pyright: ignore[reportArgumentType]

    def _open(self) -> grpc.aio.Channel:
        if self._channel is None:
            options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
            self._channel = grpc.aio.insecure_channel(self._target, options)
        return self._channel

    async def _up(self, chunks: int) -> None:
        call = self._open().stream_stream("/raw/up")()
        for _ in range(chunks):
            await call.write(bytes(CHUNK_BYTES))
        await call.done_writing()
        assert await call.read() == str(chunks * CHUNK_BYTES).encode()

    async def _down(self, chunks: int) -> None:
        call = self._open().stream_stream("/raw/down")()
        await call.write(str(chunks).encode())
        for _ in range(chunks):
            assert isinstance(await call.read(), bytes)
        call.cancel()


def wide_data(megabytes: int) -> list[Datum]:
    """Soft targets so wide that a datum is mostly bytes: about a megabyte each, and half that in logprobs back."""
    width = 1024
    rows = CHUNK_BYTES // (width * 12)
    inputs = {
        "target_tokens": np.ones((rows, width), dtype=np.int64),
        "weights": np.ones((rows, width), dtype=np.float32),
    }
    return [Datum(ModelInput.from_ints(np.ones(rows, dtype=np.int64)), inputs) for _ in range(megabytes)]


def steps_table(model: str, folder: Path, *, tokens: int, rounds: int) -> list[tuple[str, ...]]:
    """Rows about whole steps on the real model."""
    process, base_url = start_trainer(model, folder)
    service = ServiceClient(base_url)
    one, other = service.create_training_client(), service.create_training_client()
    vocab_size = service.get_server_info().models[0].vocab_size
    data = make_data(vocab_size, [tokens // 4] * 4)
    engine = InProcess(model, folder)
    sides = {
        "in process": lambda: engine.step(data),
        "service": lambda: built_in(one, data),
        "custom": lambda: custom(other, data),
    }
    times = interleave(sides, rounds=rounds)
    milliseconds = {name: f"{statistics.median(values) * 1000:.0f} ms" for name, values in times.items()}
    rows = [
        (
            f"step through the service over in process, {tokens} tokens",
            f"{milliseconds['service']} / {milliseconds['in process']}",
            f"{ratio(times['service'], times['in process']):.3f}",
            "at most 1.05",
        ),
        (
            f"custom loss over built-in, whole step, {tokens} tokens",
            f"{milliseconds['custom']} / {milliseconds['service']}",
            f"{ratio(times['custom'], times['service']):.3f}",
            "at most 1.05",
        ),
    ]
    service.close()
    process.terminate()
    process.wait(60)
    return rows


def wire_table(folder: Path, *, rounds: int) -> list[tuple[str, ...]]:
    """Rows about the wire, on a model that costs nothing."""
    process, base_url = start_trainer(tiny_model(folder), folder)
    service = ServiceClient(base_url)
    client = service.create_training_client()
    client.zero_grad().result(60)
    rows = [("round trip of zero_grad, median of 300", f"{round_trips(client):.2f} ms", "", "")]
    raw = RawEcho()
    megabytes = 32
    data = wide_data(megabytes)
    answer_bytes = sum(len(d.loss_fn_inputs["weights"]) * 1024 * 4 for d in data)

    timing = []

    def carry() -> None:
        timing.append(client.forward(data).result(120).timing)

    times = interleave(
        {
            "service": carry,
            "raw up": lambda: raw.up(megabytes),
            "raw down": lambda: raw.down(answer_bytes // CHUNK_BYTES),
        },
        rounds=rounds,
    )
    # The model's own work on these data is no business of the wire's.
    device_s = statistics.median(each.execute_ms for each in timing) / 1000
    up_bytes = megabytes * CHUNK_BYTES
    both = up_bytes + answer_bytes
    service_s = statistics.median(times["service"]) - device_s
    raw_s = statistics.median(times["raw up"]) + statistics.median(times["raw down"])
    rows.append(
        (
            f"tensor bytes up and down, {both >> 20} MiB, without the device's time",
            f"{both / service_s / 1e9:.2f} GB/s / raw {both / raw_s / 1e9:.2f} GB/s",
            f"{raw_s / service_s:.2f}",
            "",
        )
    )
    raw.close()
    service.close()
    process.terminate()
    process.wait(60)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}, {args.rounds} rounds\n", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "wire").mkdir()
        rows = wire_table(folder / "wire", rounds=args.rounds)
        (folder / "steps").mkdir()
        rows += steps_table(args.model, folder / "steps", tokens=args.tokens, rounds=args.rounds)
    print_table(("what", "measured", "ratio", "goal"), rows)


if __name__ == "__main__":
    main()
