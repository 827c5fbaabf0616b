"""Kills gateway, trainer, worker and client at random under short training loops of tinker's SDK, many times.

    python benchmarks/gateway_chaos.py [--trials 40] [--steps 6] [--seed 0]

Every answer, greedy samples among them, has to be to the bit that of a loop to which nothing happened.
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.chaos import Trainer
from tests.gateway.chaos import FAULTS, Trial
from tests.gateway_process import running_gateway
from tests.tiny import make_tiny_llama


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    done: Counter[str] = Counter()
    differ: list[int] = []
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "gateway").mkdir()
        model = make_tiny_llama(folder / "model")
        with (
            Trainer(model, folder, "--snapshot-steps", "3", "--max-runs", "256") as trainer,
            running_gateway(f"http://{trainer.address}", folder / "gateway", "--alias", "tiny") as gateway,
        ):
            wanted = Trial(trainer, gateway, folder / "undisturbed", args.steps).run(0)
            for number in range(args.trials):
                seed = args.seed + number
                rng = random.Random(seed)
                faults = tuple(rng.sample(FAULTS, rng.randint(1, len(FAULTS))))
                trial = Trial(trainer, gateway, folder / f"trial-{number}", args.steps)
                same = trial.run(seed, faults) == wanted
                if not same:
                    differ.append(seed)
                done.update(trial.done)
                print(f"trial {number}, seed {seed}: {', '.join(trial.done)}{'' if same else '; DIFFERS'}", flush=True)
            trainer.stop()
    kills = ", ".join(f"{name} {count}" for name, count in sorted(done.items()))
    print(
        f"{args.trials} loops of {args.steps} steps in {time.monotonic() - start:.0f} s, "
        f"{done.total()} kills ({kills}): {args.trials - len(differ)} to the bit as undisturbed"
        + (f"; seeds that differ: {differ}" if differ else ".")
    )
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
