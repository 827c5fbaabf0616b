"""How long a run of a real model is away after its worker is killed, and what the journal takes of its steps.

    python benchmarks/recovery.py [--base-model models/SmolLM2-135M-Instruct] [--kills 3] [--lora-rank 0] [--tokens 64]
                                  [--lived-s 25]

A run is snapshotted every three steps. One step behind a snapshot its worker gets SIGKILL: its spare takes over, if it
lived long enough to have one (--lived-s 0: a new one is started), the run comes back from the snapshot, that step is
replayed, and the loop goes on; again and again. Its losses must be those of
a run that nothing happens to. The journal's share is measured in the same trainer: time its thread spends on commits,
all of them waited for, over the time the steps take.
"""

import argparse
import os
import signal
import socket
import statistics
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# Before torch is imported, and for the worker too.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

import numpy as np
from gradwire import AdamParams, ServiceClient, TrainingClient, datum_from_tokens_weights

from benchmarks.chaos import PARTS, print_table, read_recoveries
from tests.chaos import Trainer

STEPS = 3
ANSWER_S = 600.0


def main() -> int:
    """Exit code 1 if the killed run's losses differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-model", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--lora-rank", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=64, help="a step")
    parser.add_argument("--lived-s", type=float, default=25.0, help="how long a worker is there before it is killed")
    args = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        metrics = f"127.0.0.1:{probe.getsockname()[1]}"
    arguments = ["--snapshot-steps", str(STEPS), "--metrics-port", metrics.rpartition(":")[2]]
    arguments += ["--spare-worker-after-s", "1" if args.lived_s else "0"]
    kills: list[float] = []
    # For tests it sets one thread.
    threads = os.environ["OMP_NUM_THREADS"]
    with (
        tempfile.TemporaryDirectory() as name,
        Trainer(args.base_model, Path(name), *arguments, threads=threads) as trainer,
    ):
        with ServiceClient(f"http://{trainer.address}") as service:
            rounds = range(args.kills + 1)
            undisturbed = service.create_training_client(lora_rank=args.lora_rank)
            wanted = [steps(undisturbed, number, args.tokens) for number in rounds]
            undisturbed.delete_run()
            client = service.create_training_client(lora_rank=args.lora_rank)
            before_s, start_s = journal_s(metrics), time.monotonic()
            got = [steps(client, 0, args.tokens)]
            took_s, journalled_s = time.monotonic() - start_s, journal_s(metrics) - before_s
            for number in rounds[1:]:
                wait_for_snapshot(trainer, client, number)
                time.sleep(args.lived_s)
                kills.append(time.time())
                # It was started before its spare.
                os.kill(min(trainer.worker_pids()), signal.SIGKILL)
                got.append(steps(client, number, args.tokens))
            client.delete_run()
        trainer.stop()
        recoveries = read_recoveries(trainer.log, kills)
    what = f"{args.base_model.name}, {f'LoRA of rank {args.lora_rank}' if args.lora_rank else 'all parameters'}"
    print(f"{what}, {args.kills} kills, {args.tokens} tokens a step, {threads} threads\n")
    rows: list[tuple[str, ...]] = [("part of a recovery", "median", "longest")]
    rows += [
        (part, f"{statistics.median(times):.2f} s", f"{max(times):.2f} s")
        for part, times in zip(PARTS, zip(*recoveries, strict=True), strict=True)
    ]
    print_table(rows)
    step_ms, journal_ms = (each * 1000 / (STEPS + 1) for each in (took_s, journalled_s))
    print(f"\nThe journal takes {journal_ms:.2f} ms of a step's {step_ms:.0f} ms, {journal_ms / step_ms:.3%}.")
    print("The losses are those of a run that nothing happened to." if got == wanted else "THE LOSSES DIFFER.")
    return 0 if got == wanted and len(recoveries) == args.kills else 1


def steps(client: TrainingClient, number: int, num_tokens: int) -> list[float]:
    """Losses of a round's steps, one after the other; the first has one more."""
    losses: list[float] = []
    for step in range(STEPS if number else STEPS + 1):
        tokens = np.random.default_rng([number, step]).integers(3, client.get_info().vocab_size, num_tokens + 1)
        future = client.forward_backward([datum_from_tokens_weights(tokens, np.ones(num_tokens + 1))], "cross_entropy")
        client.optim_step(AdamParams(learning_rate=1e-5)).result(ANSWER_S)
        losses.append(future.result(ANSWER_S).metrics["loss:sum"])
    return losses


def wait_for_snapshot(trainer: Trainer, client: TrainingClient, count: int) -> None:
    """Waits until a run has had so many."""
    line = f"Snapshot. run_id={client.run_id}"
    deadline = time.monotonic() + ANSWER_S
    while trainer.log.read_text().count(line) < count:
        assert time.monotonic() < deadline, trainer.log.read_text()
        time.sleep(0.05)


def journal_s(metrics: str) -> float:
    """Time the trainer has spent on commits."""
    with urllib.request.urlopen(f"http://{metrics}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return float(next(line.split()[-1] for line in lines if line.startswith("gradwire_journal_seconds ")))


if __name__ == "__main__":
    sys.exit(main())
