"""Rows about the mismatch between sampling and training: one token, two logprobs."""

import random
import tempfile
from pathlib import Path

import numpy as np
from gradwire import Datum, ModelInput
from gradwire.codec import batch_from_data
from service import InProcess
from side_by_side import Row

from trainer_service.config import ComputeDtype, EngineSettings
from trainer_service.engine.counters import Counters
from trainer_service.engine.sampling.decoder import Decoder
from trainer_service.engine.sampling.job import Job
from trainer_service.engine.sampling.picking import Choice
from trainer_service.engine.sampling.request import Request
from trainer_service.engine.sampling.samplers import Sampler
from trainer_service.engine.sampling.scheduler import Scheduler


def mismatch(
    model: str, compute_dtype: ComputeDtype, *, num_prompts: int, num_samples: int, max_tokens: int, goal: str = ""
) -> Row:
    """Samples of a run's parameters at temperature 1, and the same tokens through `forward` of that run.

    Args:
        model: Folder.
        compute_dtype: Of both.
        num_prompts: Of 16 to 96 tokens.
        num_samples: Of each.
        max_tokens: Of each sample.
        goal: For the table.
    """
    with tempfile.TemporaryDirectory() as folder:
        engine = InProcess(model, Path(folder), EngineSettings(compute_dtype)).engine
        decoder = Decoder.of(engine.live_model("run"), engine.device)
        rng = random.Random(0)
        lengths = [rng.randrange(16, 97) for _ in range(num_prompts)]
        vocab = engine.model.vocab_size
        prompts = [[rng.randrange(vocab) for _ in range(length)] for length in lengths]
        sampler = Sampler(None, decoder)
        scheduler = Scheduler(engine.device, Counters(), lambda event: None, max_cache_bytes=4 << 30)
        jobs = [
            Job(0, "", _request(prompt, num_samples, max_tokens, seed), sampler, None)
            for seed, prompt in enumerate(prompts)
        ]
        for job in jobs:
            scheduler.start(job)
        while scheduler.busy:
            scheduler.step()
        samples = [(job.request.prompt, sample) for job in jobs for sample in job.samples]
        data = [_datum(prompt + sample.tokens) for prompt, sample in samples]
        answer = engine.forward("run", 1, batch_from_data(data))
    rows = np.split(answer.logprobs_TK, answer.cu_seqlens[1:-1])
    differences = np.concatenate(
        [
            np.abs(own[len(prompt) - 1 :] - np.asarray(sample.logprobs, dtype=np.float32))
            for (prompt, sample), own in zip(samples, rows, strict=True)
        ]
    )
    same = np.mean(differences == 0)
    return Row(
        f"logprobs of {len(differences)} sampled tokens beside `forward`'s, {num_samples} a prompt, {compute_dtype}",
        f"mean {differences.mean():.1e}, {100 * same:.0f} % equal to the last bit",
        f"max {differences.max():.1e}",
        goal,
    )


def _request(prompt: list[int], num_samples: int, max_tokens: int, seed: int) -> Request:
    return Request(
        prompt=prompt,
        num_samples=num_samples,
        max_tokens=max_tokens,
        choice=Choice(),
        seed=seed,
        stop_tokens=frozenset(),
        stop_strings=(),
        prompt_logprobs=False,
        topk=0,
        with_text=False,
    )


def _datum(tokens: list[int]) -> Datum:
    weights = np.ones(len(tokens) - 1, dtype=np.float32)
    return Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": np.array(tokens[1:]), "weights": weights})
