"""Training loops under an adversary, each compared with the same loop undisturbed. Prints a table.

    python benchmarks/chaos.py [--trials 100] [--at-once 4] [--faults 4] [--steps 40] [--seed 0]

One trainer on a tiny random model serves all trials, some at once. A trial is a fresh run and a seeded loop (built-in
and custom losses, accumulation, failing calls, saves, calls far ahead) while worker, trainer or both get SIGKILL and
connections are cut and stalled at random instants, recoveries included. It counts as identical when every answer and,
at the end, parameters and optimizer state are those of the undisturbed loop, bit for bit.
"""

import argparse
import collections
import contextlib
import itertools
import os
import re
import sqlite3
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# Before torch is imported, and for the worker too.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from gradwire import ServiceClient

from tests.chaos import FAULTS, Adversary, Loop, Trainer, left_behind, state_digests, undisturbed
from tests.cut_proxy import cut_proxy
from tests.tiny import make_tiny_llama


def main() -> int:
    """Exit code 1 if any trial differed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--at-once", type=int, default=4, help="trials that share their faults")
    parser.add_argument("--faults", type=int, default=4, help="at most, for trials at once")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps a trial")
    parser.add_argument("--seed", type=int, default=0, help="of the first trial")
    args = parser.parse_args()
    faults: collections.Counter[str] = collections.Counter()
    answers = different = 0
    kills: list[float] = []
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_tiny_llama(folder / "model")
        with Trainer(model, folder, "--snapshot-steps", "7", "--max-runs", str(args.at_once)) as trainer:
            for first in range(args.seed, args.seed + args.trials, args.at_once):
                seeds = range(first, min(first + args.at_once, args.seed + args.trials))
                done, told, wrong = trials(trainer, seeds, steps=args.steps, at_most=args.faults)
                faults.update(fault for _, fault in done)
                kills += [at for at, fault in done if fault in ("worker", "trainer", "both")]
                answers += told
                different += wrong
                outcome = f"{wrong} DIFFERENT" if wrong else "identical"
                told_faults = [fault for _, fault in done]
                print(f"trials {seeds[0]} to {seeds[-1]}: {outcome}; {told_faults}", file=sys.stderr, flush=True)
            trainer.stop()
            left = left_behind(trainer)
            recoveries = read_recoveries(trainer.log, kills)
    kinds = ", ".join(f"{faults[fault]} {fault}" for fault in FAULTS)
    rows: list[tuple[str, ...]] = [
        ("what", "measured"),
        ("trials, bit-identical / all", f"{args.trials - different} / {args.trials}"),
        ("answers compared", str(answers)),
        ("faults", f"{faults.total()}: {kinds}"),
        ("processes and half-written files left", str(len(left))),
        ("time", f"{(time.monotonic() - start) / 60:.0f} min"),
    ]
    print_table(rows)
    print()
    parts: list[tuple[str, ...]] = [("part of a recovery", "median", "longest")]
    parts += [
        (f"{part} ({len(recoveries)} recoveries)", f"{statistics.median(times):.2f} s", f"{max(times):.2f} s")
        for part, times in zip(PARTS, zip(*recoveries, strict=True), strict=False)
    ]
    print_table(parts)
    return 1 if different or left else 0


def print_table(rows: list[tuple[str, ...]]) -> None:
    """A Markdown table; the first row is its header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in (rows[0], tuple("-" * width for width in widths), *rows[1:]):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |", flush=True)


def trials(trainer: Trainer, seeds: range, *, steps: int, at_most: int) -> tuple[list[tuple[float, str]], int, int]:
    """Loops side by side. Returns the faults they had, how many answers were compared, and how many loops differed."""
    wanted = [undisturbed(trainer, seed=seed, steps=steps) for seed in seeds]
    with (
        cut_proxy(trainer.address) as proxy,
        ServiceClient(proxy.base_url, reconnect_timeout_s=300) as service,
        ThreadPoolExecutor(len(seeds)) as threads,
    ):
        clients = [service.create_training_client() for _ in seeds]
        loops = [Loop(client, seed=seed, steps=steps) for client, seed in zip(clients, seeds, strict=True)]
        adversary = Adversary(
            trainer, proxy, seeds[0], FAULTS, lambda: sum(loop.answered for loop in loops), at_most=at_most
        )
        adversary.start()
        try:
            got = list(threads.map(lambda loop: loop.run(), loops))
        finally:
            adversary.stop()
        wrong = 0
        for seed, client, (answers, digests), disturbed in zip(seeds, clients, wanted, got, strict=True):
            same = disturbed == answers and state_digests(trainer, client, "final") == digests
            wrong += not (same and executed_once(trainer.data_dir / "runs" / client.run_id))
            for number, (one, other) in enumerate(zip(disturbed, answers, strict=True)):
                if one != other:
                    print(f"trial {seed}, call {number}:\n  got    {one}\n  wanted {other}", file=sys.stderr)
            client.delete_run()
    return adversary.done, sum(len(answers) for answers, _ in wanted), wrong


def executed_once(run_folder: Path) -> bool:
    """Whether the journal has one outcome an operation."""
    with contextlib.closing(sqlite3.connect(run_folder / "journal.sqlite")) as db:
        [(operations, outcomes)] = db.execute(
            "SELECT (SELECT count(*) FROM operations), (SELECT count(*) FROM outcomes)"
        )
    return operations == outcomes


PARTS = (
    "noticed: from the kill until a new worker is started",
    "start: Python, torch and transformers imported",
    "load: the base model",
    "replay: snapshot and journal",
    "all",
)
_LINE = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}) \S+ +\S+: (.*)")
_MARKS = ("Starting the worker.", "Loading.", "The worker is ready.", "Run restored.")


def read_recoveries(log: Path, kills: list[float]) -> list[tuple[float, ...]]:
    """Seconds of each part, of every recovery that no other kill cut short, from the trainer's log."""
    events: list[tuple[float, str]] = [(at, "kill") for at in kills]
    for line in log.read_text().splitlines():
        if (found := _LINE.match(line)) and (mark := next((mark for mark in _MARKS if mark in found[2]), None)):
            events.append((datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S.%f").astimezone().timestamp(), mark))
    events.sort()
    recoveries: list[tuple[float, ...]] = []
    wanted = ("kill", *_MARKS)
    reached: list[float] = []
    for at, what in events:
        if what == "kill":
            reached = [at]
        elif reached and what == wanted[len(reached)]:
            reached.append(at)
            if len(reached) == len(wanted):
                parts = tuple(after - before for before, after in itertools.pairwise(reached))
                recoveries.append((*parts, reached[-1] - reached[0]))
                reached = []
    return recoveries


if __name__ == "__main__":
    sys.exit(main())
