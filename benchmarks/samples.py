"""Samples as the worker makes them: requests through the generation loop, without gRPC."""

import time
from collections.abc import Sequence

from trainer_service.engine.counters import Counters
from trainer_service.engine.sampling.generation_loop import GenerationLoop
from trainer_service.engine.sampling.job import Job
from trainer_service.engine.sampling.picking import Choice
from trainer_service.engine.sampling.request import Request
from trainer_service.engine.sampling.samplers import Sampler


def generate(
    sampler: Sampler, prompts: Sequence[list[int]], *, num_samples: int, max_tokens: int, choice: Choice
) -> list[Job]:
    """All requests at once, to their end; each prompt's place is its seed."""
    generation = _generation(sampler)
    jobs = [
        Job(0, "", _request(prompt, seed, num_samples, max_tokens, choice), sampler)
        for seed, prompt in enumerate(prompts)
    ]
    for job in jobs:
        generation.start(job)
    while generation.busy:
        generation.step()
    return jobs


def first_token_s(
    sampler: Sampler, prompt: list[int], behind: Sequence[list[int]], *, num_samples: int, max_tokens: int
) -> float:
    """How long one owner's request waits for its first token behind another owner's.

    Args:
        sampler: Of both.
        prompt: The one's.
        behind: The other's prompts; some of them decode already.
        num_samples: Of each of the other's.
        max_tokens: Of each of its samples; they are given up when the first token came.
    """
    generation = _generation(sampler)
    for seed, other in enumerate(behind):
        generation.start(Job(0, str(seed), _request(other, seed, num_samples, max_tokens, Choice()), sampler, "many"))
    for _ in range(12 if behind else 0):
        generation.step()
    job = Job(0, "", _request(prompt, 0, 1, 2, Choice()), sampler, "one")
    started_s = time.monotonic()
    generation.start(job)
    while not job.samples[0].tokens:
        generation.step()
    waited_s = time.monotonic() - started_s
    # The sampler is used again, by another loop.
    for name in ("", *map(str, range(len(behind)))):
        generation.cancel(name)
    return waited_s


def _generation(sampler: Sampler) -> GenerationLoop:
    return GenerationLoop(sampler.decoder.device, Counters(), lambda event: None, max_cache_bytes=4 << 30)


def _request(prompt: list[int], seed: int, num_samples: int, max_tokens: int, choice: Choice) -> Request:
    return Request(
        prompt=prompt,
        num_samples=num_samples,
        max_tokens=max_tokens,
        choice=choice,
        seed=seed,
        stop_tokens=frozenset(),
        stop_strings=None,
        prompt_logprobs=False,
        topk=0,
        with_text=False,
        text=None,
    )
