"""What open pages cost a trainer's steps: rounds with and without 50 pages that follow the run being trained.

    python benchmarks/page.py [--rounds 30] [--pages 50] [--runs 100] [--quick]

Within a round both sides train for the same number of steps, one after the other, and who starts alternates. A round
begins once the pages have what a page is told at first: what opening them costs has a row of its own. The
ratio is the mean over the rounds, with its standard error.

A process of its own reads the pages on this machine, as cheaply as can be. To the trainer they are like browsers on
other machines, or slightly more: through loopback, a receiver's kernel does its part within the sender's write. What
the reader takes itself has a row, too; it counts against the rate, though browsers would take it elsewhere.
"""

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from gradwire import AdamParams, Datum, ModelInput, ServiceClient, TrainingClient

from benchmarks.side_by_side import Row, ms, print_table
from tests.tiny import make_tiny_llama
from tests.trainer_process import TrainerProcess, running_trainer

SETTLE_S = 0.2
"""For pages to be closed, or opened, before time counts."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--pages", type=int, default=50)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--step-ms", type=float, default=100.0, help="about how long one step takes")
    parser.add_argument("--quick", action="store_true", help="the figures mean nothing")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.pages, args.runs, args.step_ms = 1, 3, 3, 1.0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = make_tiny_llama(folder / "model")
        options = ("--page", "127.0.0.1:0", "--max-runs", str(args.runs + 8), "--log-level", "WARNING")
        with running_trainer(model, folder, *options) as trainer, ServiceClient(trainer.base_url) as service:
            trainer.wait_ready()
            print_table(("what", "with / without", "ratio", "goal"), measure(args, service, trainer))


def measure(args: argparse.Namespace, service: ServiceClient, trainer: TrainerProcess) -> list[Row]:
    """The rows."""
    pid, url = trainer.process.pid, trainer.page_url
    clients = [service.create_training_client(display_name=f"run {n}") for n in range(args.runs)]
    client = clients[0]
    data, seconds = sized(client, service.get_server_info().models[0].vocab_size, args.step_ms / 1000)
    steps = max(3, round(2.0 / seconds)) if not args.quick else 3
    host, query = url.split("/")[2], f"/api/events?runs={client.run_id}"

    cpu: dict[str, float] = {"with": 0.0, "without": 0.0}
    times: dict[str, list[float]] = {"with": [], "without": []}
    opening_s: list[float] = []
    reader_s = 0.0
    for number in range(args.rounds):
        for name in ("with", "without")[:: 1 if number % 2 == 0 else -1]:
            before = cpu_s(pid)
            with open_pages(host, query, args.pages if name == "with" else 0) as reader_pid:
                time.sleep(SETTLE_S)
                if name == "with":
                    opening_s.append(cpu_s(pid) - before)
                before, reader_before, start = cpu_s(pid), cpu_s(reader_pid), time.perf_counter()
                for _ in range(steps):
                    step(client, data)
                times[name].append(time.perf_counter() - start)
                cpu[name] += cpu_s(pid) - before
                reader_s += cpu_s(reader_pid) - reader_before
    rate = {name: steps * len(found) / sum(found) for name, found in times.items()}
    ratios = [a / b for a, b in zip(times["with"], times["without"], strict=True)]
    error = statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else 0.0
    spent = {name: cpu[name] / sum(times[name]) for name in times}
    what = f"steps of {1000 * seconds:.0f} ms with {args.pages} pages open, {args.runs} runs"
    return [
        Row(
            what,
            f"{rate['with']:.1f} / {rate['without']:.1f} steps/s",
            f"{statistics.mean(ratios):.3f} ± {error:.3f}",
            "at most 1.02",
        ),
        Row(
            "processor time of the trainer's process",
            f"{100 * spent['with']:.1f} / {100 * spent['without']:.1f} % of a core",
        ),
        Row("the same, to open the pages, once", ms(opening_s)),
        Row("processor time of the reader", f"{100 * reader_s / sum(times['with']):.1f} % of a core"),
    ]


def sized(client: TrainingClient, vocab_size: int, wanted_s: float) -> tuple[list[Datum], float]:
    """Data whose step takes about so long, and how long it takes."""
    rng, count, took_s = np.random.default_rng(0), 1, 0.0
    data: list[Datum] = []
    while took_s < wanted_s and count <= 4096:
        data = []
        for _ in range(count):
            tokens = rng.integers(0, vocab_size, 33)
            inputs = {"target_tokens": tokens[1:], "weights": np.ones(32, dtype=np.float32)}
            data.append(Datum(ModelInput.from_ints(tokens[:-1]), inputs))
        step(client, data)
        tries: list[float] = []
        for _ in range(3):
            start = time.perf_counter()
            step(client, data)
            tries.append(time.perf_counter() - start)
        took_s = min(tries)
        count *= 2
    return data, took_s


def step(client: TrainingClient, data: list[Datum]) -> None:
    client.forward_backward(data)
    client.optim_step(AdamParams(learning_rate=1e-6)).result(600)


@contextlib.contextmanager
def open_pages(host: str, query: str, count: int) -> Iterator[int]:
    """That many pages, each told everything by now, and the process id of their reader."""
    command = [sys.executable, "-IS", str(Path(__file__).with_name("page_reader.py")), host, query, str(count)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"open\n"
        try:
            yield reader.pid
            assert reader.poll() is None
        finally:
            reader.stdin.close()
            reader.wait(20)


def cpu_s(pid: int) -> float:
    """Processor time a process has had, seconds."""
    # Linux: the clock of another process, in nanoseconds where /proc has hundredths of a second.
    return time.clock_gettime(~pid << 3 | 2)


if __name__ == "__main__":
    main()
