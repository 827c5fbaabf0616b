"""A LoRA run computes what plain peft computes, and as many of them as there are do not notice one another.

Where peft warns (FutureWarning of a name that transformers changed; tied embeddings) the tests let it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradwire.types import AdamParams

from tests.engines import CPU, CROSS_ENTROPY, make_batch
from tests.loras import ALL, BODY, adapter, lora_engine, plain_peft, randomize, same_adapter
from tests.numerics.plain import (
    FACTOR,
    ROUNDING,
    Reference,
    check_sum,
    cross_entropy_of,
    load_plain,
    plain_backward,
    random_sequences,
    relative_error,
    to_batch,
    worst_error,
)
from tests.tiny import VOCAB_SIZE, make_tiny_llama
from trainer_service.engine.engine import Engine
from trainer_service.engine.models.lora import LoraSettings
from trainer_service.engine.optim import AdamW
from trainer_service.engine.packed import logprobs as logprobs_module
from trainer_service.engine.packed.logprobs import Head, LowRank, linear_logprobs
from trainer_service.worker_config import EngineSettings

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings"),
]
SEQUENCES = random_sequences((9, 1, 23, 16), vocab_size=VOCAB_SIZE)
STEP = AdamParams(learning_rate=1e-2, eps=1e-6)
SMOOTH_STEP = AdamParams(learning_rate=1e-2, eps=1e-1)
"""AdamW makes the last bits of a gradient near 0 a step of full length, unless eps is as large as gradients are."""


@pytest.fixture(params=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tiny_llama: Path, tmp_path: Path) -> Path:
    return tiny_llama if request.param == "tied" else make_tiny_llama(tmp_path / "untied", tied=False)


def reference_of(folder: Path, engine: Engine, settings: LoraSettings, **config: Any) -> Reference:
    """The reference of plain peft with the engine's adapter."""

    def load(dtype: torch.dtype) -> Any:
        plain = plain_peft(folder, settings, dtype, **config)
        same_adapter(plain, engine, "lora")
        return plain.get_base_model()

    return Reference.of(load, SEQUENCES, cross_entropy_of(SEQUENCES))


def check_against_plain_peft(engine: Engine, folder: Path, settings: LoraSettings, **config: Any) -> None:
    """Logprobs, loss and gradients of the run "lora"."""
    randomize(engine, "lora")
    found = engine.forward_backward("lora", 1, engine.stage(to_batch(SEQUENCES), CROSS_ENTROPY))
    wanted = reference_of(folder, engine, settings, **config)
    wanted.check_logprobs(found.logprobs_TK)
    wanted.check_gradients(adapter(engine, "lora").items())
    weights = np.concatenate([sequence.weights for sequence in SEQUENCES])
    check_sum(found.metrics["loss:sum"], -weights * found.logprobs_TK)


