"""What the gateway costs: a training step and 2,048 samples at once, by tinker's official SDK.

    python benchmarks/gateway.py [--rounds 3] [--steps 40] [--samples 2048] [--max-tokens 256] [--client-core] [--quick]

A step is forward_backward and optim_step, sent one behind the other, on a tiny model, where nothing but the way there
and back takes time. Its three sides: our own SDK on the trainer; tinker's SDK through the gateway; and the same
requests through the gateway as bytes made beforehand, which tells the gateway's share from that of tinker's SDK.

Samples are asked for one by one, as tinker's cookbook does (128 prompts, 16 of each, 256 tokens, its rl_basic), and
merged by hand into one request a prompt. `nothing` is a server that answers tinker's SDK at once: the least that the
SDK's own work takes, whoever serves. All share the machine's cores, and a tiny model samples fast: on any real one the
SDK's share is smaller. --client-core gives the clients one core, and trainer and gateway the others, as clients have
that run on a machine of their own.
"""

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["TINKER_TELEMETRY"] = "0"
sys.path.insert(0, str(Path(__file__).parents[1]))

import gradwire
import httpx
import numpy as np
import tinker
from tinker import types

from benchmarks.side_by_side import Row, interleave, ms, print_table, ratio
from tests.gateway_process import GatewayProcess, running_gateway
from tests.tiny import make_tiny_llama
from tests.trainer_process import running_trainer
from trainer_service.gateway.wire import tinker_wire_pb2 as wire

KEY = "tml-of-a-benchmark"
GROUP = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of steps")
    parser.add_argument("--steps", type=int, default=40, help="of one round")
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--rows", default="step,samples")
    parser.add_argument("--client-core", action="store_true", help="a core for the clients alone")
    parser.add_argument("--quick", action="store_true", help="the figures mean nothing")
    parser.add_argument("--nothing", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.nothing is not None:
        asyncio.run(serve_nothing(args.nothing))
        return
    if args.quick:
        args.rounds, args.steps, args.samples, args.max_tokens = 1, 2, 32, 4
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        folder = Path(scratch)
        for name in ("trainer", "gateway"):
            (folder / name).mkdir()
        model = roomy_llama(folder / "model")
        cores = sorted(os.sched_getaffinity(0))
        if args.client_core:
            os.sched_setaffinity(0, cores[1:])
        trainer = stack.enter_context(running_trainer(model, folder / "trainer", "--log-level", "WARNING"))
        trainer.wait_ready()
        gateway = stack.enter_context(running_gateway(trainer.base_url, folder / "gateway", "--alias", "tiny"))
        if args.client_core:
            # Of this thread, and so of all that are begun from here on.
            os.sched_setaffinity(0, cores[:1])
        native = stack.enter_context(gradwire.ServiceClient(trainer.base_url))
        service = stack.enter_context(tinker.ServiceClient(base_url=gateway.base_url, api_key=KEY))
        header = ("what", "measured", "figure", "goal")
        if "step" in args.rows:
            print_table(header, step_rows(args, gateway, native, service))
        if "samples" in args.rows:
            print_table(header, sample_rows(args, folder, gateway, native, service))


def roomy_llama(folder: Path) -> Path:
    """The tiny Llama of the tests, with room for prompts and answers of a recipe's size."""
    made = make_tiny_llama(folder)
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    return made


# ── a step ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def step_rows(
    args: argparse.Namespace, gateway: GatewayProcess, native: gradwire.ServiceClient, service: tinker.ServiceClient
) -> list[Row]:
    """The cost of a step beyond the native client's."""
    tokens = list(range(3, 20))
    ours = native.create_training_client(lora_rank=4)
    theirs = service.create_lora_training_client("tiny", rank=4).result()
    raw = RawSteps(gateway.address, tokens)
    our_data = [gradwire.datum_from_tokens_weights(tokens, [1.0] * len(tokens))]
    inputs: dict[str, Any] = {"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)}
    their_data = [types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)]

    def native_steps() -> None:
        for _ in range(args.steps):
            passed = ours.forward_backward(our_data, "cross_entropy")
            ours.optim_step(gradwire.AdamParams(learning_rate=1e-4)).result()
            passed.result()

    def tinker_steps() -> None:
        for _ in range(args.steps):
            passed = theirs.forward_backward(their_data, "cross_entropy")
            theirs.optim_step(types.AdamParams(learning_rate=1e-4)).result()
            passed.result()

    def raw_steps() -> None:
        # Those of the last round were idle for longer than the gateway keeps them.
        raw.close()
        for _ in range(args.steps):
            raw.step()

    sides: dict[str, Callable[[], object]] = {"native": native_steps, "tinker": tinker_steps, "raw": raw_steps}
    found = {name: [one / args.steps for one in times] for name, times in interleave(sides, rounds=args.rounds).items()}
    raw.close()
    assert gateway.process is not None
    before = cpu_s(gateway.process.pid)
    raw_steps()
    spent = (cpu_s(gateway.process.pid) - before) / args.steps
    raw.close()

    def beyond(over: str, under: str) -> str:
        values = [a - b for a, b in zip(found[over], found[under], strict=True)]
        return f"{statistics.median(values) * 1000:.2f} ms"

    return [
        Row(
            "step of a tiny model: tinker's SDK through the gateway / our SDK",
            f"{ms(found['tinker'])} / {ms(found['native'])}",
            beyond("tinker", "native"),
        ),
        Row(
            "of that the gateway: the same requests as bytes / our SDK",
            f"{ms(found['raw'])} / {ms(found['native'])}",
            beyond("raw", "native"),
            "at most 5 ms",
        ),
        Row(
            "of that tinker's SDK: its step / the same requests as bytes",
            f"{ms(found['tinker'])} / {ms(found['raw'])}",
            beyond("tinker", "raw"),
        ),
        Row("processor time of the gateway, a step", f"{spent * 1000:.2f} ms"),
    ]


