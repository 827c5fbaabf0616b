"""What two ranks cost that divide experts among them, beside two that gather them. Prints one table.

    python benchmarks/expert_parallel.py [--rounds 5] [--tokens 1024]

A random Qwen3-MoE of 56M parameters, 50M of them in 64 experts a layer, of which a token asks 8. Trainers of both kinds
run at the same time and take turns; a ratio is the median of the rounds' own. Bytes between the ranks are what the
loopback interface carried in the step, on a machine where little else uses it.
"""

import argparse
import contextlib
import datetime
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

# Before torch is imported.
from ranks import Side, loopback_bytes  # isort: skip

import torch
from service import built_in, make_data
from side_by_side import Row, interleave, print_table
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

LAYERS, HIDDEN, CHOSEN = 4, 256, 8


def make_model(folder: Path) -> int:
    """Saves the model. Returns the size of its vocabulary."""
    sizes: dict[str, Any] = {
        "vocab_size": 4096,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_experts": 64,
        "num_experts_per_tok": CHOSEN,
        "moe_intermediate_size": 256,
    }
    config = Qwen3MoeConfig(**sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return config.vocab_size


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=1024, help="of a step, in sequences of an eighth of them")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        data = make_data(make_model(Path(name, "model")), [args.tokens // 8] * 8)
        model = str(Path(name, "model"))
        sides = {
            "divided": Side.start(stack, model, Path(name, "divided"), 2, "--ep-size", "2"),
            "gathered": Side.start(stack, model, Path(name, "gathered"), 2),
        }
        for side in sides.values():
            built_in(side.client, data)
            side.forget_peak()
        steps = {name: (lambda side=side: built_in(side.client, data)) for name, side in sides.items()}
        times = interleave(steps, rounds=args.rounds)
        peaks = [side.memory("VmHWM") for side in sides.values()]
        carried: list[float] = []
        for step in steps.values():
            before = loopback_bytes()
            step()
            carried.append((loopback_bytes() - before) / 1e6)
    speed = statistics.median(o / t for o, t in zip(times["gathered"], times["divided"], strict=True))
    # A row of each pair whose expert is elsewhere, as half of them are, there and back, in forward and backward.
    rows = 4 * LAYERS * args.tokens * CHOSEN // 2 * HIDDEN * 4 / 1e6
    print(f"{datetime.datetime.now(datetime.UTC).date()}, {os.cpu_count()} CPUs, {args.tokens} tokens a step\n")
    tokens = [args.tokens / statistics.median(times[name]) for name in sides]
    print_table(
        ("what", "experts divided, gathered", "ratio", "goal"),
        [
            Row("tokens/s", f"{tokens[0]:.0f}, {tokens[1]:.0f}", f"{speed:.2f}"),
            Row(
                f"MB between the ranks a step ({rows:.0f} of the first are rows)",
                f"{carried[0]:.0f}, {carried[1]:.0f}",
                f"{carried[0] / carried[1]:.2f}",
            ),
            Row(
                "the most of a rank's process in a step, MiB",
                f"{peaks[0]:.0f}, {peaks[1]:.0f}",
                f"{peaks[0] / peaks[1]:.2f}",
            ),
        ],
    )


if __name__ == "__main__":
    main()
