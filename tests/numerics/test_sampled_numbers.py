"""Sampling against transformers.generate and the trainer's own forward, over architectures that differ."""

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from tests.engines import CPU
from tests.numerics.plain import FACTOR, ROUNDING
from trainer_service.engine.counters import Counters
from trainer_service.engine.device import Device
from trainer_service.engine.sampling import decoder as decoder_module
from trainer_service.engine.sampling import scheduler as scheduler_module
from trainer_service.engine.sampling.decoder import Decoder
from trainer_service.engine.sampling.job import Job
from trainer_service.engine.sampling.picking import Choice
from trainer_service.engine.sampling.request import Request
from trainer_service.engine.sampling.samplers import Sampler
from trainer_service.engine.sampling.scheduler import Scheduler

VOCAB_SIZE = 96
SIZES: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON: dict[str, Any] = SIZES | {"max_position_embeddings": 96, "initializer_range": 0.3}
HEADS: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**COMMON, **HEADS),
    "qwen3": Qwen3Config(**COMMON, **HEADS),
    "gpt_neox": GPTNeoXConfig(**COMMON, intermediate_size=64),
    "gpt2": GPT2Config(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=96, initializer_range=0.3),
    "mistral, whose layers see 8 tokens": MistralConfig(**COMMON, **HEADS, sliding_window=8),
    "gemma2, softcapped, one layer of 8 tokens": Gemma2Config(**COMMON, **HEADS, sliding_window=8),
    "mamba, which has no keys": MambaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.3
    ),
}
ALONE = {"mamba, which has no keys"}
PROMPTS = ([5, 17, 3, 88, 41, 9, 60], [7], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25], [2, 90])


def make_model(name: str, seed: int = 0) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    model.generation_config.pad_token_id = 0
    return model


def make_request(prompt: list[int], max_tokens: int = 12, **fields: Any) -> Request:
    defaults: dict[str, Any] = {
        "num_samples": 1,
        "choice": Choice(),
        "seed": 1,
        "stop_tokens": frozenset(),
        "stop_strings": (),
        "prompt_logprobs": False,
        "topk": 0,
        "with_text": False,
    }
    return Request(prompt=prompt, max_tokens=max_tokens, **defaults | fields)


@dataclass
class Bench:
    """A scheduler over one model, and the jobs it was given."""

    sampler: Sampler
    scheduler: Scheduler

    @classmethod
    def of(cls, model: PreTrainedModel, device: Device = CPU) -> "Bench":
        sampler = Sampler(None, Decoder.of(model, device))
        return cls(sampler, Scheduler(device, Counters(), lambda event: None, max_cache_bytes=1 << 30))

    def start(self, *requests: Request) -> list[Job]:
        jobs = [Job(number, str(number), request, self.sampler, None) for number, request in enumerate(requests)]
        for job in jobs:
            self.scheduler.start(job)
        return jobs

    def run(self, *requests: Request) -> list[Job]:
        """Runs requests side by side to their end."""
        jobs = self.start(*requests)
        while self.scheduler.busy:
            self.scheduler.step()
        return jobs


def own_logprobs(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """log_softmax behind each token of a sequence, by one plain forward, in the model's own dtype."""
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0], -1)


class Exact:
    """A model in float64, and how far plain float32 is from it on this machine; plain.py says why."""

    def __init__(self, name: str) -> None:
        self._exact, self._plain = make_model(name).double(), make_model(name)

    def check(self, found: Any, tokens: list[int], rows: torch.Tensor, columns: Any) -> None:
        """Logprobs at places of a sequence's table, [rows] or [rows, K], are as near to float64 as float32 allows."""
        exact = own_logprobs(self._exact, tokens)
        own = float((own_logprobs(self._plain, tokens) - exact).abs().max()) + ROUNDING * float(exact.abs().max())
        columns = torch.as_tensor(columns)
        wanted = exact[rows].gather(-1, columns.view(len(rows), -1)).view(columns.shape)
        found = torch.tensor(found, dtype=torch.float64).view(columns.shape)
        assert float((found - wanted).abs().max()) <= FACTOR * own