class RawSteps:
    """Steps whose requests are made beforehand, over two connections, as tinker's SDK sends them.

    Args:
        address: Of the gateway.
        tokens: Of the one datum.
    """

    def __init__(self, address: str, tokens: list[int]) -> None:
        self._connections = [http.client.HTTPConnection(address) for _ in range(2)]
        session_id = self._post("create_session", {"tags": [], "sdk_version": "0"})["session_id"]
        made = self._post(
            "create_model",
            {"session_id": session_id, "model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 4}},
        )
        self._model_id = made["model_id"]
        self._post("retrieve_future", {"request_id": made["request_id"]})
        self._request = wire.ForwardBackwardRequest(model_id=self._model_id, loss_fn="cross_entropy")
        datum = self._request.data.add()
        datum.model_input.add().encoded_text.tokens = np.array(tokens[:-1], "<i4").tobytes()
        for name, values, dtype in (
            ("target_tokens", np.array(tokens[1:], "<i8"), wire.DTYPE_INT64),
            ("weights", np.ones(len(tokens) - 1, "<f4"), wire.DTYPE_FLOAT32),
        ):
            tensor = wire.Tensor(dense=values.tobytes(), dtype=dtype, shape=[len(values)])
            datum.loss_fn_inputs[name].CopyFrom(tensor)
        self._seq_id = 0

    def step(self) -> None:
        """One step, to its answers."""
        self._request.seq_id = self._seq_id + 1
        step = {"model_id": self._model_id, "seq_id": self._seq_id + 2, "adam_params": {"learning_rate": 1e-4}}
        self._send(0, "forward_backward", self._request.SerializeToString(), "application/x-protobuf")
        self._send(1, "optim_step", json.dumps(step).encode())
        futures = [json.loads(self._read(place))["request_id"] for place in range(2)]
        for place, request_id in enumerate(futures):
            self._send(place, "retrieve_future", json.dumps({"request_id": request_id}).encode())
        for place in range(2):
            self._read(place)
        self._seq_id += 2

    def close(self) -> None:
        """Ends the connections."""
        for connection in self._connections:
            connection.close()

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        self._send(0, path, json.dumps(body).encode())
        return json.loads(self._read(0))

    def _send(self, place: int, path: str, body: bytes, kind: str = "application/json") -> None:
        headers = {"content-type": kind, "x-api-key": KEY, "x-sdk-method": "TrainingClient.forward_backward"}
        self._connections[place].request("POST", f"/api/v1/{path}", body, headers)

    def _read(self, place: int) -> bytes:
        response = self._connections[place].getresponse()
        body = response.read()
        assert response.status == 200, body
        return body


# ── samples ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Prompts:
    """What is sampled."""

    prompts: list[list[int]]
    max_tokens: int

    def one_by_one(self, sampler: tinker.SamplingClient) -> None:
        """A request for each sample, as the cookbook does."""
        self._all(sampler, GROUP, 1)

    def merged(self, sampler: tinker.SamplingClient) -> None:
        """A request for each prompt."""
        self._all(sampler, 1, GROUP)

    def _all(self, sampler: tinker.SamplingClient, requests: int, samples: int) -> None:
        params = types.SamplingParams(max_tokens=self.max_tokens, stop=[])

        asked = [
            sampler.sample(types.ModelInput.from_ints(prompt), samples, params)
            for prompt in self.prompts
            for _ in range(requests)
        ]
        assert sum(len(one.result().sequences) for one in asked) == (GROUP * len(self.prompts))

    def native(self, sampler: gradwire.SamplingClient) -> None:
        """A request for each prompt, by our SDK."""
        params = gradwire.SamplingParams(max_tokens=self.max_tokens, stop=[])
        futures = [sampler.sample(gradwire.ModelInput.from_ints(one), GROUP, params) for one in self.prompts]
        assert all(len(one.result().sequences) == GROUP for one in futures)


def sample_rows(
    args: argparse.Namespace,
    folder: Path,
    gateway: GatewayProcess,
    native: gradwire.ServiceClient,
    service: tinker.ServiceClient,
) -> list[Row]:
    """2,048 samples, asked for one by one and merged by hand."""
    count = args.samples // GROUP
    prompts = [[3 + (7 * number + 3 * place) % 120 for place in range(args.prompt_tokens)] for number in range(count)]
    asked = Prompts(prompts, args.max_tokens)
    sampler = service.create_sampling_client(base_model="tiny").result()
    ours = native.create_sampling_client()
    Prompts(prompts[:2], 4).one_by_one(sampler)
    assert gateway.process is not None
    pid, spent, went_along = gateway.process.pid, [0.0], [0]

    def one_by_one() -> None:
        before, merged = cpu_s(pid), num_merged(gateway)
        asked.one_by_one(sampler)
        spent[0], went_along[0] = cpu_s(pid) - before, num_merged(gateway) - merged

    with nothing(folder, os.sched_getaffinity(pid)) as url, tinker.ServiceClient(base_url=url, api_key=KEY) as idle:
        answered_at_once = idle.create_sampling_client(base_model="tiny").result()
        found = interleave(
            {
                "one by one": one_by_one,
                "merged": lambda: asked.merged(sampler),
                "native": lambda: asked.native(ours),
                "nothing": lambda: asked.one_by_one(answered_at_once),
            },
            rounds=1,
            warmup=0,
        )
    what = f"{args.samples} samples of {args.max_tokens} tokens behind {args.prompt_tokens}"
    return [
        Row(
            f"{what}: asked one by one / merged by hand, by tinker's SDK",
            f"{ms(found['one by one'])} / {ms(found['merged'])}",
            f"{ratio(found['one by one'], found['merged']):.2f}",
            "at most 1.2",
        ),
        Row(
            "the same over our own SDK, merged",
            f"{ms(found['one by one'])} / {ms(found['native'])}",
            f"{ratio(found['one by one'], found['native']):.2f}",
        ),
        Row("of that tinker's SDK alone, answered at once by nothing", ms(found["nothing"])),
        Row("processor time of the gateway, a sample", f"{spent[0] / args.samples * 1000:.2f} ms"),
        Row("requests to the trainer, of so many at least", f"{args.samples - went_along[0]} / {count}"),
    ]


def num_merged(gateway: GatewayProcess) -> int:
    """Sample requests that went along with an equal one's."""
    text = httpx.get(f"{gateway.base_url}/metrics", headers={"x-api-key": KEY}, trust_env=False).text
    (line,) = [one for one in text.splitlines() if one.startswith("gradwire_gateway_merged_samples_total ")]
    return int(float(line.split()[1]))


def cpu_s(pid: int) -> float:
    """Processor time a process has used, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def nothing(folder: Path, cores: set[int]) -> Iterator[str]:
    """The URL of a server that does nothing, in a process of its own, on these cores."""
    ready_file = folder / "nothing"
    process = subprocess.Popen([sys.executable, __file__, "--nothing", str(ready_file)])
    os.sched_setaffinity(process.pid, cores)
    try:
        while not ready_file.exists():
            assert process.poll() is None
            time.sleep(0.02)
        yield f"http://{ready_file.read_text()}"
    finally:
        process.kill()
        process.wait()


async def serve_nothing(ready_file: Path) -> None:
    """Answers tinker's SDK at once with an empty sample, in as many requests as the gateway does."""
    empty = wire.SampleResponse(sequences=[wire.SampledSequence(stop_reason=wire.STOP_REASON_LENGTH, logprobs=b"")])
    sample = empty.SerializeToString()
    fixed: dict[str, Any] = {
        "client/config": {"sample_use_retrieve_futures": True},
        "client/dynamic_config": {},
        "create_session": {"session_id": "s", "type": "create_session"},
        "create_sampling_session": {"sampling_session_id": "s:sample:0", "type": "create_sampling_session"},
        "session_heartbeat": {"type": "session_heartbeat"},
    }
    asked: list[str] = []
    came = asyncio.Event()

    async def answer_to(path: str, body: bytes) -> dict[str, Any]:
        if path == "asample":
            asked.append(f"r{len(asked)}")
            came.set()
            return {"request_id": asked[-1], "sample_sequence_ids": [f"{asked[-1]}:0"]}
        if path == "retrieve_futures":
            cursor = json.loads(body).get("prev_cursor", 0)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(json.loads(body).get("timeout", 20)):
                    while cursor == len(asked):
                        came.clear()
                        await came.wait()
                    # As the gateway: those that come together are told together.
                    await asyncio.sleep(0.005)
            told = [
                {"state": "finished", "request_id": one, "response_payload_uncompressed_size": len(sample)}
                for one in asked[cursor:]
            ]
            return {"completions": told, "cursor": len(asked)}
        return fixed.get(path, {})

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = head.partition(b"content-length: ")[2].partition(b"\r\n")[0]
                body = await reader.readexactly(int(length or b"0"))
                path = head.split(b" ", 2)[1].decode().partition("/api/v1/")[2]
                kind, answer = "application/x-protobuf", sample
                if path != "retrieve_future":
                    kind, answer = "application/json", json.dumps(await answer_to(path, body)).encode()
                head = f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {len(answer)}\r\n\r\n"
                writer.write(head.encode() + answer)

    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=4096)
    host, port = server.sockets[0].getsockname()
    partial = ready_file.with_suffix(".partial")
    partial.write_text(f"{host}:{port}")
    shutil.move(partial, ready_file)
    await server.serve_forever()


if __name__ == "__main__":
    main()
