"""What two ranks of one thread each cost, beside one rank of two. Prints one table.

    python benchmarks/ranks.py [--rounds 3] [--model FOLDER] [--tokens 1024]

Trainers of both kinds run at the same time and take turns; a ratio is the median of the rounds' own. Bytes between the
ranks are what the loopback interface carried in the step, on a machine where little else uses it.

What a rank holds of parameters and optimizer is what it writes of them: tensors in memory, byte for byte. A process
has more: libraries, 330 MiB on every rank, and while it works what the C library keeps for the next step
(engine/freed_memory.py), gathered layers, gradients and activations among it. Both are told beside it.
"""

import argparse
import contextlib
import datetime
import os
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# Before torch is imported, and for the workers too.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from gradwire import Datum, ServiceClient, TrainingClient
from service import built_in, make_data
from side_by_side import Row, interleave, print_table

from tests.chaos import Trainer

ROOT = Path(__file__).resolve().parent.parent
WAIT_S = 300.0
"""Bounds failure."""
_REST_S = 60.0
"""By when an idle worker has given memory back."""


@dataclass
class Side:
    """A trainer with one run.

    Attributes:
        world_size: Its ranks.
    """

    world_size: int
    trainer: Trainer
    service: ServiceClient
    client: TrainingClient

    @classmethod
    def start(cls, stack: contextlib.ExitStack, model: str, folder: Path, world_size: int, *arguments: str) -> "Side":
        """Ready, with a run that trains all parameters; two threads in all. More arguments are the trainer's."""
        folder.mkdir()
        trainer = stack.enter_context(
            Trainer(
                Path(model),
                folder,
                *("--nproc-per-node", str(world_size), "--snapshot-interval-s", "0", *arguments),
                threads=str(2 // world_size),
            )
        )
        service = stack.enter_context(ServiceClient(f"http://{trainer.address}", reconnect_timeout_s=WAIT_S))
        return cls(world_size, trainer, service, service.create_training_client())

    def memory(self, what: str) -> float:
        """MiB of a rank, the largest of them: VmHWM for the most since `forget_peak`, RssAnon for now."""
        return max(_status(pid, what) for pid in self.trainer.worker_pids()) / 1024

    def held(self) -> float:
        """MiB of parameters and optimizer state of a rank, the largest of them, as it saved them last."""
        folder = self.trainer.data_dir / "checkpoints" / self.client.run_id / "state" / "a"
        numbers = {file.name.partition("-")[2]: 0 for file in folder.glob("*.safetensors")}
        for file in folder.glob("*.safetensors"):
            numbers[file.name.partition("-")[2]] += file.stat().st_size
        return max(numbers.values()) / 2**20

    def resting(self) -> float:
        """MiB of a rank's process once it has given back what was free."""
        working, deadline = self.memory("RssAnon"), time.monotonic() + _REST_S
        while self.memory("RssAnon") > 0.9 * working and time.monotonic() < deadline:
            time.sleep(1)
        return self.memory("RssAnon")

    def forget_peak(self) -> None:
        """Lets VmHWM begin anew."""
        for pid in self.trainer.worker_pids():
            Path(f"/proc/{pid}/clear_refs").write_text("5")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1024, help="of a step, in sequences of an eighth of them")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        one, two = (Side.start(stack, args.model, Path(name, str(size)), size) for size in (1, 2))
        rows = measure(one, two, rounds=args.rounds, num_tokens=args.tokens)
    day = datetime.datetime.now(datetime.UTC).date()
    print(f"{day}, {os.cpu_count()} CPUs, {Path(args.model).name}, {args.tokens} tokens a step, {args.rounds} rounds\n")
    print_table(("what", "2 ranks of 1 thread, 1 of 2", "ratio", "goal"), rows)


def measure(one: Side, two: Side, *, rounds: int, num_tokens: int) -> list[Row]:
    """All rows."""
    info = one.service.get_server_info().models[0]
    data = make_data(info.vocab_size, [num_tokens // 8] * 8)
    sides = (two, one)
    built_in(one.client, data)
    built_in(two.client, data)
    for side in sides:
        side.forget_peak()
    times = interleave(
        {str(side.world_size): lambda side=side: built_in(side.client, data) for side in sides}, rounds=rounds
    )
    peaks = [side.memory("VmHWM") for side in sides]
    before = loopback_bytes()
    built_in(two.client, data)
    carried = loopback_bytes() - before
    # Parameters are gathered once and gradients summed once, and each of two ranks sends half of the whole both times.
    theory = 2 * 4 * info.num_parameters
    saving = interleave({str(side.world_size): lambda side=side: _save(side) for side in sides}, rounds=1, warmup=0)
    held = [side.held() for side in sides]
    resting = [side.resting() for side in sides]
    loading = interleave({str(side.world_size): lambda side=side: _load(side) for side in sides}, rounds=1, warmup=0)
    restarts = [_killed(side, data) for side in sides]
    step = [statistics.median(times[str(side.world_size)]) for side in sides]
    speed = statistics.median(o / t for o, t in zip(times["1"], times["2"], strict=True))
    return [
        Row("tokens/s", _both("{:.0f}", *(num_tokens / seconds for seconds in step)), f"{speed:.2f}", "at least 0.9"),
        Row(
            "parameters and optimizer of a rank, MiB", _both("{:.0f}", *held), f"{held[0] / held[1]:.2f}", "at most 0.6"
        ),
        Row("a rank's process at rest, MiB", _both("{:.0f}", *resting), f"{resting[0] / resting[1]:.2f}"),
        Row("the most of it in a step, MiB", _both("{:.0f}", *peaks), f"{peaks[0] / peaks[1]:.2f}"),
        Row(
            "MB between the ranks a step, by theory",
            f"{carried / 1e6:.0f}, {theory / 1e6:.0f}",
            f"{carried / theory:.2f}",
        ),
        Row("save_state, s", _both("{:.1f}", *(saving[str(side.world_size)][0] for side in sides))),
        Row("load_state_with_optimizer, s", _both("{:.1f}", *(loading[str(side.world_size)][0] for side in sides))),
        Row("from SIGKILL of a rank to the next answer, s", _both("{:.1f}", *restarts)),
    ]


def _both(how: str, two: float, one: float) -> str:
    return f"{how.format(two)}, {how.format(one)}"


def _save(side: Side) -> None:
    side.client.save_state("a", overwrite=True).result(WAIT_S)


def _load(side: Side) -> None:
    side.client.load_state_with_optimizer(f"gradwire://{side.client.run_id}/state/a").result(WAIT_S)


def _killed(side: Side, data: list[Datum]) -> float:
    os.kill(side.trainer.worker_pids()[-1], signal.SIGKILL)
    start = time.perf_counter()
    side.client.forward(data[:1]).result(WAIT_S)
    return time.perf_counter() - start


def _status(pid: int, what: str) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"{what}:")))


def loopback_bytes() -> int:
    """What the loopback interface has received since the machine started."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return int(next(line.split(":")[1].split()[0] for line in lines if line.strip().startswith("lo:")))


if __name__ == "__main__":
    main()
