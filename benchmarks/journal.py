"""What the journal costs an operation. Prints a table.

    python benchmarks/journal.py [--rounds 400] [--step-ms 5730]

Both sides are a trainer's Runs in this process over a worker that answers at once, one with journals on disk, one with
journals that keep nothing; rounds interleave them. An operation is written before it is sent and its outcome after, so
a round trip waits for two commits. The last rows are what the two operations of a step add to it: --step-ms is its time
without, from the table of benchmarks/README.md for SmolLM2-135M and 500 tokens.
"""

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
from gradwire._wire.codec import tensor_message
from gradwire.errors import GradwireError
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.datum_pb2 import DatumBatch
from gradwire.v1.trainer_service_pb2 import CreateRunRequest, TrainRequest

from tests.fakes import FakeWorker
from trainer_service.checkpoints.catalog import Catalog
from trainer_service.checkpoints.transfers import Transfers
from trainer_service.config import Durability, Limits, Retention, SnapshotPolicy, Sync
from trainer_service.runs.journal_writer import Journal, JournalWriter
from trainer_service.runs.observer import Observer
from trainer_service.runs.operation import Operation
from trainer_service.runs.registry import Runs
from trainer_service.runs.run import Run
from trainer_service.runs.store import RunStore
from trainer_service.served_model import ServedModel


class NoJournal(Journal):
    """A journal that keeps nothing, and confirms it a turn of the loop later."""

    def append(self, operation: Operation, digest: bytes, written: Callable[[GradwireError | None], object]) -> None:
        asyncio.get_running_loop().call_soon(written, None)

    def record(
        self,
        seq_id: int,
        response: Any,
        answer: bytes,
        *,
        step: int,
        written: Callable[[], object],
        reported: Any = None,
    ) -> None:
        asyncio.get_running_loop().call_soon(written)


class NoStore(RunStore):
    """Runs on disk whose journals keep nothing."""

    def journal(self, run_id: str) -> Journal:
        """A journal that keeps nothing; see NoJournal."""
        return NoJournal(self.folder(run_id), JournalWriter(), sync="normal", retention=Retention())


def operation(kind: str, size_bytes: int) -> Callable[[int], Operation]:
    """Makes operations by seq_id: a zero_grad, or a forward_backward of so many bytes."""
    if kind == "zero_grad":
        return lambda seq_id: Operation.made(TrainRequest(seq_id=seq_id, zero_grad=ops.ZeroGradRequest()))
    values = np.zeros(max(1, size_bytes // 12), dtype=np.int32)
    inputs = {name: tensor_message(values) for name in ("target_tokens", "weights")}
    batch = DatumBatch(tokens=tensor_message(values), loss_fn_inputs=inputs)
    request = ops.ForwardBackwardRequest(batch=batch, loss_fn="cross_entropy")
    return lambda seq_id: Operation.made(TrainRequest(seq_id=seq_id, forward_backward=request))


async def measure(
    runs: dict[str, Run], make: Callable[[int], Operation], *, rounds: int, at_once: int
) -> dict[str, float]:
    """Median milliseconds an operation took on each side, at_once of them in flight."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            operations = [make(run.next_seq_id + number) for number in range(at_once)]
            start = time.perf_counter()
            await asyncio.gather(*(run.execute(one) for one in operations))
            times[name].append((time.perf_counter() - start) * 1000 / at_once)
            run.acknowledge(run.next_seq_id - 1)
    return {name: statistics.median(found) for name, found in times.items()}


async def sides(folder: Path) -> tuple[dict[str, Run], list[Runs]]:
    """A run without journal, and one with either kind of commit."""
    everything: list[Runs] = []
    runs: dict[str, Run] = {}
    syncs: dict[str, Sync] = {"none": "normal", "normal": "normal", "full": "full"}
    for name, sync in syncs.items():
        durability = Durability(sync=sync, snapshots=SnapshotPolicy(interval_s=0), idle_lease_s=0)
        made = Runs(
            FakeWorker(),
            base_model=ServedModel("fake"),
            limits=Limits(),
            transfers=Transfers(Catalog(folder / "checkpoints")),
            runs_dir=folder / name,
            adapter_dir=folder / "adapters",
            detach_grace_s=60,
            observer=Observer(),
            durability=durability,
        )
        if name == "none":
            made.store = NoStore(folder / name, made.journal_writer, durability)
        made.start()
        everything.append(made)
        runs[name] = await made.create(CreateRunRequest())
    return runs, everything


async def table(folder: Path, args: argparse.Namespace) -> None:
    """Measures all sides and prints the table."""
    runs, everything = await sides(folder)
    mib = 1024 * 1024
    rows = [
        ("zero_grad, one at a time", operation("zero_grad", 0), args.rounds, 1),
        ("zero_grad, 64 in flight, each", operation("zero_grad", 0), max(1, args.rounds // 8), 64),
        ("forward_backward of 6 KiB, one at a time", operation("forward_backward", 6 * 1024), args.rounds, 1),
        ("forward_backward of 1 MiB, one at a time", operation("forward_backward", mib), max(1, args.rounds // 8), 1),
    ]
    print("| operation | without | journal, normal | journal, full | normal adds | full adds |")
    print("| --- | --- | --- | --- | --- | --- |")
    added: dict[str, dict[str, float]] = {}
    for what, make, rounds, at_once in rows:
        await measure(runs, make, rounds=3, at_once=at_once)
        found = await measure(runs, make, rounds=rounds, at_once=at_once)
        added[what] = {name: found[name] - found["none"] for name in ("normal", "full")}
        cells = [*(f"{found[name]:.3f} ms" for name in runs), *(f"{value:.3f} ms" for value in added[what].values())]
        print(f"| {what} | {' | '.join(cells)} |", flush=True)
    for name in ("normal", "full"):
        step_ms = added[rows[2][0]][name] + added[rows[0][0]][name]
        share = f"{step_ms:.3f} ms / {args.step_ms:g} ms = {step_ms / args.step_ms:.4%}"
        print(f"| a step of 500 tokens, two operations, {name} | | | | {share} | |")
    for made in everything:
        await made.stop()


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--step-ms", type=float, default=5730, help="time of a step without the journal")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(table(Path(folder), args))


if __name__ == "__main__":
    main()