@pytest.mark.parametrize("settings", [BODY, ALL, LoraSettings(rank=2, alpha=4.0, train_mlp=False, train_unembed=False)])
def test_logprobs_and_gradients_equal_plain_peft(folder: Path, tmp_path: Path, settings: LoraSettings) -> None:
    engine = lora_engine(folder, tmp_path, lora=settings)
    targets = {} if settings.train_mlp else {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    check_against_plain_peft(engine, folder, settings, **targets)
    # Nothing else has a gradient: there is no room for one beside a large base model.
    assert all(p.grad is None for p in engine.live_model("lora").parameters() if not p.requires_grad)


@pytest.mark.parametrize("settings", [BODY, ALL])
def test_three_steps_equal_plain_peft(tiny_llama: Path, tmp_path: Path, settings: LoraSettings) -> None:
    engine = lora_engine(tiny_llama, tmp_path, lora=settings)
    before = {name: parameter.detach().clone() for name, parameter in adapter(engine, "lora").items()}

    def plain_steps(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        plain = plain_peft(tiny_llama, settings, dtype)
        theirs = same_adapter(plain, engine, "lora")
        optimizer = AdamW(theirs.values())
        for _ in range(3):
            plain_backward(plain.get_base_model(), SEQUENCES, cross_entropy_of(SEQUENCES))  # pyright: ignore[reportArgumentType]
            optimizer.step(SMOOTH_STEP)
            plain.zero_grad()
        return {name: parameter.detach() - before[name] for name, parameter in theirs.items()}

    exact, moved = plain_steps(torch.float64), plain_steps(torch.float32)
    for number in range(3):
        engine.forward_backward("lora", 2 * number, engine.stage(to_batch(SEQUENCES), CROSS_ENTROPY))
        engine.optim_step("lora", 2 * number + 1, SMOOTH_STEP)
    found = {name: parameter.detach() - before[name] for name, parameter in adapter(engine, "lora").items()}
    assert worst_error(found, exact) <= FACTOR * worst_error(moved, exact)


def test_a_new_adapter_changes_nothing_and_its_seed_decides(tiny_llama: Path, tmp_path: Path) -> None:
    runs = {"one": ALL, "same": ALL, "other": LoraSettings(rank=4, alpha=8.0, seed=2)}
    engine = lora_engine(tiny_llama, tmp_path, **runs)
    load = lambda dtype: load_plain(tiny_llama, dtype=dtype)  # noqa: E731
    wanted = Reference.of(load, SEQUENCES, cross_entropy_of(SEQUENCES))
    wanted.check_logprobs(engine.forward("one", 1, engine.stage(to_batch(SEQUENCES))).logprobs_TK)
    one, same, other = (adapter(engine, run_id) for run_id in runs)
    assert all(torch.equal(one[name], same[name]) for name in one)
    firsts = [name for name in one if "lora_A" in name]
    assert not any(torch.equal(one[name], other[name]) for name in firsts)
    assert all(parameter.dtype == torch.float32 for parameter in one.values())


def test_activation_checkpointing_and_held_graphs_give_the_same_gradients(tiny_llama: Path, tmp_path: Path) -> None:
    for number, checkpointing in enumerate(("off", "on")):
        engine = Engine(
            str(tiny_llama),
            device=CPU,
            checkpoint_dir=tmp_path / str(number),
            settings=EngineSettings(activation_checkpointing=checkpointing),  # pyright: ignore[reportArgumentType]
        )
        engine.create_run("lora", lora=ALL)
        randomize(engine, "lora")
        wanted = reference_of(tiny_llama, engine, ALL)
        batch = to_batch(SEQUENCES)
        engine.forward_backward("lora", 1, engine.stage(batch, CROSS_ENTROPY))
        wanted.check_gradients(adapter(engine, "lora").items())
        engine.zero_grad("lora")
        engine.forward("lora", 2, engine.stage(batch), keep_graph=True)
        engine.backward("lora", 3, forward_seq_id=2, gradients_TK=-batch.loss_fn_inputs["weights"])
        wanted.check_gradients(adapter(engine, "lora").items())


@pytest.mark.parametrize("settings", [BODY, ALL])
def test_logprobs_have_the_same_bits_whether_or_not_a_graph_is_kept(
    tiny_llama: Path, tmp_path: Path, settings: LoraSettings
) -> None:
    # A graph is not kept where the budget is used up, which other runs may have done.
    engine = lora_engine(tiny_llama, tmp_path, lora=settings)
    randomize(engine, "lora")
    batch = to_batch(SEQUENCES)
    kept = engine.forward("lora", 1, engine.stage(batch), keep_graph=True).logprobs_TK
    assert np.array_equal(engine.forward("lora", 2, engine.stage(batch)).logprobs_TK, kept)
    assert np.array_equal(engine.forward_backward("lora", 3, engine.stage(batch, CROSS_ENTROPY)).logprobs_TK, kept)


def script(engine: Engine, run_id: str, seed: int) -> list[Callable[[], Any]]:
    """Operations of one run, with a custom loss whose backward comes late."""
    batches = [make_batch(7, 12, 4, seed=seed), make_batch(20, 3, seed=seed + 50)]
    gradients = np.random.default_rng(seed).normal(size=batches[1].num_tokens).astype(np.float32)
    step = AdamParams(learning_rate=1e-2 * (1 + seed))
    return [
        lambda: engine.forward_backward(run_id, 1, engine.stage(batches[0], CROSS_ENTROPY)).logprobs_TK,
        lambda: engine.forward(run_id, 2, engine.stage(batches[1]), keep_graph=True).logprobs_TK,
        lambda: engine.backward(run_id, 3, forward_seq_id=2, gradients_TK=gradients),
        lambda: engine.optim_step(run_id, 4, step),
        lambda: engine.forward_backward(run_id, 5, engine.stage(batches[1], CROSS_ENTROPY)).logprobs_TK,
        lambda: engine.optim_step(run_id, 6, step),
        lambda: engine.forward(run_id, 7, engine.stage(batches[0])).logprobs_TK,
    ]


def test_alone_equals_interleaved_bit_for_bit(tiny_llama: Path, tmp_path: Path) -> None:
    runs = {"a": ALL, "b": LoraSettings(rank=2, seed=3, train_unembed=False), "c": LoraSettings(rank=8, seed=9)}
    together = lora_engine(tiny_llama, tmp_path / "together", **runs)
    together.create_run("full")
    scripts = [script(together, run_id, number) for number, run_id in enumerate([*runs, "full"])]
    answers = [[work() for work in works] for works in zip(*scripts, strict=True)]
    for number, run_id in enumerate([*runs, "full"]):
        alone = lora_engine(tiny_llama, tmp_path / run_id, **({run_id: runs[run_id]} if run_id in runs else {}))
        if run_id == "full":
            alone.create_run("full")
        for place, work in enumerate(script(alone, run_id, number)):
            found, wanted = work(), answers[place][number]
            assert np.array_equal(found, wanted) if isinstance(found, np.ndarray) else found == wanted
        ours, theirs = adapter(together, run_id), adapter(alone, run_id)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_base_model_is_shared_and_never_changes(tiny_llama: Path, tmp_path: Path) -> None:
    engine = lora_engine(tiny_llama, tmp_path, a=ALL, b=BODY)
    engine.create_run("full")
    models = [engine.live_model(run_id) for run_id in ("a", "b", "full")]
    frozen = [{id(p) for p in model.parameters() if not p.requires_grad} for model in models]
    assert frozen[0] == frozen[1]
    assert not frozen[2]
    for number in range(2):
        for run_id in ("a", "b", "full"):
            engine.forward_backward(run_id, 2 * number, engine.stage(make_batch(9, 4), CROSS_ENTROPY))
            engine.optim_step(run_id, 2 * number + 1, STEP)
    base = dict(load_plain(tiny_llama).named_parameters())
    held = dict(models[0].named_parameters())
    for name, parameter in base.items():
        wrapped = name.replace(".weight", ".base_layer.weight")
        assert torch.equal(held[wrapped if wrapped in held else name], parameter), name
    # Another LoRA run finds it there, even after the last was deleted; a run that trains all parameters never gets it.
    engine.delete_run("a")
    engine.delete_run("b")
    engine.create_run("next", lora=BODY)
    assert {id(p) for p in engine.live_model("next").parameters() if not p.requires_grad} == frozen[0]
    engine.delete_run("next")
    engine.create_run("fresh")
    fresh = engine.live_model("fresh")
    assert not {id(p) for p in fresh.parameters()} & frozen[0]
    assert all(torch.equal(parameter, base[name]) for name, parameter in fresh.named_parameters())


def test_a_frozen_head_needs_no_second_pass_over_the_vocabulary(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = lora_engine(tiny_llama, tmp_path, body=BODY, all=ALL)

    def refuse(*_: object) -> None:
        raise AssertionError("the head was gone through again")

    monkeypatch.setattr(logprobs_module, "_Gradients", refuse)
    engine.forward_backward("body", 1, engine.stage(make_batch(5, 9), CROSS_ENTROPY))
    with pytest.raises(AssertionError, match="gone through again"):
        engine.forward_backward("all", 1, engine.stage(make_batch(5, 9), CROSS_ENTROPY))


@pytest.mark.parametrize("chunk_elements", [1, 150, 1 << 24])
@pytest.mark.parametrize("keep_logits", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, 3.0)])
def test_a_low_rank_head_equals_its_whole_weight(
    monkeypatch: pytest.MonkeyPatch,
    chunk_elements: int,
    keep_logits: bool,
    shared: bool,
    scale: float,
    softcap: float | None,
) -> None:
    monkeypatch.setattr(logprobs_module, "_CHUNK_ELEMENTS", chunk_elements)
    torch.manual_seed(0)
    token_of_row = torch.tensor([0, 1, 1, 4, 2, 3, 5, 6, 6]) if shared else None
    hidden, weight, bias = torch.randn(7, 12), torch.randn(50, 12), torch.randn(50)
    a, b = torch.randn(3, 12), torch.randn(50, 3)
    targets = torch.randint(50, (9 if shared else 7, 2))
    upstream = torch.randn(targets.shape) * (torch.arange(len(targets)) % 3 > 0)[:, None]
    ours = [tensor.clone().requires_grad_() for tensor in (hidden, a, b)]
    head = Head(weight, bias, scale, softcap, LowRank(ours[1], ours[2], 1.7))
    found = linear_logprobs(ours[0], head, targets, token_of_row, keep_logits=keep_logits)
    found.backward(upstream)
    exact = [tensor.double().requires_grad_() for tensor in (hidden, a, b)]
    logits = scale * (exact[0] @ (weight + 1.7 * exact[2] @ exact[1]).T + bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    rows = logits if token_of_row is None else logits[token_of_row]
    wanted = torch.log_softmax(rows, -1).gather(-1, targets)
    wanted.backward(upstream.double())
    # Two products of few terms one behind the other, backwards four.
    assert relative_error(found.detach(), wanted.detach()) < 16 * ROUNDING
    for one, other in zip(ours, exact, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert relative_error(one.grad, other.grad) < 32 * ROUNDING


def test_gpt2_whose_layers_are_no_linear_ones_equals_plain_peft(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB_SIZE, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    settings = LoraSettings(rank=4, alpha=8.0, train_unembed=False)
    engine = lora_engine(tmp_path / "gpt2", tmp_path / "checkpoints", lora=settings)
    config = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
    check_against_plain_peft(engine, tmp_path / "gpt2", settings, **config)


def test_the_learning_rate_is_not_rounded(tiny_llama: Path, tmp_path: Path) -> None:
    """In bfloat16, 1e-3 would come back as 0.00099945."""
    engine = lora_engine(tiny_llama, tmp_path, lora=BODY)
    before = {name: parameter.detach().clone() for name, parameter in adapter(engine, "lora").items()}
    engine.forward_backward("lora", 1, engine.stage(make_batch(9, 4), CROSS_ENTROPY))
    gradients = {name: p.grad.clone() for name, p in adapter(engine, "lora").items() if p.grad is not None}
    engine.optim_step("lora", 2, AdamParams(learning_rate=1e-3))
    for name, parameter in adapter(engine, "lora").items():
        if "lora_B" in name:  # The first matrices have no gradient while these are zero.
            moved = (parameter - before[name])[gradients[name].abs() > 1e-6].abs()
            torch.testing.assert_close(moved, torch.full_like(moved, 1e-3), rtol=1e-6, atol=0)
