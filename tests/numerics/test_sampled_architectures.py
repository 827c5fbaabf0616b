"""Samples of many architectures, made in company, are those of their own forward: past every window and chunk, where
layers remember states, and where attention is called twice a layer."""

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.engines import CPU
from tests.numerics.architectures import CARRYING, PACKED, PADDED, TURNED
from tests.numerics.bench import Bench, make_request, own_logprobs
from tests.tiny import VOCAB_SIZE
from trainer_service.engine.models.load import load_model
from trainer_service.engine.sampling import generation_loop as generation_loop_module
from trainer_service.engine.sampling import sequences as sequences_module
from trainer_service.engine.sampling.picking import Choice

OTHERWISE: dict[str, str] = {
    **dict.fromkeys(("Jamba", "Mamba", "FalconMamba"), r"together, prompts one by one and whole: .*"),
    **dict.fromkeys(("Falcon", "Mpt"), r"together, a row each: its forward in company fails .*"),
    **dict.fromkeys(
        ("Bloom", "GPTJ", "GPTNeo", "CodeGen", "XGLM"),
        r"together, a row each: it has attention that does not go through transformers' interface",
    ),
    **dict.fromkeys(("RecurrentGemma", "MiniMax", "Rwkv"), r"together, every token computes all before it again: .*"),
    "Phi3, turned": r"together; beyond 16 tokens together, a row each: .*",
    "Llama, turned": r"together; beyond 16 tokens every token computes all before it again: .*",
}
"""What not all samples of are made together, and how it is told."""
STEPS_UNCLAMPED = {"NemotronH", "Zamba2"}
"""transformers bounds their time steps from below in a forward, and not where it takes a single token."""


@pytest.mark.parametrize(
    ("architecture", "max_copied"),
    [
        *((name, 4096) for name in (*PACKED, *CARRYING, *PADDED, *(f"{name}, turned" for name in TURNED))),
        # Samples share their prompt's keys and values to the end.
        *((name, 0) for name in ("DiffLlama", "DeepseekV3", "Qwen3Next", "Zamba2", "Mamba")),
    ],
)
def test_samples_are_those_of_the_forward_whatever_the_architecture(
    folder_of: Callable[..., Path], architecture: str, max_copied: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of 1 to 40 tokens, in pieces; samples that end leave their place to others; some are greedy."""
    monkeypatch.setattr(sequences_module, "_MAX_COPIED", max_copied)
    # Prompts are cut into pieces, as long ones are.
    monkeypatch.setattr(generation_loop_module, "_CPU_PIECE", 6)
    name, _, turned = architecture.partition(", ")
    folder = folder_of(name, turned=True) if turned else folder_of(name)
    near = 5e-4 if architecture in STEPS_UNCLAMPED else 3e-5
    model = load_model(str(folder), folder, CPU)
    bench = Bench.of(model)
    assert re.fullmatch(OTHERWISE.get(architecture, "together"), bench.sampler.decoder.decoding.described)
    rng = random.Random(0)
    lengths = [(1, 12), (40, 9), (7, 3), (9, 14), (17, 20), (3, 6)]
    requests = [
        make_request(
            [rng.randrange(VOCAB_SIZE) for _ in range(length)],
            new,
            num_samples=1 + number % 2,
            choice=Choice(temperature=float(number % 3 > 0)),
            seed=number,
        )
        for number, (length, new) in enumerate(lengths)
    ]
    for request, job in zip(requests, bench.run(*requests), strict=True):
        for sample in job.samples:
            assert len(sample.tokens) == request.max_tokens
            tokens = request.prompt + sample.tokens
            if turned:
                rows = [own_logprobs(model, tokens[:stop])[-1] for stop in range(len(request.prompt), len(tokens))]
                table = torch.stack(rows)
            else:
                table = own_logprobs(model, tokens)[len(request.prompt) - 1 : -1]
            found = table[range(len(table)), sample.tokens]
            torch.testing.assert_close(torch.tensor(sample.logprobs), found, rtol=0, atol=near)
            if not request.choice.temperature:
                torch.testing.assert_close(found, table.max(dim=-1).values, rtol=0, atol=near)
