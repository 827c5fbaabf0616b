"""What rl_arithmetic.py, dpo.py and distill.py share: sums of two-digit numbers, and a tiny model to learn them.

A sum is six tokens, "3 4 + 5 8 =", and the answer's three digits, the last digit first: 34 + 58 = 092 is written 290. A
model of half a million parameters learns that in a minute or two.
"""

import argparse
import contextlib
import os
import random
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import gradwire

PLUS, EQUALS, VOCAB_SIZE = 10, 11, 16
NUM_ANSWER_TOKENS = 3
Problem = tuple[int, int]


def split_problems(*, held_out: int) -> tuple[list[Problem], list[Problem]]:
    """Of all ten thousand sums nine thousand to train on, and some of the others, which are never shown."""
    problems = [(a, b) for a in range(100) for b in range(100)]
    random.Random(0).shuffle(problems)  # noqa: S311  (an order, not a secret)
    return problems[1000:], problems[:1000][:held_out]


def prompt(problem: Problem) -> list[int]:
    """Tokens up to the equals sign."""
    a, b = problem
    return [a // 10, a % 10, PLUS, b // 10, b % 10, EQUALS]


def answer(problem: Problem) -> list[int]:
    """The right answer's tokens, last digit first."""
    total = sum(problem)
    return [total % 10, total // 10 % 10, total // 100]


def datum(problem: Problem, tokens: list[int]) -> gradwire.Datum:
    """A sum and an answer to it, right or wrong; the loss is on the answer."""
    question = prompt(problem)
    weights = [0.0] * len(question) + [1.0] * len(tokens)
    return gradwire.datum_from_tokens_weights([*question, *tokens], weights)


def accuracy(sampler: gradwire.SamplingClient, problems: list[Problem]) -> float:
    """How many sums the likeliest answer gets right."""
    greedy = gradwire.SamplingParams(max_tokens=NUM_ANSWER_TOKENS, temperature=0, stop=[])
    futures = [sampler.sample(prompt(problem), 1, greedy) for problem in problems]
    answers = [future.result().sequences[0].tokens for future in futures]
    return sum(found == answer(problem) for found, problem in zip(answers, problems, strict=True)) / len(problems)


def supervised(
    client: gradwire.TrainingClient,
    problems: list[Problem],
    *,
    steps: int,
    batch_size: int = 64,
    write: Callable[[Problem], list[int]] = answer,
) -> None:
    """Trains on answers as `write` gives them."""
    rng = random.Random(1)  # noqa: S311
    for step in range(steps):
        batch = [datum(problem, write(problem)) for problem in rng.sample(problems, batch_size)]
        client.forward_backward(batch, "cross_entropy")
        rate = 2e-3 * min(1.0, (step + 1) / 20)
        client.optim_step(
            gradwire.AdamParams(rate, grad_clip_norm=1.0), grad_accumulation_normalization="num_loss_tokens"
        )
    client.zero_grad().result()  # This waits for all the steps before it.


def parser(description: str | None, *, steps: int, plot: str) -> argparse.ArgumentParser:
    """The arguments that the three take from the command line."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--base-url", help="a running trainer over a model of make_model; without it one is started here")
    made.add_argument("--steps", type=int, default=steps)
    made.add_argument("--supervised-steps", type=int, default=300, help="on right answers, before")
    made.add_argument("--held-out", type=int, default=500, help="sums never trained on, at most 1000")
    made.add_argument("--plot", type=Path, default=Path(plot))
    return made


def make_model(folder: str) -> None:
    """Writes a random model of four layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=32,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


@contextlib.contextmanager
def tiny_service(base_url: str | None) -> Iterator[gradwire.ServiceClient]:
    """A trainer on this machine over such a model, stopped at the end; or one that serves it already."""
    api_key = None
    try:
        with contextlib.ExitStack() as stack:
            if not base_url:
                os.environ.setdefault("OMP_NUM_THREADS", "1")  # More only get in each other's way.
                api_key = secrets.token_hex(16)
                folder = stack.enter_context(tempfile.TemporaryDirectory())
                make_model(folder)
                jobs = stack.enter_context(gradwire.TrainerJobManager(api_key))
                base_url = jobs.create_and_wait(gradwire.TrainerJobConfig(folder, display_name="sums")).base_url
            yield stack.enter_context(gradwire.ServiceClient(base_url, api_key))
    except KeyboardInterrupt:
        print("Interrupted; the trainer was stopped if this script started it.", file=sys.stderr)
        sys.exit(130)


def save_plot(path: Path, title: str, curves: dict[str, list[tuple[float, float]]], *, ylabel: str) -> None:
    """Draws curves of (step, value) into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for label, points in curves.items():
        axes.plot(*zip(*points, strict=True), "o-" if len(points) < 30 else "-", label=label, markersize=4)
    axes.set(xlabel="step", ylabel=ylabel, title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(f"Plot: {path}")
