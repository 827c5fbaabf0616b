"""Models that are not plain transformers: a hybrid, a mixture of experts, latent attention, of 30M parameters each.

    python benchmarks/models.py                   random parameters, about three minutes on two cores
    python benchmarks/models.py --rounds 5        medians over more rounds
    python benchmarks/models.py --models hybrid   one of them: hybrid, experts or latent
    python benchmarks/models.py --quick           tiny models: that it runs, not how fast

A ragged batch's forward_backward as the engine makes it, one sequence at a time, and in a plain Hugging Face loop that
pads all to the longest. 16 requests sampled at once, and one after the other as whoever decodes by themselves does.
"""

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

import samples
import torch
import transformers
from padded import PaddedLoop
from service import InProcess, make_data
from side_by_side import Row, interleave, print_table, ratio

from trainer_service.engine.sampling.decoder import Decoder
from trainer_service.engine.sampling.picking import Choice
from trainer_service.engine.sampling.samplers import Sampler
from trainer_service.engine.sampling.service import Sampling
from trainer_service.worker_config import EngineSettings

_LINEAR = {
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 48,
    "linear_value_head_dim": 48,
}
_HYBRID = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "hybrid (Qwen3.5)": ("Qwen3_5TextConfig", {**_LINEAR, "head_dim": 48, "layer_types": _HYBRID * 2}),
    "experts (Qwen3-MoE)": (
        "Qwen3MoeConfig",
        {"head_dim": 48, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 320},
    ),
    "latent attention (DeepSeek V3)": (
        "DeepseekV3Config",
        {
            "first_k_dense_replace": 8,
            "num_key_value_heads": 8,
            "q_lora_rank": 192,
            "kv_lora_rank": 128,
            "qk_nope_head_dim": 48,
            "qk_rope_head_dim": 16,
            "v_head_dim": 48,
        },
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="tiny models, and little to do")
    names = [name.partition(" ")[0] for name in MODELS]
    parser.add_argument("--models", nargs="+", choices=names, default=names, help="these alone")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rows: list[Row] = []
    for name in [name for name in MODELS if name.partition(" ")[0] in arguments.models]:
        with tempfile.TemporaryDirectory() as scratch:
            folder = _make(name, Path(scratch) / "model", quick=arguments.quick)
            rows += _training(name, folder, arguments) + _sampling(name, folder, arguments)
    print(f"cpu or {torch.cuda.is_available()=}, {torch.get_num_threads()} threads, {arguments.rounds} rounds\n")
    print_table(("what", "measured", "ratio", "goal"), rows)


def _make(name: str, folder: Path, *, quick: bool) -> Path:
    config_class, settings = MODELS[name]
    config = getattr(transformers, config_class)(
        vocab_size=512 if quick else 8192,
        hidden_size=32 if quick else 384,
        intermediate_size=64 if quick else 1536,
        num_hidden_layers=8,
        max_position_embeddings=512,
        num_attention_heads=8,
        **{"num_key_value_heads": 4, **settings},
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def _training(name: str, folder: Path, arguments: argparse.Namespace) -> list[Row]:
    engine = InProcess(str(folder), folder, EngineSettings(compute_dtype="float32"))
    single = InProcess(str(folder), folder, EngineSettings(compute_dtype="float32", max_pack_tokens=1))
    loop = PaddedLoop(str(folder), dtype=torch.float32)
    rng = random.Random(0)
    lengths = [int(min(96, rng.lognormvariate(3.0, 0.8) + 2)) for _ in range(6 if arguments.quick else 32)]
    data = make_data(engine.engine.model.vocab_size, lengths)
    times = interleave(
        {
            "engine": lambda: engine.forward_backward(data),
            "single": lambda: single.forward_backward(data),
            "loop": lambda: loop.forward_backward(data),
        },
        rounds=1 if arguments.quick else arguments.rounds,
    )
    tokens = sum(lengths)
    million = engine.engine.model.num_parameters / 1e6

    def row(what: str, other: str, goal: str) -> Row:
        rates = [tokens / sorted(times[side])[len(times[side]) // 2] for side in ("engine", other)]
        return Row(
            f"{name}, {million:.0f}M: {tokens} tokens in {len(lengths)} sequences over {what}",
            f"{rates[0]:.0f} / {rates[1]:.0f} tokens/s",
            f"{ratio(times[other], times['engine']):.2f}",
            goal,
        )

    padded = len(lengths) * max(lengths)
    return [
        row("one sequence at a time", "single", "at least 2.5"),
        row(f"a plain loop of {padded} padded", "loop", "at least 1.3"),
    ]


def _sampling(name: str, folder: Path, arguments: argparse.Namespace) -> list[Row]:
    inner = InProcess(str(folder), folder, EngineSettings(compute_dtype="float32")).engine
    sampling = Sampling(inner, checkpoint_dir=folder, send=lambda event: None)
    sampler = Sampler(None, Decoder(inner.base_model(), inner.device, sampling.decoding))
    rng = random.Random(0)
    prompts = [[rng.randrange(2, 512) for _ in range(rng.randrange(8, 33))] for _ in range(16)]
    alone = prompts[:1] if arguments.quick else prompts[:3]
    max_tokens = 3 if arguments.quick else 32

    def sample(prompts: list[list[int]]) -> None:
        samples.generate(sampler, prompts, num_samples=1, max_tokens=max_tokens, choice=Choice())

    times = interleave(
        {"company": lambda: sample(prompts), "alone": lambda: [sample([prompt]) for prompt in alone]},
        rounds=1 if arguments.quick else arguments.rounds,
    )
    company = [seconds / len(prompts) for seconds in times["company"]]
    single = [seconds / len(alone) for seconds in times["alone"]]
    rates = [max_tokens / sorted(side)[len(side) // 2] for side in (company, single)]
    return [
        Row(
            f"{name}: {len(prompts)} requests of {max_tokens} tokens, {sampling.decoding.described}, over one by one",
            f"{rates[0]:.0f} / {rates[1]:.0f} tokens/s",
            f"{ratio(single, company):.2f}",
            "at least 4",
        )
    ]


if __name__ == "__main__":
    main()
