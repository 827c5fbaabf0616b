"""A LoRA step beside what one would write oneself: peft's adapter in a plain loop, which pads. Prints one table.

    python benchmarks/peers.py [--model FOLDER] [--rounds 3] [--rank 8] [--cpu-time] [--quick] [--tuft ENVIRONMENT]

One process, both sides interleaved, float32, no activation checkpointing on either; ours is the engine without the
service around it, whose own part is the row `service` of engine.py. The loop's AdamW is torch's fused one, and its
threads wait for one another as ours do. --cpu-time counts one thread's CPU seconds, for a busy machine.

--tuft has rows beside TuFT in place of the loop's: two servers, each with its own client, a whole step from call to
result, float32, with checkpointing as each has it by default: TuFT of every layer, we where memory asks for it. tuft.py
tells how it is installed.
"""

import argparse
import datetime
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from as_the_worker import as_the_worker

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if __name__ == "__main__":
    as_the_worker()

import torch
from gradwire import Datum
from gradwire._wire.codec import batch_from_data
from padded import RAGGED, PaddedLoop, ragged_lengths
from service import ADAM, built_in, custom, make_data, tiny_model, trainer
from side_by_side import Row, Setting, interleave, ms, print_table, ratio
from tuft import tuft

from trainer_service.engine.device import pick_device, set_num_threads
from trainer_service.engine.engine import Engine
from trainer_service.engine.losses import find_loss
from trainer_service.engine.models.lora import LoraSettings
from trainer_service.engine.spinning import spin_when_alone

ROOT = Path(__file__).resolve().parent.parent
GOALS = {"equal": "at least 1.25", "ragged": ""}
TUFT_GOALS = {"built-in": "at least 1.5", "custom": "at least 2", "ragged": "at least 4"}


class PeftLoop(PaddedLoop):
    """transformers, peft and torch alone, on the layers that train_attn and train_mlp adapt."""

    def __init__(self, model: str, *, rank: int) -> None:
        from peft import LoraConfig, get_peft_model

        super().__init__(model, dtype=torch.float32)
        config = LoraConfig(r=rank, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(self.model, config)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._optimizer: Any = torch.optim.AdamW(trained, lr=1e-6, fused=True)


class LoraEngine:
    """A LoRA run of the engine."""

    def __init__(self, model: str, folder: Path, *, rank: int) -> None:
        self.engine = Engine(model, device=pick_device(), checkpoint_dir=folder)
        self.engine.create_run("run", lora=LoraSettings(rank=rank, train_unembed=False))
        self._loss = find_loss("cross_entropy")

    def step(self, data: list[Datum]) -> None:
        """A whole step on these data."""
        self.engine.forward_backward("run", 1, self.engine.stage(batch_from_data(data), self._loss))
        self.engine.optim_step("run", 2, ADAM)


def beside_a_loop(
    model: str, scratch: Path, *, rank: int, rounds: int, clock: Callable[[], float], scale: int
) -> list[Row]:
    """The engine and a plain peft loop; lengths are divided by `scale`."""
    rows: list[Row] = []
    ours, loop = LoraEngine(model, scratch, rank=rank), PeftLoop(model, rank=rank)
    for shape, lengths in (("equal", [128 // scale] * 4), ("ragged", ragged_lengths(scale))):
        data = make_data(ours.engine.model.vocab_size, lengths)
        sides = {"ours": lambda data=data: ours.step(data), "peft": lambda data=data: loop.step(data)}
        times = interleave(sides, rounds=rounds, clock=clock)
        what = f"LoRA step of rank {rank}, lengths {', '.join(map(str, lengths))}: a plain peft loop over ours"
        faster = ratio(times["peft"], times["ours"])
        rows.append(Row(what, f"{ms(times['peft'])} / {ms(times['ours'])}", f"{faster:.2f}", GOALS[shape]))
    return rows


def beside_tuft(environment: Path, model: str, scratch: Path, *, rank: int, rounds: int) -> list[Row]:
    """Two servers on one model in float32, each with its own client."""
    from transformers import AutoModelForCausalLM

    folder = scratch / "float32"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin*"))
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).save_pretrained(folder)
    setting = Setting(model=str(folder), folder=scratch, rounds=rounds, quick=False)
    rows: list[Row] = []
    with trainer(setting, "ours") as service, tuft(environment, str(folder), scratch, rank=rank) as theirs:
        client = service.create_training_client(lora_rank=rank, train_unembed=False)
        steps = {"built-in": built_in, "custom": custom}
        ragged = [*RAGGED, *RAGGED]
        for row, kind, lengths in (
            ("built-in", "built-in", [128] * 4),
            ("custom", "custom", [128] * 4),
            ("ragged", "built-in", ragged),
        ):
            data = make_data(4000, lengths)
            sides = {
                "ours": lambda kind=kind, data=data: steps[kind](client, data),
                "theirs": lambda kind=kind, lengths=lengths: theirs(kind, lengths),
            }
            times = interleave(sides, rounds=rounds)
            batch = f"{len(lengths)} sequences, {sum(lengths)} tokens"
            what = f"LoRA step of rank {rank}, {kind} loss, {batch}: TuFT over ours"
            faster = ratio(times["theirs"], times["ours"])
            rows.append(Row(what, f"{ms(times['theirs'])} / {ms(times['ours'])}", f"{faster:.2f}", TUFT_GOALS[row]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--cpu-time", action="store_true", help="one thread, and its CPU seconds")
    parser.add_argument("--quick", action="store_true", help="a tiny model: that it runs, not how fast")
    parser.add_argument("--tuft", type=Path, help="an environment that TuFT is installed in")
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    if args.cpu_time:
        torch.set_num_threads(1)
    else:
        set_num_threads()
        spin_when_alone()
    rows: list[Row] = []
    rounds = 1 if args.quick else args.rounds
    with tempfile.TemporaryDirectory() as scratch:
        model = tiny_model(Path(scratch), 1000) if args.quick else args.model
        if args.tuft is None:
            rows = beside_a_loop(
                model, Path(scratch), rank=args.rank, rounds=rounds, clock=clock, scale=args.quick * 7 + 1
            )
        else:
            rows = beside_tuft(args.tuft, model, Path(scratch), rank=args.rank, rounds=rounds)
    device = f"cuda ({torch.cuda.get_device_name()})" if torch.cuda.is_available() else "cpu"
    day = datetime.datetime.now(datetime.UTC).date()
    print(f"{day}, {platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}, {rounds} rounds\n")
    print_table(("what", device, "ratio", "goal"), rows)


if __name__ == "__main__":
    main()
