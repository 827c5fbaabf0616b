"""Sampling against transformers.generate and the trainer's own forward, over architectures that differ."""

import random
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    PhimoeConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from tests.engines import CPU
from tests.numerics.plain import FACTOR, ROUNDING
from trainer_service.engine.counters import Counters
from trainer_service.engine.device import Device
from trainer_service.engine.models.positions import forget_longest_sequence
from trainer_service.engine.sampling import decoder as decoder_module
from trainer_service.engine.sampling import scheduler as scheduler_module
from trainer_service.engine.sampling import trial as trial_module
from trainer_service.engine.sampling.decoder import Decoder
from trainer_service.engine.sampling.decoding import Decoding, Way
from trainer_service.engine.sampling.job import Job
from trainer_service.engine.sampling.picking import Choice
from trainer_service.engine.sampling.request import Request
from trainer_service.engine.sampling.samplers import Sampler
from trainer_service.engine.sampling.scheduler import Scheduler
from trainer_service.engine.sampling.trial import find_decoding

VOCAB_SIZE = 96
MAX_CONTEXT_LENGTH = 640
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
LONG_ROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.0, 1.2],
    "long_factor": [4.0, 8.0, 2.0, 3.0],
    "original_max_position_embeddings": 24,
    "factor": 4.0,
}
LLAMA4: dict[str, Any] = {
    **COMMON,
    **HEADS,
    "intermediate_size_mlp": 64,
    "num_local_experts": 2,
    "moe_layers": [1],
    "no_rope_layers": [1, 0],
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
TOGETHER = r"together"
ALONE_ALL = r"one by one: it has attention that comes out otherwise, by .*"
BOUNDED: dict[str, tuple[PretrainedConfig, str]] = {
    "llama4, by chunks of 24": (
        Llama4TextConfig(**LLAMA4, attention_chunk_size=24, attn_temperature_tuning=False),
        r"together; beyond 24 tokens one by one: .*",
    ),
    "llama4, whose scores grow with the place in a row": (
        Llama4TextConfig(**LLAMA4, attention_chunk_size=24, floor_scale=20, attn_scale=0.5),
        ALONE_ALL,
    ),
    "phi3, turned otherwise from 25 tokens on": (
        Phi3Config(
            **COMMON,
            original_max_position_embeddings=24,
            num_key_value_heads=2,
            intermediate_size=64,
            rope_parameters=LONG_ROPE,
            pad_token_id=0,
        ),
        r"together; beyond 24 tokens one by one: .*",
    ),
    "llama, turned otherwise with every token from 25 on": (
        LlamaConfig(
            **COMMON | {"max_position_embeddings": 24},
            **HEADS,
            rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        ),
        r"together; beyond 24 tokens every token computes all before it again: .*",
    ),
    "mistral, whose layers see 24 tokens": (MistralConfig(**COMMON, **HEADS, sliding_window=24), TOGETHER),
    "gpt_neo, one layer of 24 tokens that nothing moves": (
        GPTNeoConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=24,
            max_position_embeddings=96,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=1,
        ),
        r"one by one: it has layers that share their keys",
    ),
    "falcon with alibi": (
        FalconConfig(**COMMON, alibi=True, new_decoder_architecture=False, bos_token_id=0, eos_token_id=1),
        r"one by one: its forward in company fails .*",
    ),
}
PROMPTS = ([5, 17, 3, 88, 41, 9, 60], [7], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25], [2, 90])


