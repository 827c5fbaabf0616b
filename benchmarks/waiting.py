"""A step by how threads wait for one another, on a quiet machine and beside one busy process. Prints one table.

    python benchmarks/waiting.py [--model FOLDER] [--rounds 3] [--tokens 128] [--quick]

Each way has a process of its own, which idles while the others step. A LoRA step of rank 8 on four sequences, in
process. "as the worker" spins unless something else wants the cores (trainer_service/engine/spinning.py).
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from side_by_side import Row, print_table

ROOT = Path(__file__).resolve().parent.parent
WAYS = {
    "asleep": {"OMP_WAIT_POLICY": "PASSIVE"},
    "spinning": {"GOMP_SPINCOUNT": "20000"},
    "as the worker": {"GOMP_SPINCOUNT": "20000", "GRADWIRE_BENCHMARK_SPIN": "when alone"},
}
VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def serve(model: str, tokens: int) -> None:
    """A step for every line that comes; answers with its seconds."""
    from gradwire._wire.codec import batch_from_data
    from service import ADAM, make_data

    from trainer_service.engine.device import pick_device, set_num_threads
    from trainer_service.engine.engine import Engine
    from trainer_service.engine.losses import find_loss
    from trainer_service.engine.models.lora import LoraSettings
    from trainer_service.engine.spinning import spin_when_alone

    set_num_threads()
    if os.environ.get("GRADWIRE_BENCHMARK_SPIN"):
        spin_when_alone()
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(model, device=pick_device(), checkpoint_dir=Path(folder))
        engine.create_run("run", lora=LoraSettings(rank=8))
        batch, loss = batch_from_data(make_data(engine.model.vocab_size, [tokens] * 4)), find_loss("cross_entropy")
        print("ready", flush=True)
        for _ in sys.stdin:
            start = time.perf_counter()
            engine.forward_backward("run", 1, engine.stage(batch, loss))
            engine.optim_step("run", 2, ADAM)
            print(time.perf_counter() - start, flush=True)


class Side:
    """A process that steps when told to."""

    def __init__(self, env: dict[str, str], arguments: list[str]) -> None:
        kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        command = [sys.executable, __file__, "--serve", *arguments]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env={**kept, **env})

    def ready(self) -> None:
        """Waits until its model is loaded."""
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def step(self) -> float:
        """Seconds that a step took."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def end(self) -> None:
        """Ends it."""
        self._process.communicate()


def measure(sides: dict[str, Side], rounds: int, *, steps: int) -> dict[str, list[float]]:
    """Seconds of each way's steps, in turns; a turn's first, which may find out what has changed, is left out."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            times[name] += [sides[name].step() for _ in range(steps)][1:]
    return times


def rows(what: str, times: dict[str, list[float]]) -> list[Row]:
    """One for each way, over the best of them."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    best = min(medians.values())
    return [
        Row(
            f"{what}: {name}",
            f"{value:.2f} s",
            f"{value / best:.2f}",
            "at most 1.05" if name == "as the worker" else "",
        )
        for name, value in medians.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128, help="of each of four sequences")
    parser.add_argument("--quick", action="store_true", help="a tiny model: that it runs, not how fast")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.model, args.tokens)
        return
    with tempfile.TemporaryDirectory() as scratch:
        model, rounds, tokens = args.model, args.rounds, args.tokens
        if args.quick:
            from service import tiny_model

            model, rounds, tokens = tiny_model(Path(scratch), 1000), 1, 8
        arguments = ["--model", model, "--tokens", str(tokens)]
        sides = {name: Side(env, arguments) for name, env in WAYS.items()}
        for side in sides.values():
            side.ready()
        measure(sides, 1, steps=2)
        table = rows("quiet", measure(sides, rounds, steps=3))
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            table += rows("beside one busy process", measure(sides, rounds, steps=3))
        finally:
            busy.kill()
            busy.wait()
        for side in sides.values():
            side.end()
    print_table(("a step", f"{os.cpu_count()} CPUs", "ratio", "goal"), table)


if __name__ == "__main__":
    main()