def generate(model: Any, prompt: torch.Tensor, **settings: Any) -> torch.Tensor:
    return model.generate(prompt, **settings)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_samples_are_those_of_transformers_generate_token_for_token(name: str):
    model = make_model(name)
    bench = Bench.of(model)
    assert bool(bench.sampler.decoder.why_alone) == (name in ALONE)
    greedy = Choice(temperature=0.0)
    jobs = bench.run(
        *(make_request(list(prompt), 20, choice=greedy, num_samples=1 + len(prompt) % 2) for prompt in PROMPTS)
    )
    for prompt, job in zip(PROMPTS, jobs, strict=True):
        wanted = generate(model, torch.tensor([prompt]), do_sample=False, max_new_tokens=20, min_new_tokens=20)
        for sample in job.samples:
            assert sample.tokens == wanted[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", CONFIGS)
def test_logprobs_of_samples_and_prompts_are_those_of_a_plain_forward(name: str, monkeypatch: pytest.MonkeyPatch):
    # Prompts are cut into pieces, as long ones are.
    monkeypatch.setattr(scheduler_module, "_CPU_PIECE", 6)
    bench, exact = Bench.of(make_model(name)), Exact(name)
    requests = [
        make_request(list(prompt), 9, num_samples=1 + number % 3, prompt_logprobs=True, topk=3)
        for number, prompt in enumerate(PROMPTS)
    ]
    for job in bench.run(*requests):
        prompt = job.request.prompt
        for sample in job.samples:
            rows = torch.arange(len(prompt) - 1, len(prompt) + 8)
            exact.check(sample.logprobs, prompt + sample.tokens, rows, sample.tokens)
        if len(prompt) > 1:
            rows = torch.arange(len(prompt) - 1)
            exact.check(list(job.prompt.logprobs), prompt, rows, prompt[1:])
            likeliest = torch.topk(own_logprobs(make_model(name), prompt)[:-1], 3).indices
            assert list(job.prompt.topk_tokens) == likeliest.flatten().tolist()
            exact.check(list(job.prompt.topk_logprobs), prompt, rows, likeliest)


@pytest.mark.parametrize("name", ["llama", "gemma2, softcapped, one layer of 8 tokens"])
@pytest.mark.parametrize("max_copied", [0, 4096])
def test_long_samples_have_the_logprobs_of_a_plain_forward_and_do_not_depend_on_their_company(
    name: str, max_copied: int, monkeypatch: pytest.MonkeyPatch
):
    """Prompts of several pieces, shared or copied, and samples that outgrow one size of slot after the other."""
    monkeypatch.setattr(decoder_module, "_MAX_COPIED", max_copied)
    bench, exact = Bench.of(make_model(name)), Exact(name)
    rng = random.Random(0)
    lengths = [(40, 30, 1), (120, 90, 2), (300, 100, 1), (480, 60, 2), (5, 130, 3)]
    requests = [
        make_request([rng.randrange(VOCAB_SIZE) for _ in range(prompt)], new, num_samples=count, seed=prompt)
        for prompt, new, count in lengths
    ]
    together = bench.run(*requests)
    for request, job in zip(requests, together, strict=True):
        prompt = request.prompt
        (alone,) = bench.run(request)
        for sample, other in zip(job.samples, alone.samples, strict=True):
            assert (sample.tokens, sample.logprobs) == (other.tokens, other.logprobs)
            rows = torch.arange(len(prompt) - 1, len(prompt) + len(sample.tokens) - 1)
            exact.check(sample.logprobs, prompt + sample.tokens, rows, sample.tokens)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "mamba, which has no keys"])
def test_a_seeded_request_gets_the_same_tokens_and_logprobs_bit_for_bit_in_whatever_company(name: str):
    bench = Bench.of(make_model(name))

    def asked() -> list[Request]:
        return [
            make_request(list(PROMPTS[0]), 16, seed=11, num_samples=3),
            make_request(list(PROMPTS[2]), 16, seed=12),
        ]

    alone = [bench.run(request)[0] for request in asked()]
    crowd = [make_request([number, 3, 7] * (number % 5 + 1), 4 + number % 9, seed=number) for number in range(17)]
    early = bench.start(*crowd[:9])
    for _ in range(7):
        bench.scheduler.step()
    together = bench.run(*asked(), *crowd[9:])[:2]
    assert len(early) == 9
    for one, other in zip(alone, together, strict=True):
        assert [sample.tokens for sample in one.samples] == [sample.tokens for sample in other.samples]
        assert [sample.logprobs for sample in one.samples] == [sample.logprobs for sample in other.samples]
    assert len({tuple(sample.tokens) for sample in alone[0].samples}) == 3


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2, softcapped, one layer of 8 tokens"])
def test_in_bfloat16_logprobs_are_those_of_a_plain_forward_to_a_few_of_its_steps(name: str):
    model = make_model(name)
    device = Device(torch.device("cpu"), "cpu", torch.bfloat16)
    bench = Bench.of(model, device)
    assert not bench.sampler.decoder.why_alone
    for job in bench.run(*(make_request(list(prompt), 12, num_samples=2) for prompt in PROMPTS)):
        prompt = job.request.prompt
        for sample in job.samples:
            with device.autocast(), torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + sample.tokens]), use_cache=False).logits[0].float()
            rows = torch.arange(len(prompt) - 1, len(prompt) + 11)
            wanted = torch.log_softmax(logits, -1)[rows, sample.tokens]
            step = 2.0**-8 * float(logits.abs().max())
            assert float((torch.tensor(sample.logprobs) - wanted).abs().max()) < 8 * step


def test_a_stop_token_ends_its_sample_alone_and_is_part_of_it():
    bench = Bench.of(make_model("llama"))
    free = bench.run(make_request(list(PROMPTS[0]), 30, num_samples=4, seed=5))[0]
    stop = free.samples[2].tokens[4]
    job = bench.run(make_request(list(PROMPTS[0]), 30, num_samples=4, seed=5, stop_tokens=frozenset([stop])))[0]
    for sample, unstopped in zip(job.samples, free.samples, strict=True):
        tokens = unstopped.tokens
        assert sample.tokens == (tokens[: tokens.index(stop) + 1] if stop in tokens else tokens)
    assert job.samples[2].tokens[-1] == stop


def test_a_prompt_of_several_samples_is_computed_once():
    bench = Bench.of(make_model("llama"))
    counters = bench.scheduler._counters
    bench.run(make_request(list(PROMPTS[2]), 5, num_samples=8))
    assert counters.prompt_tokens_total == len(PROMPTS[2])
    assert counters.sampled_tokens_total == 8 * 5
