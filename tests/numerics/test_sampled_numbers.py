"""Sampling against transformers.generate and the trainer's own forward, over architectures that differ."""

import random
import re
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    PhimoeConfig,
)

from tests.numerics.bench import Bench, decoding_of, make_request, own_logprobs
from tests.numerics.plain import FACTOR, ROUNDING
from tests.numerics.sampled_models import BOUNDED, COMMON, CONFIGS, LONG_ROPE, VOCAB_SIZE, make_model
from trainer_service.engine.device import Device
from trainer_service.engine.sampling import generation_loop as generation_loop_module
from trainer_service.engine.sampling import sequences as sequences_module
from trainer_service.engine.sampling import trial as trial_module
from trainer_service.engine.sampling.decoding_plan import Way
from trainer_service.engine.sampling.picking import Choice
from trainer_service.engine.sampling.request import Request

PROMPTS = ([5, 17, 3, 88, 41, 9, 60], [7], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25], [2, 90])


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
    assert bench.sampler.decoder.decoding.near is Way.TOGETHER
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
    monkeypatch.setattr(generation_loop_module, "_CPU_PIECE", 6)
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


@pytest.mark.parametrize("name", ["llama", "mamba, which has no keys"])
def test_what_else_is_asked_about_prompts_and_samples_is_what_a_plain_forward_finds(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(generation_loop_module, "_CPU_PIECE", 6)
    model = make_model(name)
    prompt = list(PROMPTS[2])
    rows = torch.arange(len(prompt) - 1)
    targets = torch.randint(VOCAB_SIZE, (len(prompt) - 1, 2), generator=torch.Generator().manual_seed(0))
    targets[:8] = -1
    targets[9, 1] = -1
    last_n = 4
    about: dict[str, Any] = {"prompt_logprobs": True, "topk": 3, "first_row": len(prompt) - 1 - last_n}
    scored, last = Bench.of(model).run(
        make_request(prompt, 5, num_samples=2, targets=targets.numpy(), topk_sampled=2, **about),
        make_request(prompt, 0, **about),
    )
    before = own_logprobs(model, prompt)[:-1]
    for job in (scored, last):
        assert list(job.prompt.logprobs) == pytest.approx(before[rows, prompt[1:]][-last_n:].tolist(), abs=1e-5)
        assert list(job.prompt.topk_tokens) == torch.topk(before[-last_n:], 3).indices.flatten().tolist()
    wanted = torch.where(targets < 0, 0.0, before.gather(-1, targets.clamp(min=0)))
    assert list(scored.prompt.target_logprobs) == pytest.approx(wanted.flatten().tolist(), abs=1e-5)
    assert not last.prompt.target_logprobs
    for sample in scored.samples:
        likeliest = torch.topk(own_logprobs(model, prompt + sample.tokens)[len(prompt) - 1 : -1], 2)
        assert sample.topk_tokens == likeliest.indices.tolist()
        flat = [logprob for row in sample.topk_logprobs for logprob in row]
        assert flat == pytest.approx(likeliest.values.flatten().tolist(), abs=1e-5)


def test_logits_are_made_only_of_the_part_of_a_prompt_that_is_asked_about(monkeypatch: pytest.MonkeyPatch):
    bench = Bench.of(make_model("llama"))
    made: list[int] = []
    prefill = bench.sampler.decoder.prefill

    def counting(*arguments: Any, num_logits: list[int]) -> Any:
        made.extend(num_logits)
        return prefill(*arguments, num_logits=num_logits)

    monkeypatch.setattr(bench.sampler.decoder, "prefill", counting)
    prompt = list(range(20))
    bench.run(make_request(prompt, 0, prompt_logprobs=True, first_row=16))
    bench.run(make_request(prompt, 0, prompt_logprobs=True))
    bench.run(make_request(prompt[:-1], 1))
    assert made == [4, 20, 1]


@pytest.mark.parametrize(
    ("name", "max_copied"),
    [*((name, 4096) for name in BOUNDED), ("phi3, turned otherwise from 25 tokens on", 0)],
)
def test_past_every_boundary_samples_are_those_of_a_plain_forward_and_it_is_told_how(
    name: str, max_copied: int, monkeypatch: pytest.MonkeyPatch
):
    """Each token is the likeliest, and has the logprob, that a forward of all before it finds; so has the prompt."""
    monkeypatch.setattr(generation_loop_module, "_CPU_PIECE", 6)
    monkeypatch.setattr(sequences_module, "_MAX_COPIED", max_copied)
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
    monkeypatch.setattr(sequences_module, "_MAX_COPIED", max_copied)
    model, exact = make_model(name), Exact(name)
    bench = Bench.of(model)
    rng = random.Random(0)
    lengths = [(40, 30, 1), (120, 80, 2), (330, 60, 1), (500, 30, 2), (55, 80, 3)]
    requests = [
        make_request([rng.randrange(VOCAB_SIZE) for _ in range(prompt)], new, num_samples=count, seed=prompt)
        for prompt, new, count in lengths
    ]
    together = bench.run(*requests)
    for request, job in zip(requests, together, strict=True):
        prompt = request.prompt
        (alone,) = Bench.of(model).run(request)
        for sample, other in zip(job.samples, alone.samples, strict=True):
            assert (sample.tokens, sample.logprobs) == (other.tokens, other.logprobs)
            rows = torch.arange(len(prompt) - 1, len(prompt) + len(sample.tokens) - 1)
            exact.check(sample.logprobs, prompt + sample.tokens, rows, sample.tokens)


@pytest.mark.parametrize(
    "name", ["llama", "gpt_neox", "mamba, which has no keys", "falcon with alibi", "rwkv, which takes no cache"]
)
def test_a_seeded_request_gets_the_same_tokens_and_logprobs_bit_for_bit_in_whatever_company(name: str):
    model = make_model(name)
    bench = Bench.of(model)

    def asked() -> list[Request]:
        return [
            make_request(list(PROMPTS[0]), 16, seed=11, num_samples=3),
            make_request(list(PROMPTS[2]), 16, seed=12),
        ]

    # Elsewhere, or their prompts would be known here.
    alone = [Bench.of(model).run(request)[0] for request in asked()]
    crowd = [make_request([number, 3, 7] * (number % 5 + 1), 4 + number % 9, seed=number) for number in range(17)]
    early = bench.start(*crowd[:9])
    for _ in range(7):
        bench.generation.step()
    together = bench.run(*asked(), *crowd[9:])[:2]
    assert len(early) == 9
    for one, other in zip(alone, together, strict=True):
        assert [sample.tokens for sample in one.samples] == [sample.tokens for sample in other.samples]
        assert [sample.logprobs for sample in one.samples] == [sample.logprobs for sample in other.samples]
    assert len({tuple(sample.tokens) for sample in alone[0].samples}) == 3


@pytest.mark.parametrize(
    ("name", "max_copied"),
    [
        *(
            (name, max_copied)
            for name in ("llama", "gemma2, softcapped, one layer of 8 tokens")
            for max_copied in (0, 4096)
        ),
        ("falcon with alibi", 0),
    ],
)
def test_samples_put_back_for_want_of_room_are_the_same_bit_for_bit(
    name: str, max_copied: int, monkeypatch: pytest.MonkeyPatch
):
    """Some samples of a request end before it is put back, so they are computed again as well, as far as they went."""
    monkeypatch.setattr(sequences_module, "_MAX_COPIED", max_copied)
    model = make_model(name)
    rng = random.Random(0)
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(3, 30))] for _ in range(6)]

    def asked() -> list[Request]:
        fields: dict[str, Any] = {"stop_tokens": frozenset({2}), "choice": Choice(temperature=5.0)}
        return [
            make_request(list(prompt), 80, num_samples=1 + seed % 3, seed=seed, prompt_logprobs=True, **fields)
            for seed, prompt in enumerate(prompts)
        ]

    with_room = Bench.of(model).run(*asked())
    bench = Bench.of(model)
    without = bench.start(*asked())
    for _ in range(40):
        bench.generation.step()
    assert any(len(job.alive) < len(job.samples) for job in without)
    # Half of what they take now, then the little that one of them comes to need.
    for part in (2, 4):
        admission = bench.generation._admission
        admission.max_cache_bytes = sum(job.cache_bytes(in_the_end=False) for job in admission.running) // part
        for _ in range(40):
            bench.generation.step()
    while bench.generation.busy:
        bench.generation.step()
    assert bench.generation._counters.requeued_samples_total >= 3
    lengths = {len(sample.tokens) for job in without for sample in job.samples}
    assert len(lengths) > 3
    for one, other in zip(with_room, without, strict=True):
        assert [sample.tokens for sample in one.samples] == [sample.tokens for sample in other.samples]
        assert [sample.logprobs for sample in one.samples] == [sample.logprobs for sample in other.samples]
        assert list(one.prompt.logprobs) == list(other.prompt.logprobs)


@pytest.mark.parametrize("name", CONFIGS)
def test_equal_prompts_are_computed_once_and_their_samples_are_those_of_each_alone(name: str):
    model = make_model(name)
    prompt = list(PROMPTS[2])
    alone = [Bench.of(model).run(make_request(prompt, 9, seed=seed, num_samples=2))[0] for seed in range(4)]
    bench = Bench.of(model)
    counters = bench.generation._counters
    together = bench.run(*(make_request(prompt, 9, seed=seed, num_samples=2) for seed in range(3)))
    assert counters.prompt_tokens_total == len(prompt)
    # One that comes later, too.
    together += bench.run(make_request(prompt, 9, seed=3, num_samples=2))
    assert counters.prompt_tokens_total == len(prompt)
    for one, other in zip(alone, together, strict=True):
        assert [sample.tokens for sample in one.samples] == [sample.tokens for sample in other.samples]
        assert [sample.logprobs for sample in one.samples] == [sample.logprobs for sample in other.samples]


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
    counters = bench.generation._counters
    bench.run(make_request(list(PROMPTS[2]), 5, num_samples=8))
    assert counters.prompt_tokens_total == len(PROMPTS[2])
    assert counters.sampled_tokens_total == 8 * 5
