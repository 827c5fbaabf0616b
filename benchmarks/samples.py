"""Samples as the worker makes them: requests through the scheduler, without gRPC."""

import time
from collections.abc import Sequence

from trainer_service.engine.counters import Counters
from trainer_service.engine.sampling.job import Job
from trainer_service.engine.sampling.picking import Choice
from trainer_service.engine.sampling.request import Request
from trainer_service.engine.sampling.samplers import Sampler
from trainer_service.engine.sampling.scheduler import Scheduler


def generate(
    sampler: Sampler, prompts: Sequence[list[int]], *, num_samples: int, max_tokens: int, choice: Choice
) -> list[Job]:
    """All requests at once, to their end; each prompt's place is its seed."""
    scheduler = _scheduler(sampler)
    jobs = [
        Job(0, "", _request(prompt, seed, num_samples, max_tokens, choice), sampler)
        for seed, prompt in enumerate(prompts)
    ]
    for job in jobs:
        scheduler.start(job)
    while scheduler.busy:
        scheduler.step()
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
    scheduler = _scheduler(sampler)
    for seed, other in enumerate(behind):
        scheduler.start(Job(0, str(seed), _request(other, seed, num_samples, max_tokens, Choice()), sampler, "many"))
    for _ in range(12 if behind else 0):
        scheduler.step()
    job = Job(0, "", _request(prompt, 0, 1, 2, Choice()), sampler, "one")
    started_s = time.monotonic()
    scheduler.start(job)
    while not job.samples[0].tokens:
        scheduler.step()
    waited_s = time.monotonic() - started_s
    for seed in range(len(behind)):
        scheduler.cancel(str(seed))
    return waited_s


def _scheduler(sampler: Sampler) -> Scheduler:
    return Scheduler(sampler.decoder.device, Counters(), lambda event: None, max_cache_bytes=4 << 30)


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
