"""Rows about the mismatch between sampling and training: one token, two logprobs."""

import random
import tempfile
from pathlib import Path

import numpy as np
import samples
from gradwire import datum_from_tokens_weights
from gradwire._wire.codec import batch_from_data
from service import InProcess
from side_by_side import Row

from trainer_service.engine.sampling.decoder import Decoder
from trainer_service.engine.sampling.picking import Choice
from trainer_service.engine.sampling.samplers import Sampler
from trainer_service.engine.sampling.trial import find_decoding
from trainer_service.worker_config import ComputeDtype, EngineSettings


def mismatch(
    model: str, compute_dtype: ComputeDtype, *, num_prompts: int, num_samples: int, max_tokens: int, goal: str = ""
) -> Row:
    """Samples of a run's parameters at temperature 1, and the same tokens through `forward` of that run.

    Args:
        model: Folder of the model.
        compute_dtype: Dtype of matrix products on both sides.
        num_prompts: How many prompts, of 16 to 96 tokens.
        num_samples: Samples of each prompt.
        max_tokens: Tokens of each sample.
        goal: The goal, for the table.
    """
    with tempfile.TemporaryDirectory() as folder:
        engine = InProcess(model, Path(folder), EngineSettings(compute_dtype)).engine
        decoding = find_decoding(
            engine.live_model("run"),
            engine.device,
            attention=engine.traits.attention,
            max_context_length=engine.model.max_context_length,
        )
        decoder = Decoder(engine.live_model("run"), engine.device, decoding)
        rng = random.Random(0)
        lengths = [rng.randrange(16, 97) for _ in range(num_prompts)]
        vocab = engine.model.vocab_size
        prompts = [[rng.randrange(vocab) for _ in range(length)] for length in lengths]
        sampler = Sampler(None, decoder)
        jobs = samples.generate(sampler, prompts, num_samples=num_samples, max_tokens=max_tokens, choice=Choice())
        made = [(job.request.prompt, sample) for job in jobs for sample in job.samples]
        sequences = [prompt + sample.tokens for prompt, sample in made]
        data = [datum_from_tokens_weights(tokens, np.ones(len(tokens))) for tokens in sequences]
        answer = engine.forward("run", 1, engine.stage(batch_from_data(data)))
    rows = np.split(answer.logprobs_TK, answer.cu_seqlens[1:-1])
    differences = np.concatenate(
        [
            np.abs(own[len(prompt) - 1 :] - np.asarray(sample.logprobs, dtype=np.float32))
            for (prompt, sample), own in zip(made, rows, strict=True)
        ]
    )
    same = np.mean(differences == 0)
    return Row(
        f"logprobs of {len(differences)} sampled tokens beside `forward`'s, {num_samples} a prompt, {compute_dtype}",
        f"mean {differences.mean():.1e}, {100 * same:.0f} % equal to the last bit",
        f"max {differences.max():.1e}",
        goal,
    )
