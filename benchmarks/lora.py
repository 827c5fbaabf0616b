"""What a LoRA run costs beside a full-parameter run, and eight of them beside one. Prints one table.

    python benchmarks/lora.py [--rows step,turns,memory] [--rounds 5] [--cpu-time] [--quick]

Steps are made on engines in this process, where runs are switched; the sides of a row are interleaved, and a ratio is
the median of the rounds' own ratios. Memory is that of a trainer's worker, as its owner sees it.
"""

import argparse
import contextlib
import datetime
import gc
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# Before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
os.environ.pop("OMP_NUM_THREADS", None)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from gradwire import ServiceClient
from gradwire._wire.codec import Batch, batch_from_data
from gradwire.types import AdamParams
from service import make_data, tiny_model
from side_by_side import Row, interleave, ms, print_table, ratio

from tests.trainer_process import running_trainer
from trainer_service.config import Limits
from trainer_service.engine.device import num_available_cpus, pick_device
from trainer_service.engine.engine import Engine
from trainer_service.engine.losses import find_loss
from trainer_service.engine.models.lora import LoraSettings

ROOT = Path(__file__).resolve().parent.parent
NUM_RUNS = 8
Clock = Callable[[], float]
CROSS_ENTROPY = find_loss("cross_entropy")
ADAM = AdamParams(learning_rate=1e-5)
BODY = LoraSettings(rank=8, train_unembed=False)
"""Rank 8: at 32 an adapter of a model as small as SmolLM2-135M has 7 % of its parameters."""


class Runs:
    """An engine, and steps of its runs."""

    def __init__(self, model: str, folder: Path, batch: Batch) -> None:
        self.engine = Engine(model, device=pick_device(), checkpoint_dir=folder, limits=Limits(max_runs=NUM_RUNS + 4))
        self._batch = batch

    def step(self, run_id: str) -> None:
        """Takes one whole step."""
        self.engine.forward_backward(run_id, 1, self.engine.stage(self._batch, CROSS_ENTROPY))
        self.engine.optim_step(run_id, 2, ADAM)

    def optimizer_bytes(self, run_id: str) -> int:
        """What AdamW holds for a run."""
        run = self.engine.run_state(run_id)
        states = [run.optimizer.state_of(parameter) for parameter in run.trained_parameters().values()]
        return sum(tensor.nbytes for state in states for tensor in state.values())


def step_rows(model: str, folder: Path, batch: Batch, rounds: int, clock: Clock, *, wide: int) -> list[Row]:
    """A LoRA step over a full-parameter step."""
    runs = Runs(model, folder, batch)
    kinds = {
        "rank 8, all but the head": BODY,
        "rank 8": LoraSettings(rank=8),
        f"rank {wide}, all but the head": LoraSettings(rank=wide, train_unembed=False),
    }
    runs.engine.create_run("full")
    for name, settings in kinds.items():
        runs.engine.create_run(name, lora=settings)
    sides = {name: lambda name=name: runs.step(name) for name in ("full", *kinds)}
    times = interleave(sides, rounds=rounds, clock=clock)
    full_bytes = runs.optimizer_bytes("full")
    rows: list[Row] = []
    for name in kinds:
        goals = ("at most 0.75", "below 0.03") if name == "rank 8, all but the head" else ("", "")
        measured = f"{ms(times[name])} / {ms(times['full'])}"
        rows.append(
            Row(f"LoRA step over full step, {name}", measured, f"{ratio(times[name], times['full']):.3f}", goals[0])
        )
        part = runs.optimizer_bytes(name)
        measured = f"{part / 2**20:.1f} / {full_bytes / 2**20:.1f} MiB"
        rows.append(Row(f"optimizer state, {name}", measured, f"{part / full_bytes:.4f}", goals[1]))
    return rows


