"""Packed equals one by one equals plain transformers, on many architectures: logprobs and every gradient, as near to
float64 as float32 allows (plain.py)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.engines import CROSS_ENTROPY, RUN, make_engine
from tests.numerics.plain import (
    PlainLoss,
    PlainSequence,
    Reference,
    check_sum,
    cross_entropy_of,
    load_plain,
    random_sequences,
    to_batch,
)
from tests.tiny import VOCAB_SIZE
from trainer_service.engine.engine import Engine
from trainer_service.engine.models.comparison import relative_difference
from trainer_service.engine.sampling.service import Sampling
from trainer_service.worker_config import EngineSettings

WINDOW = 8
"""Sliding windows are shorter than the sequences, and than what sequences share."""

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_MIXED = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
_ROUTED = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
PACKED: dict[str, dict[str, Any]] = {
    "Llama": {"tie_word_embeddings": False},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 16},
    "Mistral": {"sliding_window": WINDOW},
    "Gemma2": {
        **_MIXED,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
    },
    "Gemma3": {**_MIXED, "head_dim": 16, "query_pre_attn_scalar": 16},
    "Phi3": {},
    "GPTNeoX": {"use_parallel_residual": True},
    "GPT2": {},
    "Olmo2": {},
    "Granite": {
        "logits_scaling": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.7,
        "embedding_multiplier": 2.0,
    },
    "Cohere": {"logit_scale": 0.25},
    "Qwen3Moe": {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "mlp_only_layers": [0],
    },
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "GptOss": {**_MIXED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": None},
    "Glm4Moe": {"head_dim": 8, **_ROUTED},
    "DeepseekV3": {
        **_ROUTED,
        "num_key_value_heads": 4,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
}
ALONE: dict[str, dict[str, Any]] = {
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "Mamba": {"state_size": 4},
    "Falcon": {"alibi": True, "new_decoder_architecture": False, "num_key_value_heads": None},
    "Llama4": {
        "head_dim": 8,
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
        "attention_chunk_size": WINDOW,
        "moe_layers": [1],
        "no_rope_layers": [1, 0],
    },
}
WHY_ALONE = {
    "Lfm2": "it has layers of kind conv",
    "Mamba": "it has layers of kind ",
    "Falcon": "its attention does not go through transformers' interface",
    "Llama4": "it has layers of kind chunked_attention",
}
_CONFIGS = {"Gemma3": "Gemma3TextConfig", "Llama4": "Llama4TextConfig"}
_MODELS = {"GPT2": "GPT2LMHeadModel"}


def make_model(folder: Path, architecture: str, **changes: Any) -> Path:
    """A tiny random model of the architecture, as a Hugging Face folder; with changes to its configuration."""
    settings = {**_COMMON, **PACKED.get(architecture, {}), **ALONE.get(architecture, {}), **changes}
    config = getattr(transformers, _CONFIGS.get(architecture, f"{architecture}Config"))(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, _MODELS.get(architecture, f"{architecture}ForCausalLM"))(config)
    model.save_pretrained(folder / architecture)
    return folder / architecture


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The model folder of an architecture; each is made once."""
    root, made = tmp_path_factory.mktemp("architectures"), {}
    return lambda architecture: made.get(architecture) or made.setdefault(architecture, make_model(root, architecture))


def ragged(k: int | None = None, seed: int = 0) -> list[PlainSequence]:
    """Sequences of many lengths, one of a single token, some beginning alike: two groups, one within the other."""
    made = random_sequences((30, 1, 30, 11, 26, 17, 5, 22), vocab_size=VOCAB_SIZE, k=k, seed=seed)
    for number, common in ((2, 20), (4, 20), (5, 16), (7, 9)):
        made[number].tokens[:common] = made[0].tokens[:common]
    # One that is the beginning of another.
    made[3].tokens[:] = made[0].tokens[: len(made[3].tokens)]
    return made


