"""Rows about memory, each side measured in a process of its own: `python memory.py SIDE [ARGUMENTS]` prints bytes."""

import gc
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from side_by_side import Row, Setting
from torch.profiler import ProfilerActivity, profile

from trainer_service.worker_config import EngineSettings

VOCAB_SIZE = 150_000
HIDDEN_SIZE = 64


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that tensors took in `work` beside those there before it: what torch allocates, on either device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with tempfile.NamedTemporaryFile(suffix=".json") as trace:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            work()
        profiler.export_chrome_trace(trace.name)
        events = json.loads(Path(trace.name).read_text())["traceEvents"]
    steps = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    return max(0, *itertools.accumulate(size for _, size in steps))


def measure_padded(model: str, scale: int) -> int:
    """A pass of the padded loop, with gradients already there."""
    from padded import PaddedLoop

    loop = PaddedLoop(model, dtype=torch.float32)
    vocab = loop.model.config.vocab_size
    loop.forward_backward(_data(vocab, 8))
    return peak_bytes(lambda: loop.forward_backward(_data(vocab, scale)))


def measure_engine(model: str, checkpointing: str, max_pack_tokens: int, scale: int) -> int:
    """A pass of the engine, with gradients already there."""
    from service import InProcess

    with tempfile.TemporaryDirectory() as folder:
        settings = EngineSettings("float32", max_pack_tokens, activation_checkpointing=checkpointing)  # pyright: ignore[reportArgumentType]
        engine = InProcess(model, Path(folder), settings)
        vocab = engine.engine.model.vocab_size
        engine.forward_backward(_data(vocab, 8))
        return peak_bytes(lambda: engine.forward_backward(_data(vocab, scale)))


def measure_head(num_tokens: int) -> int:
    """Logprobs of a wide vocabulary and their backward, beside hidden states, head and their gradients."""
    from trainer_service.engine.packed.logprobs import Head, linear_logprobs

    hidden = torch.randn(num_tokens, HIDDEN_SIZE, requires_grad=True)
    weight = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, requires_grad=True)
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    targets = torch.randint(VOCAB_SIZE, (num_tokens,))
    return peak_bytes(lambda: linear_logprobs(hidden, Head(weight), targets).sum().backward())


def measure(side: str, *arguments: str) -> int:
    """Runs one side, by its name."""
    if side == "padded":
        return measure_padded(arguments[0], int(arguments[1]))
    if side == "engine":
        return measure_engine(arguments[0], arguments[1], int(arguments[2]), int(arguments[3]))
    return measure_head(int(arguments[0]))


def _data(vocab: int, scale: int) -> list:
    from padded import RAGGED
    from service import make_data

    return make_data(vocab, [max(1, length // scale) for length in RAGGED])


def _measured(setting: Setting, *arguments: object) -> int:
    if setting.quick:
        return measure(*map(str, arguments))
    command = [sys.executable, __file__, *map(str, arguments)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.0f} MiB"


def over_weights_and_gradients(setting: Setting) -> list[Row]:
    """Peak of one pass, padded loop over engine."""
    scale = setting.pick(1, 8)
    padded = _measured(setting, "padded", setting.model, scale)
    rows: list[Row] = []
    for checkpointing, pack_tokens, goal, what in (
        ("off", 0, 4, ""),
        ("off", setting.pick(256, 32), 4, ", --max-pack-tokens 256"),
        ("on", 0, 30, ", activation checkpointing on"),
    ):
        engine = _measured(setting, "engine", setting.model, checkpointing, pack_tokens, scale)
        rows.append(
            Row(
                f"peak memory above weights and gradients, padded loop over engine, float32{what}",
                f"{_mib(padded)} / {_mib(engine)}",
                f"{padded / max(1, engine):.1f}",
                f"at least {goal}",
            )
        )
    return rows


def head(setting: Setting) -> list[Row]:
    """The head's memory does not grow with tokens."""
    few, many = setting.pick(1024, 8), setting.pick(16384, 64)
    sizes = [_measured(setting, "head", tokens) for tokens in (few, many)]
    return [
        Row(
            f"peak memory of the head at vocabulary {VOCAB_SIZE // 1000}k, {many} tokens over {few}",
            f"{_mib(sizes[1])} / {_mib(sizes[0])}; all logits would be {_mib(many * VOCAB_SIZE * 4)}",
            f"{sizes[1] / max(1, sizes[0]):.2f}",
            "flat",
        )
    ]


if __name__ == "__main__":
    print(measure(*sys.argv[1:]))
