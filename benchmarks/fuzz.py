"""Sends frames no client would send, over every call and the stream, to a real trainer on a tiny model.

    python benchmarks/fuzz.py --frames 20000 --seed 0

Every one must be answered with a status other than INTERNAL or UNKNOWN, and within a minute; at the end the worker must
be the same one, and a step must work. Prints a table of memory and file handles. Then every field that can be long is
sent far too long, and another run's steps beside that are timed (long_fields.py); then frames go to a control plane
over fake trainers (fuzz_jobs.py).
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from gradwire import AdamParams, ServiceClient, datum_from_tokens_weights

from benchmarks.fuzz_jobs import fuzz_jobs
from benchmarks.long_fields import measure_long_fields
from benchmarks.processes import num_handles, resident_mib
from tests.frames import Frames, send_frames
from tests.tiny import make_tiny_llama
from tests.trainer_process import running_trainer

_ROUNDS = 10


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size-mib", type=int, default=8, help="of each field that is sent too long")
    arguments = parser.parse_args()
    seen: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_llama(Path(folder) / "model")
        with running_trainer(model, Path(folder)) as trainer, ServiceClient(trainer.base_url) as service:
            trainer.wait_ready()
            worker = trainer.worker_pid()
            print("| frames | trainer MiB | handles | worker MiB | handles |\n|---|---|---|---|---|", flush=True)
            start_s = time.monotonic()
            for number in range(_ROUNDS):
                client = service.create_training_client()
                run_id = client.run_id
                client.close()
                frames = Frames(arguments.seed * _ROUNDS + number, run_id)
                seen += send_frames(trainer.address, frames, arguments.frames // _ROUNDS)
                for run in service.list_runs():
                    service.training_client(run.run_id).delete_run()
                cells = [f"{resident_mib(pid):.0f} | {num_handles(pid)}" for pid in (trainer.process.pid, worker)]
                print(f"| {sum(seen.values())} | {' | '.join(cells)} |", flush=True)
            took_s = time.monotonic() - start_s
            assert trainer.worker_pid() == worker, "the worker is another"
            with service.create_training_client() as client:
                tokens = list(range(3, 9))
                client.forward_backward([datum_from_tokens_weights(tokens, [1.0] * len(tokens))], "cross_entropy")
                assert client.optim_step(AdamParams()).result(60).step == 1
            measure_long_fields(trainer, service, arguments.size_mib)
            assert trainer.worker_pid() == worker, "the worker is another"
    print(f"\n{sum(seen.values())} frames in {took_s:.0f} s, then a step; statuses: {dict(seen.most_common())}")
    with tempfile.TemporaryDirectory() as folder:
        fuzz_jobs(Path(folder), arguments.frames // 10, arguments.seed)


if __name__ == "__main__":
    main()
