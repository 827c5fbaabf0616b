"""Sampled tokens a second, beside transformers.generate on the same model in the same process.

    python benchmarks/sampling.py                SmolLM2-135M-Instruct, about two minutes on two cores
    python benchmarks/sampling.py --rounds 5     medians over more rounds
    python benchmarks/sampling.py --quick        a tiny model: that it runs, not how fast

Greedy on both sides, no end-of-sequence token, the same prompts of 16 to 96 tokens, the same parameters in the same
dtype. Ours is what the worker runs: requests through the generation loop, logprobs included, without gRPC.
"""

import argparse
import copy
import random
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import samples
import torch
from sampled_logprobs import mismatch
from service import tiny_model
from side_by_side import Row, interleave, print_table, ratio

from trainer_service.engine.device import pick_device, set_num_threads
from trainer_service.engine.fused.install import fuse
from trainer_service.engine.models.load import load_model
from trainer_service.engine.sampling.decoder import Decoder
from trainer_service.engine.sampling.job import Job
from trainer_service.engine.sampling.picking import Choice
from trainer_service.engine.sampling.samplers import Sampler
from trainer_service.engine.sampling.trial import find_decoding
from trainer_service.model_folder import fetch

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-model", default=str(ROOT / "models" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--alone", type=int, default=2, help="of the requests, those also run one by one")
    parser.add_argument("--groups", type=int, default=8, help="prompts that eight samples each are asked of")
    parser.add_argument("--long-requests", type=int, default=64, help="of one owner, which another's must not wait for")
    parser.add_argument("--quick", action="store_true", help="a tiny model, and little to do")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.quick:
            arguments.base_model = tiny_model(Path(scratch), 1000)
            arguments.rounds, arguments.requests, arguments.max_tokens, arguments.alone = 1, 3, 4, 1
            arguments.groups, arguments.long_requests = 2, 4
        _measure(arguments)


def _measure(arguments: argparse.Namespace) -> None:
    set_num_threads()
    device = pick_device()
    model: Any = load_model(arguments.base_model, fetch(arguments.base_model), device)
    vocab_size = model.config.vocab_size
    model.generation_config.update(eos_token_id=None, pad_token_id=0, do_sample=False)
    attention = str(model.config._attn_implementation)
    # As the worker has it.
    ours_model = copy.deepcopy(model)
    fuse(ours_model)
    decoding = find_decoding(
        ours_model, device, attention=attention, max_context_length=model.config.max_position_embeddings
    )
    sampler = Sampler(None, Decoder(ours_model, device, decoding))
    rng = random.Random(0)
    prompts = [_tokens(rng, rng.randrange(16, 97), vocab_size) for _ in range(arguments.requests)]
    shared = _tokens(rng, 256, vocab_size)
    separate = [_tokens(rng, 256, vocab_size) for _ in range(8)]
    groups = [_tokens(rng, 96, vocab_size) for _ in range(arguments.groups)]
    many = [_tokens(rng, 24, vocab_size) for _ in range(arguments.long_requests)]
    max_tokens, alone = arguments.max_tokens, prompts[: arguments.alone]

    def ours(prompts: Sequence[list[int]], *, num_samples: int = 1, max_tokens: int = max_tokens) -> list[Job]:
        return samples.generate(
            sampler, prompts, num_samples=num_samples, max_tokens=max_tokens, choice=Choice(temperature=0.0)
        )

    def generate(prompts: Sequence[list[int]]) -> torch.Tensor:
        longest = max(map(len, prompts))
        rows = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.no_grad(), device.autocast():
            return model.generate(
                rows.to(device.torch_device), attention_mask=mask.to(device.torch_device), max_new_tokens=max_tokens
            )

    own_tokens = [job.samples[0].tokens for job in ours(alone)]
    assert own_tokens == [generate([prompt])[0, len(prompt) :].tolist() for prompt in alone], "other tokens"
    times = interleave(
        {
            "ours": lambda: ours(prompts),
            "batch": lambda: generate(prompts),
            "alone": lambda: [generate([prompt]) for prompt in alone],
            "shared": lambda: ours([shared], num_samples=8, max_tokens=1),
            "separate": lambda: ours(separate, max_tokens=1),
            "merged": lambda: ours(groups, num_samples=8, max_tokens=5),
            "equal": lambda: ours([prompt for prompt in groups for _ in range(8)], max_tokens=5),
        },
        rounds=arguments.rounds,
        warmup=1,
    )
    first_s = [
        samples.first_token_s(sampler, prompts[0], behind, num_samples=4, max_tokens=256) for behind in ([], [], many)
    ][1:]
    count = len(prompts) * max_tokens
    alone_per_token = [seconds / (len(alone) * max_tokens) for seconds in times["alone"]]
    ours_per_token = [seconds / count for seconds in times["ours"]]
    rows = [
        Row(
            f"{len(prompts)} requests at once over transformers.generate one by one",
            f"{_rate(ours_per_token)} / {_rate(alone_per_token)} tokens/s",
            f"{ratio(alone_per_token, ours_per_token):.2f}",
            "at least 4",
        ),
        Row(
            "the same over transformers.generate on the padded batch",
            f"{_rate(ours_per_token)} / {_rate([seconds / count for seconds in times['batch']])} tokens/s",
            f"{ratio(times['batch'], times['ours']):.2f}",
            "at least 1.3",
        ),
        Row(
            "prefill of 256 tokens, 8 samples of one prompt over 8 prompts",
            f"{1000 * statistics.median(times['shared']):.0f} / {1000 * statistics.median(times['separate']):.0f} ms",
            f"{ratio(times['separate'], times['shared']):.2f}",
            "at least 5",
        ),
    ]
    rows += [
        Row(
            f"{8 * len(groups)} requests of {len(groups)} prompts over {len(groups)} requests of 8 samples each",
            f"{1000 * statistics.median(times['equal']):.0f} / {1000 * statistics.median(times['merged']):.0f} ms",
            f"{ratio(times['equal'], times['merged']):.2f}",
            "at most 1.2",
        ),
        Row(
            f"first token behind another owner's {4 * len(many)} samples of 256 tokens, over alone",
            f"{1000 * first_s[1]:.0f} / {1000 * first_s[0]:.0f} ms",
            f"{first_s[1] / first_s[0]:.2f}",
            "within 1 s, tiny model",
        ),
    ]
    model_path, num_prompts = arguments.base_model, arguments.requests
    rows += [
        mismatch(model_path, "float32", num_prompts=num_prompts, num_samples=1, max_tokens=max_tokens, goal="1e-6"),
        mismatch(model_path, "float32", num_prompts=2, num_samples=8, max_tokens=max_tokens, goal="1e-6"),
        mismatch(model_path, "bfloat16", num_prompts=num_prompts, num_samples=1, max_tokens=max_tokens, goal="1e-6"),
    ]
    print(
        f"{model.config.architectures}, {device.name}, {torch.get_num_threads()} threads, {arguments.rounds} rounds\n"
    )
    print_table(("what", "measured", "ratio", "goal"), rows)


def _tokens(rng: random.Random, count: int, vocab_size: int) -> list[int]:
    return [rng.randrange(vocab_size // 48, vocab_size * 5 // 6) for _ in range(count)]


def _rate(seconds_per_token: list[float]) -> str:
    return f"{1 / statistics.median(seconds_per_token):.0f}"


if __name__ == "__main__":
    main()