def interleaved_row(model: str, folder: Path, batch: Batch, rounds: int, clock: Clock) -> Row:
    """Steps of eight runs in turns, over the same steps run by run."""
    runs = Runs(model, folder, batch)
    names = [f"run-{number}" for number in range(NUM_RUNS)]
    for name in names:
        runs.engine.create_run(name, lora=BODY)
    steps = 2

    def in_turns() -> None:
        for _ in range(steps):
            for name in names:
                runs.step(name)

    def one_after_the_other() -> None:
        for name in names:
            for _ in range(steps):
                runs.step(name)

    for name in names:
        runs.step(name)
    times = interleave({"in turns": in_turns, "after": one_after_the_other}, rounds=rounds, warmup=0, clock=clock)
    measured = f"{ms(times['in turns'])} / {ms(times['after'])}"
    what = f"{NUM_RUNS} runs in turns over one after the other, {steps} steps each"
    return Row(what, measured, f"{ratio(times['in turns'], times['after']):.3f}", "at most 1.05")


def memory_row(model: str, folder: Path, tokens: int) -> Row:
    """What the worker of a trainer holds with eight runs, over what it held with the first; each has made two steps."""
    data = make_data(_vocab_size(model), [tokens // 4] * 4)
    (folder / "trainer").mkdir()
    env = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": str(num_available_cpus())}
    held: list[int] = []
    with (
        running_trainer(Path(model), folder / "trainer", env=env) as trainer,
        ServiceClient(trainer.base_url) as service,
        contextlib.ExitStack() as stack,
    ):
        trainer.wait_ready()
        for _ in range(NUM_RUNS):
            client = stack.enter_context(service.create_training_client(lora_rank=BODY.rank, train_unembed=False))
            for _ in range(2):
                client.forward_backward(data, "cross_entropy")
                client.optim_step(ADAM).result(600)
            held.append(_held_bytes(trainer.worker_pid()))
    further = (held[-1] - held[0]) / (NUM_RUNS - 1)
    measured = f"{held[-1] / 2**20:.0f} / {held[0] / 2**20:.0f} MiB; {further / 2**20:.1f} MiB a further run"
    what = f"the worker's memory with {NUM_RUNS} runs over one"
    return Row(what, measured, f"{held[-1] / held[0]:.3f}", "at most 1.3")


def _held_bytes(pid: int) -> int:
    """What a process has of the host's memory, its libraries included; with a GPU, what is taken of that one's."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return total - free
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024


def _batch(model: str, tokens: int) -> Batch:
    """A batch of four sequences."""
    return batch_from_data(make_data(_vocab_size(model), [tokens // 4] * 4))


def _vocab_size(model: str) -> int:
    return json.loads((Path(model) / "config.json").read_text())["vocab_size"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=256, help="of a batch of four sequences")
    parser.add_argument("--rows", default="step,turns,memory", help="some of them; default: %(default)s")
    parser.add_argument("--cpu-time", action="store_true", help="seconds of this process's CPU, for a busy machine")
    parser.add_argument("--quick", action="store_true", help="a tiny model: that it runs, not how fast")
    args = parser.parse_args()
    rounds, tokens = (1, 40) if args.quick else (args.rounds, args.tokens)
    with tempfile.TemporaryDirectory() as scratch:
        model = tiny_model(Path(scratch), 1000) if args.quick else args.model
        batch = _batch(model, tokens)
        clock = time.process_time if args.cpu_time else time.perf_counter
        rows: list[Row] = []
        if "step" in args.rows:
            rows += step_rows(model, Path(scratch), batch, rounds, clock, wide=16 if args.quick else 32)
            gc.collect()
        if "turns" in args.rows:
            rows.append(interleaved_row(model, Path(scratch), batch, max(1, rounds - 2), clock))
        if "memory" in args.rows:
            rows.append(memory_row(model, Path(scratch), tokens))
    device = f"cuda ({torch.cuda.get_device_name()})" if torch.cuda.is_available() else "cpu"
    day = datetime.datetime.now(datetime.UTC).date()
    print(
        f"{day}, {platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}, {Path(model).name}, "
        f"{tokens} tokens, {rounds} rounds\n"
    )
    print_table(("what", device, "ratio", "goal"), rows)


if __name__ == "__main__":
    main()