def make_model(name: str, seed: int = 0) -> PreTrainedModel:
    config = CONFIGS[name] if name in CONFIGS else BOUNDED[name][0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
    # As load_model does.
    forget_longest_sequence(model)
    model.generation_config.pad_token_id = 0
    return model


def make_request(prompt: list[int], max_tokens: int = 12, **fields: Any) -> Request:
    defaults: dict[str, Any] = {
        "num_samples": 1,
        "choice": Choice(),
        "seed": 1,
        "stop_tokens": frozenset(),
        "stop_strings": None,
        "prompt_logprobs": False,
        "topk": 0,
        "with_text": False,
        "text": None,
    }
    return Request(prompt=prompt, max_tokens=max_tokens, **defaults | fields)


def decoding_of(model: PreTrainedModel, device: Device = CPU, max_context_length: int = MAX_CONTEXT_LENGTH) -> Decoding:
    attention = str(model.config._attn_implementation)
    return find_decoding(model, device, attention=attention, max_context_length=max_context_length)


@dataclass
class Bench:
    """A scheduler over one model, and the jobs it was given."""

    sampler: Sampler
    scheduler: Scheduler

    @classmethod
    def of(cls, model: PreTrainedModel, device: Device = CPU) -> "Bench":
        sampler = Sampler(None, Decoder(model, device, decoding_of(model, device)))
        return cls(sampler, Scheduler(device, Counters(), lambda event: None, max_cache_bytes=1 << 30))

    def start(self, *requests: Request) -> list[Job]:
        jobs = [Job(number, str(number), request, self.sampler) for number, request in enumerate(requests)]
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
    assert (bench.sampler.decoder.decoding.near is Way.ALONE) == (name in ALONE)
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


@pytest.mark.parametrize(
    ("name", "max_copied"),
    [*((name, 4096) for name in BOUNDED), ("phi3, turned otherwise from 25 tokens on", 0)],
)
def test_past_every_boundary_samples_are_those_of_a_plain_forward_and_it_is_told_how(
    name: str, max_copied: int, monkeypatch: pytest.MonkeyPatch
):
    """Each token is the likeliest, and has the logprob, that a forward of all before it finds; so has the prompt."""
    monkeypatch.setattr(scheduler_module, "_CPU_PIECE", 6)
    monkeypatch.setattr(decoder_module, "_MAX_COPIED", max_copied)
    model = make_model(name)
    bench = Bench.of(model)
    assert re.fullmatch(BOUNDED[name][1], bench.sampler.decoder.decoding.described)
    rng = random.Random(0)
    # Short of the first boundary to the end, growing past it, up to it, one past it, and past the second.
    lengths = [(5, 4, 1), (3, 30, 2), (23, 6, 1), (24, 4, 2), (25, 4, 1), (47, 5, 2), (60, 4, 1)]
    requests = [
        make_request(
            [rng.randrange(VOCAB_SIZE) for _ in range(prompt)],
            new,
            num_samples=count,
            choice=Choice(temperature=0.0),
            prompt_logprobs=True,
        )
        for prompt, new, count in lengths
    ]
    for request, job in zip(requests, bench.run(*requests), strict=True):
        prompt = request.prompt
        before = own_logprobs(model, prompt)[range(len(prompt) - 1), prompt[1:]]
        assert torch.allclose(torch.tensor(list(job.prompt.logprobs)), before, atol=1e-5, rtol=0)
        for sample in job.samples:
            assert len(sample.tokens) == request.max_tokens
            for number, (token, logprob) in enumerate(zip(sample.tokens, sample.logprobs, strict=True)):
                wanted = own_logprobs(model, prompt + sample.tokens[:number])[-1]
                assert token == int(wanted.argmax())
                assert logprob == pytest.approx(float(wanted[token]), abs=1e-5)


def test_a_boundary_beyond_the_longest_sequence_changes_nothing():
    model = make_model("phi3, turned otherwise from 25 tokens on")
    assert decoding_of(model, max_context_length=24).described == "together"


def test_a_boundary_beyond_which_all_is_as_before_it_is_none():
    """Phi-3.5-MoE tells one, turns by the same angles on either side, and scales by the same factor."""
    for scale, beyond in ((1.2, False), (2.0, True)):
        rope: Any = LONG_ROPE | {"short_mscale": 1.2, "long_mscale": scale}
        sizes: dict[str, Any] = {"num_key_value_heads": 2, "intermediate_size": 16, "num_local_experts": 2}
        config = PhimoeConfig(**COMMON, **sizes, rope_parameters=rope)
        torch.manual_seed(0)
        decoding = decoding_of(AutoModelForCausalLM.from_config(config).eval())
        assert (decoding.boundary == 24) is beyond


def test_a_boundary_that_can_neither_be_moved_nor_tried_is_not_trusted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trial_module, "_MOST_IN_PLACE", 23)
    decoding = decoding_of(make_model("gpt_neo, one layer of 24 tokens that nothing moves"))
    assert decoding.described.endswith(
        "; beyond 24 tokens every token computes all before it again: its window_size of 24 tokens could not be tried"
    )


def test_a_model_that_was_tried_is_as_it_was():
    name = "phi3, turned otherwise from 25 tokens on"
    model, untouched = make_model(name), make_model(name)
    decoding_of(model)
    assert model.config.to_dict() == untouched.config.to_dict()
    tokens = list(range(40))
    assert torch.equal(own_logprobs(model, tokens), own_logprobs(untouched, tokens))


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
    assert bench.sampler.decoder.decoding.described == "together"
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