def check(engine: Engine, folder: Path, sequences: list[PlainSequence]) -> dict[str, float]:
    """One forward_backward on either side; returns the engine's metrics."""
    found = engine.forward_backward(RUN, 1, engine.stage(to_batch(sequences), CROSS_ENTROPY))
    wanted = reference_of(folder, sequences, cross_entropy_of(sequences))
    wanted.check_logprobs(found.logprobs_TK)
    wanted.check_gradients(engine.live_model(RUN).named_parameters())
    check_sum(
        found.metrics["loss:sum"], -np.concatenate([sequence.weights for sequence in sequences]) * found.logprobs_TK
    )
    return found.metrics


def reference_of(folder: Path, sequences: list[PlainSequence], loss: PlainLoss) -> Reference:
    return Reference.of(lambda dtype: load_plain(folder, dtype=dtype), sequences, loss)


@pytest.fixture(autouse=True)
def share_short_beginnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences as short as these share what they have in common."""
    monkeypatch.setattr("trainer_service.engine.packed.packing.MIN_SHARED_TOKENS", 4)


@pytest.mark.parametrize("architecture", PACKED)
def test_packed_and_shared_equals_plain_transformers(
    folder_of: Callable[[str], Path], architecture: str, tmp_path: Path
) -> None:
    folder = folder_of(architecture)
    engine = make_engine(folder, tmp_path)
    assert engine.traits.batching == "packed, shared beginnings once"
    metrics = check(engine, folder, ragged())
    assert metrics["forward_passes:sum"] == 1
    assert metrics["num_shared_tokens:sum"] >= 20


@pytest.mark.parametrize("architecture", PACKED)
def test_many_packs_soft_targets_and_checkpointing_equal_plain_transformers(
    folder_of: Callable[[str], Path], architecture: str, tmp_path: Path
) -> None:
    folder = folder_of(architecture)
    settings = EngineSettings(max_pack_tokens=50, activation_checkpointing="on")
    metrics = check(make_engine(folder, tmp_path, settings=settings), folder, ragged(k=3, seed=1))
    assert metrics["forward_passes:sum"] > 1


def test_a_head_that_rules_tokens_out_is_packed_and_sampled_like_any_other(tmp_path: Path) -> None:
    """Ids that only pad the vocabulary have a bias of −inf: their logits are infinite on every side, and equal."""
    settings = {**_COMMON, "num_key_value_heads": 4, "vocab_size": VOCAB_SIZE + 16}
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


@pytest.mark.parametrize("architecture", ALONE)
def test_what_cannot_be_packed_runs_one_sequence_at_a_time_and_says_so(
    folder_of: Callable[[str], Path], architecture: str, tmp_path: Path
) -> None:
    folder = folder_of(architecture)
    engine = make_engine(folder, tmp_path)
    assert engine.traits.batching.startswith(f"one sequence at a time: {WHY_ALONE[architecture]}")
    sequences = ragged()
    metrics = check(engine, folder, sequences)
    assert metrics["forward_passes:sum"] == len(sequences)
    assert metrics["num_shared_tokens:sum"] == 0


@pytest.mark.parametrize("architecture", ["Llama", "Gemma2", "Mixtral"])
def test_custom_losses_held_and_recomputed_equal_plain_transformers(
    folder_of: Callable[[str], Path], architecture: str, tmp_path: Path
) -> None:
    folder, sequences = folder_of(architecture), ragged()
    # Room for the graph of one forward of the two.
    engine = make_engine(folder, tmp_path, settings=EngineSettings(max_pack_tokens=60, max_held_graph_bytes=900_000))
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
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, sequences = folder_of("Llama"), ragged()
    engine = make_engine(folder, tmp_path)
    whole = engine.forward(RUN, 1, engine.stage(to_batch(sequences))).logprobs_TK
    parts = [engine.forward(RUN, 2, engine.stage(to_batch([sequence]))).logprobs_TK for sequence in sequences]
    wanted = reference_of(folder, sequences, cross_entropy_of(sequences))
    wanted.check_logprobs(whole)
    wanted.check_logprobs(np.concatenate(parts))
