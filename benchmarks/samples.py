"""Samples as the worker makes them: requests through the scheduler, without gRPC."""

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
    scheduler = Scheduler(sampler.decoder.device, Counters(), lambda event: None, max_cache_bytes=4 << 30)
    jobs: list[Job] = []
    for seed, prompt in enumerate(prompts):
        request = Request(
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
        jobs.append(Job(0, "", request, sampler))
        scheduler.start(jobs[-1])
    while scheduler.busy:
        scheduler.step()
    return jobs
