"""Packed equals one by one equals plain transformers, on many architectures: logprobs and every gradient, as near to
float64 as float32 allows (plain.py)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.engines import RUN, make_engine
from tests.numerics.architectures import (
    CARRYING,
    COMMON,
    PACKED,
    check,
    check_custom,
    plan_anew,
    ragged,
    reference_of,
)
from tests.numerics.plain import cross_entropy_of, random_sequences, to_batch
from tests.tiny import VOCAB_SIZE
from trainer_service.engine.models.comparison import relative_difference
from trainer_service.engine.sampling.service import Sampling
from trainer_service.worker_config import EngineSettings


@pytest.fixture(autouse=True)
def share_short_beginnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences as short as these share what they have in common."""
    monkeypatch.setattr("trainer_service.engine.packed.packing.MIN_SHARED_TOKENS", 4)


@pytest.mark.parametrize("architecture", PACKED)
def test_packed_and_shared_equals_plain_transformers_in_many_packs_with_soft_targets_and_checkpointing_too(
    folder_of: Callable[..., Path], architecture: str, tmp_path: Path
) -> None:
    folder = folder_of(architecture)
    engine = make_engine(folder, tmp_path)
    assert engine.traits.batching == "packed, shared beginnings once"
    metrics = check(engine, folder, ragged())
    assert metrics["forward_passes:sum"] == 1
    assert metrics["num_shared_tokens:sum"] >= 20
    plan_anew(engine, EngineSettings(max_pack_tokens=50, activation_checkpointing="on"))
    assert check(engine, folder, ragged(k=3, seed=1))["forward_passes:sum"] > 1


@pytest.mark.parametrize("architecture", CARRYING)
def test_what_carries_a_state_is_packed_and_equals_plain_transformers_in_sequences_of_any_length(
    folder_of: Callable[..., Path], architecture: str, tmp_path: Path
) -> None:
    folder = folder_of(architecture)
    engine = make_engine(folder, tmp_path)
    assert engine.traits.batching == "packed, no shared beginnings: its layers carry a state"
    # Of one length and of several, so that recurrences see rows in one call and in more.
    lengths = (70, 1, 64, 3, 129, 3, 65)
    sequences = random_sequences(lengths, vocab_size=VOCAB_SIZE)
    metrics = check(engine, folder, sequences)
    assert metrics["forward_passes:sum"] == 1
    assert engine.counters.padding_tokens_total == 0
    # Two targets a token and a custom loss, out of a graph that was held and of one that found no room.
    plan_anew(engine, EngineSettings(max_pack_tokens=70))
    check_custom(engine, folder, seed=1)
    plan_anew(engine, EngineSettings(max_pack_tokens=70, max_held_graph_bytes=1, activation_checkpointing="on"))
    assert check_custom(engine, folder, seed=3)["forward_passes:sum"] > 1


def test_a_head_that_rules_tokens_out_is_packed_and_sampled_like_any_other(tmp_path: Path) -> None:
    """Ids that only pad the vocabulary have a bias of −inf: their logits are infinite on every side, and equal."""
    settings = {**COMMON, "num_key_value_heads": 4, "vocab_size": VOCAB_SIZE + 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.PhiForCausalLM(transformers.PhiConfig(**settings))
    head: Any = model.get_output_embeddings()
    with torch.no_grad():
        head.bias.normal_()
        head.bias[VOCAB_SIZE:] = -torch.inf
    model.save_pretrained(tmp_path / "phi")
    engine = make_engine(tmp_path / "phi", tmp_path)
    assert engine.traits.batching == "packed, shared beginnings once"
    check(engine, tmp_path / "phi", ragged())
    sampling = Sampling(engine, checkpoint_dir=tmp_path, send=lambda event: None)
    assert sampling.decoding.described == "together"


@pytest.mark.parametrize(
    ("got", "wanted", "difference"),
    [
        ([1.0, -torch.inf], [1.0, -torch.inf], 0.0),
        ([1.0, -torch.inf], [2.0, -torch.inf], 0.5),
        ([1.0, torch.inf], [1.0, -torch.inf], torch.inf),
        ([1.0, 3.0], [1.0, -torch.inf], torch.inf),
        ([1.0, -torch.inf], [1.0, 3.0], torch.inf),
        ([torch.nan, 1.0], [torch.nan, 1.0], torch.inf),
        ([torch.inf, torch.inf], [-torch.inf, -torch.inf], torch.inf),
        ([1.0, 3.0], [1.0, 4.0], 0.25),
        ([1.0, -3e38], [2.0, -3e38], 0.5),
    ],
)
def test_what_is_infinite_on_both_sides_alike_is_no_difference(
    got: list[float], wanted: list[float], difference: float
) -> None:
    assert relative_difference(torch.tensor(got), torch.tensor(wanted)) == difference


@pytest.mark.parametrize(("architecture", "how"), [("Phi3", "apart"), ("Llama", "by length")])
def test_what_turns_otherwise_in_long_sequences_is_packed_with_its_like(
    folder_of: Callable[..., Path], architecture: str, how: str, tmp_path: Path
) -> None:
    folder = folder_of(architecture, turned=True)
    engine = make_engine(folder, tmp_path)
    assert engine.traits.batching == f"packed, shared beginnings once; beyond 16 tokens {how}"
    # By length: plain transformers turns a sequence as the longest before it.
    metrics = check(engine, folder, sorted(ragged(), key=lambda sequence: len(sequence.tokens)))
    # Lengths of 1, 5, 11 are on this side; 17, 22, 26, 30 and 30 on the other.
    assert metrics["forward_passes:sum"] == {"apart": 2, "by length": 5}[how]
    assert metrics["num_shared_tokens:sum"] >= 20


@pytest.mark.parametrize("architecture", ["Llama", "Gemma2", "Mixtral", "Lfm2"])
def test_custom_losses_held_and_recomputed_equal_plain_transformers(
    folder_of: Callable[..., Path], architecture: str, tmp_path: Path
) -> None:
    folder, sequences = folder_of(architecture), ragged()
    # Room for the graph of one forward of the two.
    engine = make_engine(folder, tmp_path, settings=EngineSettings(max_pack_tokens=60, max_held_graph_bytes=600_000))
    batch = to_batch(sequences, with_weights=False)
    rng = np.random.default_rng(3)
    gradients = rng.normal(size=batch.num_tokens).astype(np.float32)
    for seq_id in (1, 2, 3):
        engine.forward(RUN, seq_id, engine.stage(batch), keep_graph=True)
    for seq_id in (2, 1, 3):
        engine.backward(RUN, 10 + seq_id, forward_seq_id=seq_id, gradients_TK=seq_id * gradients)
    assert engine.counters.recomputed_graphs_total > 0

    def loss(logprobs: list[torch.Tensor]) -> torch.Tensor:
        return 6 * (torch.cat(logprobs) * torch.tensor(gradients)).sum()

    reference_of(folder, sequences, loss).check_gradients(engine.live_model(RUN).named_parameters())


def test_answers_come_back_in_the_order_asked_as_if_each_were_alone(
    folder_of: Callable[..., Path], tmp_path: Path
) -> None:
    folder, sequences = folder_of("Llama"), ragged()
    engine = make_engine(folder, tmp_path)
    whole = engine.forward(RUN, 1, engine.stage(to_batch(sequences))).logprobs_TK
    parts = [engine.forward(RUN, 2, engine.stage(to_batch([sequence]))).logprobs_TK for sequence in sequences]
    wanted = reference_of(folder, sequences, cross_entropy_of(sequences))
    wanted.check_logprobs(whole)
    wanted.check_logprobs(np.concatenate(parts))
