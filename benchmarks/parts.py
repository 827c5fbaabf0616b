"""Rows about single parts of the engine: shared beginnings, the optimizer."""

from dataclasses import replace

import numpy as np
import torch
from gradwire import Datum, ModelInput
from service import ADAM, InProcess
from side_by_side import Row, Setting, interleave, ms, ratio

from trainer_service.engine.optim import AdamW
from trainer_service.worker_config import EngineSettings

GROUP, PROMPT, COMPLETION = 8, 128, 32


def group(vocab: int, prompt: int, completion: int, *, shared: bool) -> list[Datum]:
    """GROUP completions, scored, of one prompt; or of as many different ones, which have nothing to share."""
    rng = np.random.default_rng(0)
    beginning = rng.integers(0, vocab, prompt)
    data = []
    for _ in range(GROUP):
        first = beginning if shared else rng.integers(0, vocab, prompt)
        tokens = np.concatenate([first, rng.integers(0, vocab, completion + 1)])
        weights = np.concatenate([np.zeros(prompt - 1), np.ones(completion + 1)]).astype(np.float32)
        data.append(Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:], "weights": weights}))
    return data


def shared_beginnings(setting: Setting) -> list[Row]:
    """A prompt of G completions is computed once."""
    one, other = (InProcess(setting.model, setting.folder, EngineSettings("float32")) for _ in range(2))
    prompt, completion = setting.pick(PROMPT, 24), setting.pick(COMPLETION, 8)
    vocab = one.engine.model.vocab_size
    data, different = (group(vocab, prompt, completion, shared=shared) for shared in (True, False))
    one.forward_backward(data)
    for datum in data:
        other.forward_backward([datum])
    pairs = list(zip(one.gradients(), other.gradients(), strict=True))
    norms = [torch.stack(each).norm() for each in zip(*(((a - b).norm(), b.norm()) for a, b in pairs), strict=True)]
    sides = {"shared": lambda: one.forward_backward(data), "plain": lambda: one.forward_backward(different)}
    times = interleave(sides, rounds=setting.rounds)
    tokens = GROUP * (prompt + completion) / (prompt + GROUP * completion)
    faster = ratio(times["plain"], times["shared"])
    return [
        Row(
            f"shared prompt of {prompt}, G = {GROUP} completions of {completion}, over plain packing",
            f"{ms(times['plain'])} / {ms(times['shared'])} = {faster:.2f} of {tokens:.2f} times the tokens",
            f"{faster / tokens:.2f}",
            "at least 0.85",
        ),
        Row("the same, gradients beside those of each datum alone", f"{norms[0] / norms[1]:.1e}", "", "within 1e-5"),
    ]


def optimizer(setting: Setting) -> list[Row]:
    """Clipping, normalisation and the step, over torch's fused AdamW alone."""
    engine = InProcess(setting.model, setting.folder)
    parameters = list(engine.engine._run("run").model.parameters())
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    ours, alone = AdamW(parameters), torch.optim.AdamW(parameters, lr=1e-6, fused=True)
    clipped = replace(ADAM, grad_clip_norm=1.0)
    sides = {"ours": lambda: ours.step(clipped, divisor=2.0), "fused AdamW": alone.step}
    times = interleave(sides, rounds=3 * setting.rounds, warmup=2)
    return [
        Row(
            "optimizer step (norm, normalisation, clipping, AdamW) over torch's fused AdamW alone",
            f"{ms(times['ours'])} / {ms(times['fused AdamW'])}",
            f"{ratio(times['ours'], times['fused AdamW']):.3f}",
            "at most 1.1",
        )
    ]
