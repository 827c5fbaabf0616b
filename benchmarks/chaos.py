"""Training loops under an adversary, each compared with the same loop undisturbed. Prints a table.

    python benchmarks/chaos.py [--trials 100] [--at-once 4] [--faults 5] [--kinds a,b] [--steps 40] [--seed 0]
        [--nproc-per-node 1] [--dp-replicate-size 1]

One trainer on a tiny random model serves all trials, some at once. A trial is a fresh run (every fourth one LoRA) and a
seeded loop (built-in and custom losses, accumulation, failing calls, saves, calls far ahead) while a rank of the
worker, the trainer or both get SIGKILL, connections are cut and stalled and the disk gets full, at random instants,
recoveries included. It counts as identical when every answer and, at the end, parameters and optimizer state, its own
and a fork's, are those of the undisturbed loop, bit for bit. What a full disk refuses is called again, as a user would
(tests/chaos.py, Loop).

The disk that gets full is one of its own, in memory; without the right to mount one, run it as
`unshare --user --map-root-user --mount python benchmarks/chaos.py`.
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
from dataclasses import astuple, dataclass
from datetime import datetime
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# Before torch is imported, and for the worker too.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from gradwire import ServiceClient

from tests.chaos import FAULTS, Adversary, Loop, Trainer, forget, left_behind, state_digests, undisturbed
from tests.cut_proxy import cut_proxy
from tests.full_disk import SmallDisk, small_disk
from tests.tiny import make_tiny_llama

DISK_BYTES = 384 << 20
"""Size of the disk that gets full."""


def main() -> int:
    """Exit code 1 if any trial differed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--at-once", type=int, default=4, help="trials that share their faults")
    parser.add_argument("--faults", type=int, default=5, help="at most, for trials at once")
    parser.add_argument("--kinds", default=",".join(FAULTS), help="of faults; default: %(default)s")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps a trial")
    parser.add_argument("--seed", type=int, default=0, help="of the first trial")
    parser.add_argument("--nproc-per-node", default="1", help="ranks of the worker; default: %(default)s")
    parser.add_argument("--dp-replicate-size", default="1", help="replicas among them; default: %(default)s")
    args = parser.parse_args()
    faults: collections.Counter[str] = collections.Counter()
    counts = Counts()
    kills: list[float] = []
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_tiny_llama(folder / "model")
        with (
            small_disk(folder / "disk", DISK_BYTES) as disk,
            # Room for a fork.
            Trainer(
                model,
                folder,
                *("--snapshot-steps", "7", "--max-runs", str(args.at_once + 1)),
                *("--nproc-per-node", args.nproc_per_node, "--dp-replicate-size", args.dp_replicate_size),
                data_dir=disk.path / "data",
            ) as trainer,
        ):
            for first in range(args.seed, args.seed + args.trials, args.at_once):
                seeds = range(first, min(first + args.at_once, args.seed + args.trials))
                done, counted = trials(
                    trainer, disk, seeds, steps=args.steps, kinds=tuple(args.kinds.split(",")), at_most=args.faults
                )
                faults.update(fault for _, fault in done)
                kills += [at for at, fault in done if fault in ("worker", "trainer", "both")]
                counts += counted
                outcome = f"{counted.different} DIFFERENT" if counted.different else "identical"
                told_faults = [fault for _, fault in done]
                print(f"trials {seeds[0]} to {seeds[-1]}: {outcome}; {told_faults}", file=sys.stderr, flush=True)
            trainer.stop()
            left = left_behind(trainer)
            recoveries = read_recoveries(trainer.log, kills)
    kinds = ", ".join(f"{faults[fault]} {fault}" for fault in FAULTS)
    rows: list[tuple[str, ...]] = [
        ("what", "measured"),
        ("trials, bit-identical / all", f"{args.trials - counts.different} / {args.trials}"),
        ("answers compared", str(counts.answers)),
        ("calls refused on the full disk, and made again", str(counts.refused)),
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
    return 1 if counts.different or left else 0


def print_table(rows: list[tuple[str, ...]]) -> None:
    """A Markdown table; the first row is its header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in (rows[0], tuple("-" * width for width in widths), *rows[1:]):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |", flush=True)


@dataclass(frozen=True)
class Counts:
    """The outcome of trials."""

    answers: int = 0
    """Trials compared."""
    different: int = 0
    """Trials that ended otherwise than the undisturbed loop."""
    refused: int = 0
    """Answers that were refusals because the disk was full."""

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(one + another for one, another in zip(astuple(self), astuple(other), strict=True)))


def trials(
    trainer: Trainer, disk: SmallDisk, seeds: range, *, steps: int, kinds: tuple[str, ...], at_most: int
) -> tuple[list[tuple[float, str]], Counts]:
    """Loops side by side. Returns the faults they had, and what came of them."""
    lora_ranks = [4 if seed % 4 == 3 else 0 for seed in seeds]
    wanted = [
        undisturbed(trainer, seed=seed, steps=steps, lora_rank=lora_rank)
        for seed, lora_rank in zip(seeds, lora_ranks, strict=True)
    ]
    with (
        cut_proxy(trainer.address) as proxy,
        ServiceClient(proxy.base_url, reconnect_timeout_s=300) as service,
        ThreadPoolExecutor(len(seeds)) as threads,
    ):
        clients = [service.create_training_client(lora_rank=lora_rank) for lora_rank in lora_ranks]
        loops = [Loop(client, seed=seed, steps=steps) for client, seed in zip(clients, seeds, strict=True)]
        adversary = Adversary(
            trainer, disk, proxy, seeds[0], kinds, lambda: sum(loop.answered for loop in loops), at_most=at_most
        )
        adversary.start()
        try:
            got = list(threads.map(lambda loop: loop.run(), loops))
        finally:
            adversary.stop()
        counts = Counts()
        for seed, client, loop, (answers, digests), told in zip(seeds, clients, loops, wanted, got, strict=True):
            same = told == answers and state_digests(trainer.data_dir, client, "final") == digests
            same = same and executed_once(trainer.data_dir / "runs" / client.run_id)
            with client.fork() as fork:
                same = same and state_digests(trainer.data_dir, fork, "fork") == digests
                forget(trainer.data_dir, fork)
            for place, wanted_answer in answers.items():
                if told[place] != wanted_answer:
                    print(
                        f"trial {seed}, call {place}:\n  got    {told[place]}\n  wanted {wanted_answer}",
                        file=sys.stderr,
                    )
            counts = counts + Counts(answers=len(answers), different=not same, refused=loop.refused)
            forget(trainer.data_dir, client)
    return adversary.done, counts


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
_MARKS = (
    ("Starting the worker.", "The spare worker takes over."),
    ("Loading.",),
    ("The worker is ready.",),
    ("Run restored.",),
)
"""What the log says behind each part of a recovery, in one of these ways."""
_KILL = ("kill",)


def read_recoveries(log: Path, kills: list[float]) -> list[tuple[float, ...]]:
    """Seconds of each part, of every recovery that no other kill cut short, from the trainer's log."""
    events: list[tuple[float, tuple[str, ...]]] = [(at, _KILL) for at in kills]
    for line in log.read_text().splitlines():
        if not (found := _LINE.match(line)):
            continue
        if mark := next((mark for mark in _MARKS if any(text in found[2] for text in mark)), None):
            events.append((datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S.%f").astimezone().timestamp(), mark))
    events.sort()
    recoveries: list[tuple[float, ...]] = []
    wanted = (_KILL, *_MARKS)
    reached: list[float] = []
    for at, what in events:
        if what is _KILL:
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
