"""Whether the gateway's memory and file stay flat over many sessions: a day's worth of short ones, as fast as they go.

    python benchmarks/gateway_soak.py [--minutes 6] [--quick]

Each session makes a model, trains two steps, samples 32 times and finishes; every fourth vanishes instead, and ends
once its client was silent for long enough. Memory is the gateway's resident set, taken from /proc. The slope is that of
a line through the measurements of the last two thirds: caches fill first.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.gateway_process import running_gateway
from tests.http_gateway import one_pass
from tests.tiny import make_tiny_llama
from tests.trainer_process import running_trainer

_POINTS = 12
_MEASURE_S = 1.0
_AT_ONCE = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--quick", action="store_true", help="a few seconds; the figures mean nothing")
    args = parser.parse_args()
    seconds = 4.0 if args.quick else args.minutes * 60
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in ("trainer", "gateway"):
            (folder / name).mkdir()
        model = make_tiny_llama(folder / "model")
        with running_trainer(model, folder / "trainer", "--max-runs", "256", "--log-level", "WARNING") as trainer:
            trainer.wait_ready()
            options = ("--alias", "tiny", "--session-grace-s", "15", "--log-level", "WARNING")
            with running_gateway(trainer.base_url, folder / "gateway", *options) as gateway:
                assert gateway.process is not None
                asyncio.run(soak(gateway.base_url, gateway.process.pid, folder / "gateway", seconds))


async def soak(base_url: str, pid: int, folder: Path, seconds: float) -> None:
    """Runs sessions, and prints a line now and then."""
    done = 0
    measured: list[tuple[int, float, float]] = []
    print("| minute | sessions | resident | gateway.sqlite and its log |", "|---|---|---|---|", sep="\n")
    async with httpx.AsyncClient(base_url=base_url, timeout=60, headers={"x-api-key": "tml-soak"}) as http:

        async def sessions() -> None:
            nonlocal done
            while time.monotonic() < end:
                await session(http, finish=done % 4 != 3)
                done += 1

        async def measure() -> None:
            while True:
                await asyncio.sleep(min(_MEASURE_S, seconds / 40))
                measured.append((done, time.monotonic() - start, resident_bytes(pid) / 2**20))

        start = time.monotonic()
        end = start + seconds
        running = [asyncio.create_task(sessions()) for _ in range(_AT_ONCE)]
        measuring = asyncio.create_task(measure())
        for point in range(1, _POINTS + 1):
            await asyncio.sleep(max(0.0, start + seconds * point / _POINTS - time.monotonic()))
            minute, file_mib = seconds * point / _POINTS / 60, file_bytes(folder) / 2**20
            print(f"| {minute:.1f} | {done} | {resident_bytes(pid) / 2**20:.1f} MiB | {file_mib:.1f} MiB |", flush=True)
        await asyncio.gather(*running)
        measuring.cancel()
    late = np.array(measured[len(measured) // 3 :])
    by_session, by_second = (np.polyfit(late[:, place], late[:, 2], 1)[0] for place in range(2))
    print(
        f"slope over the last two thirds: {by_session * 1024:.2f} KiB a session, {by_second * 60:.3f} MiB a minute; "
        f"{late[:, 2].min():.1f} to {late[:, 2].max():.1f} MiB"
    )


async def session(http: httpx.AsyncClient, *, finish: bool) -> None:
    """One client's life."""

    async def post(path: str, **body: Any) -> Any:
        response = await http.post(f"/api/v1/{path}", json=body)
        response.raise_for_status()
        return response.json() if response.content else None

    async def result(request_id: str) -> None:
        response = await http.post("/api/v1/retrieve_future", json={"request_id": request_id})
        response.raise_for_status()
        if response.headers["content-type"] == "application/json":
            assert "error" not in response.json(), response.text

    session_id = (await post("create_session", tags=[]))["session_id"]
    made = await post("create_model", session_id=session_id, model_seq_id=0, base_model="tiny", lora_config={"rank": 2})
    await result(made["request_id"])
    for number in range(2):
        passed = await http.post(
            "/api/v1/forward_backward", content=one_pass(made["model_id"], 2 * number + 1, tokens=16)
        )
        stepped = await post(
            "optim_step", model_id=made["model_id"], seq_id=2 * number + 2, adam_params={"learning_rate": 1e-3}
        )
        await result(passed.json()["request_id"])
        await result(stepped["request_id"])
    sampler = await post("create_sampling_session", session_id=session_id, sampling_session_seq_id=0, base_model="tiny")
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]}
    asked = [
        await post(
            "asample",
            sampling_session_id=sampler["sampling_session_id"],
            seq_id=number,
            prompt=prompt,
            sampling_params={"max_tokens": 4},
        )
        for number in range(32)
    ]
    await asyncio.gather(*(result(one["request_id"]) for one in asked))
    if finish:
        await http.post(f"/api/v1/sessions/{session_id}/finish", content=json.dumps({"reason": {"type": "success"}}))


def resident_bytes(pid: int) -> int:
    """Of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096


def file_bytes(folder: Path) -> int:
    """Of the gateway's file and its log."""
    return sum(path.stat().st_size for path in folder.rglob("gateway.sqlite*"))


if __name__ == "__main__":
    main()
