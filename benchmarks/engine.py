"""What the engine and the service cost, beside what one would use otherwise. Prints one table.

    python benchmarks/engine.py [--rows custom,stream] [--rounds 5] [--model FOLDER] [--tinker FOLDER]

Both sides of a row are interleaved in one run; a ratio is the median of the rounds' own ratios. The figures are of the
device that torch finds (CUDA_VISIBLE_DEVICES= keeps to the CPU). --quick runs everything on tiny models, to see that it
runs; its figures mean nothing.
"""

import argparse
import datetime
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from as_the_worker import as_the_worker

if __name__ == "__main__":
    as_the_worker()

import client_cost
import memory
import padded
import parts
import steps
import stream
import torch
from service import tiny_model
from side_by_side import Row, Setting, print_table

ROOT = Path(__file__).resolve().parent.parent
ROWS: dict[str, Callable[[Setting], list[Row]]] = {
    "custom": steps.custom_over_built_in,
    "service": steps.service_over_in_process,
    "padded": padded.over_padded_loop,
    "floor": padded.over_matmul_floor,
    "memory": memory.over_weights_and_gradients,
    "head": memory.head,
    "shared": parts.shared_beginnings,
    "stream": stream.stream,
    "client": client_cost.client_cost,
    "datums": steps.growing_datums,
    "optimizer": parts.optimizer,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help=f"comma-separated, of {', '.join(ROWS)}; default: all")
    parser.add_argument("--model", default=str(ROOT / "models" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tinker", type=Path, help="folder that has the package tinker, for the row beside its code")
    parser.add_argument("--quick", action="store_true", help="tiny models: that it runs, not how fast")
    args = parser.parse_args()
    names = args.rows.split(",") if args.rows else list(ROWS)
    if unknown := set(names) - set(ROWS):
        parser.error(f"--rows: {', '.join(sorted(unknown))}; known: {', '.join(ROWS)}")
    device = f"cuda ({torch.cuda.get_device_name()})" if torch.cuda.is_available() else "cpu"
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        model = tiny_model(Path(scratch), 1000) if args.quick else args.model
        rounds = 1 if args.quick else args.rounds
        setting = Setting(model, Path(scratch), rounds, args.quick, args.tinker)
        with setting.stack:
            for name in names:
                start = time.perf_counter()
                rows += ROWS[name](setting)
                print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    day = datetime.datetime.now(datetime.UTC).date()
    print(
        f"{day}, {platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}, {Path(model).name}, "
        f"{rounds} rounds\n"
    )
    print_table(("what", device, "ratio", "goal"), rows)


if __name__ == "__main__":
    main()
