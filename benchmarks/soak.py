"""A small loop for a long time: memory and file handles of trainer, worker and client must stay flat.

    python benchmarks/soak.py --minutes 10

Steps with built-in and custom losses, saves that replace each other, loads, deltas, deletions, on a tiny model. Prints
a table, a row a minute, and ends with an error where memory grew by more than 5 % or handles by more than 5 since the
first minute.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from gradwire import AdamParams, ServiceClient, TrainingClient, datum_from_tokens_weights

from benchmarks.processes import num_handles, resident_mib
from tests.tiny import make_tiny_llama
from tests.trainer_process import running_trainer

_MAX_GROWTH = 1.05
_MAX_MORE_HANDLES = 5


def _loss(data: object, logprobs_list: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    return -torch.stack([logprobs.sum() for logprobs in logprobs_list]).sum(), {}


def _round(service: ServiceClient, client: TrainingClient, number: int) -> None:
    data = [datum_from_tokens_weights([3 + (number + i) % 90 for i in range(n)], [1.0] * n) for n in (9, 17, 30)]
    for _ in range(10):
        client.forward_backward(data, "cross_entropy")
        client.forward_backward_custom(data, _loss)
        client.optim_step(AdamParams(learning_rate=1e-6))
    path = client.save_state("state", overwrite=True).result(120)
    client.load_state_with_optimizer(path).result(120)
    base = client.save_weights_for_sampler_ext("base", overwrite=True).path
    delta = client.save_weights_for_sampler_ext("delta", "delta", overwrite=True).path
    for saved in (delta, base, path):
        service.checkpoints.delete(saved)


def main() -> int:
    """Exit code: 1 where something grew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    minutes = parser.parse_args().minutes
    rows: list[list[float]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_llama(Path(folder) / "model")
        with running_trainer(model, Path(folder)) as trainer, ServiceClient(trainer.base_url) as service:
            trainer.wait_ready()
            pids = (trainer.process.pid, trainer.worker_pid(), os.getpid())
            print("| minute | steps | trainer MiB | handles | worker MiB | handles | client MiB | handles |")
            print("|---|---|---|---|---|---|---|---|", flush=True)
            start_s, number = time.monotonic(), 0
            while (passed_s := time.monotonic() - start_s) < minutes * 60:
                with service.create_training_client() as client:
                    _round(service, client, number)
                    client.delete_run()
                number += 1
                if passed_s >= 60 * (len(rows) + 1):
                    rows.append([value for pid in pids for value in (resident_mib(pid), num_handles(pid))])
                    cells = " | ".join(f"{value:.0f}" for value in rows[-1])
                    print(f"| {passed_s / 60:.0f} | {10 * number} | {cells} |", flush=True)
    if not rows:
        print("Too short for a verdict: the first row comes after a minute.")
        return 0
    first, last = rows[0], rows[-1]
    grew = [
        after > before * _MAX_GROWTH if place % 2 == 0 else after > before + _MAX_MORE_HANDLES
        for place, (before, after) in enumerate(zip(first, last, strict=True))
    ]
    print("grew" if any(grew) else "flat")
    return int(any(grew))


if __name__ == "__main__":
    sys.exit(main())
