"""Tiny random models of many architectures, and a batch to run each on against plain transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tests.engines import CROSS_ENTROPY, RUN
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
from trainer_service.engine.microbatch import ModelSize
from trainer_service.worker_config import EngineSettings

WINDOW = 8
"""Sliding windows are shorter than the sequences, and than what sequences share."""

COMMON: dict[str, Any] = {
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
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_MAMBA_2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": WINDOW,
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
    "Qwen2Moe": {**_EXPERTS, "shared_expert_intermediate_size": 16},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "Phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "GraniteMoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Ernie4_5_Moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 16,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 1,
    },
    "Dots1": {"head_dim": 8, **_ROUTED},
    "DiffLlama": {},
}
"""Sequences go end to end."""
TURNED: dict[str, dict[str, Any]] = {
    "Phi3": {
        "original_max_position_embeddings": 16,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.0, 1.2],
            "long_factor": [4.0, 8.0, 2.0, 3.0],
            "original_max_position_embeddings": 16,
            "factor": 4.0,
        },
    },
    "Llama": {
        "max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    },
}
"""Rotary embeddings turn otherwise in sequences of more than 16 tokens."""
CARRYING: dict[str, dict[str, Any]] = {
    "Qwen3Next": {**_LINEAR, **_EXPERTS, "shared_expert_intermediate_size": 16},
    "Qwen3_5": {**_LINEAR},
    "Qwen3_5Moe": {**_LINEAR, **_EXPERTS, "shared_expert_intermediate_size": 16},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "Lfm2Moe": {"layer_types": ["conv", "full_attention"], **_EXPERTS, "num_dense_layers": 1},
    "Jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "Bamba": {**_MAMBA_2, "attn_layer_indices": [1]},
    "GraniteMoeHybrid": {
        **_MAMBA_2,
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 16,
    },
    "FalconH1": {**_MAMBA_2, "mamba_d_ssm": 64},
    "NemotronH": {
        "layers_block_type": ["mamba", "attention", "moe"],
        "num_hidden_layers": 3,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": WINDOW,
        "head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
    },
    "Zamba2": {
        "layers_block_type": ["mamba", "hybrid"],
        "hybrid_layer_ids": [1],
        "mamba_d_state": 8,
        "mamba_headdim": 16,
        "n_mamba_heads": 4,
        "mamba_ngroups": 1,
        "chunk_size": WINDOW,
        "num_mem_blocks": 1,
        "num_key_value_heads": 4,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "use_mem_rope": True,
    },
    "Mamba": {"state_size": 4},
    "Mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": WINDOW},
    "FalconMamba": {"state_size": 4},
}
"""Packed, without shared beginnings: layers carry a state."""
PADDED: dict[str, dict[str, Any]] = {
    "RecurrentGemma": {"block_types": ["recurrent", "attention"], "attention_window_size": WINDOW, "lru_width": 32},
    "MiniMax": {
        "layer_types": ["linear_attention", "full_attention"],
        "block_size": WINDOW,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "Llama4": {
        "head_dim": 8,
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
        "attention_chunk_size": WINDOW,
        "moe_layers": [1],
        "no_rope_layers": [1, 0],
    },
    "Falcon": {"alibi": True, "new_decoder_architecture": False, "num_key_value_heads": None},
    "Bloom": {"n_layer": 2, "n_head": 4},
    "Mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "expansion_ratio": 2},
    "GPTJ": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "GPTNeo": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": WINDOW,
    },
    "CodeGen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_ctx": 64, "rotary_dim": 4},
    "XGLM": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
    "Rwkv": {"attention_hidden_size": 32, "context_length": 64, "rescale_every": 0},
}
"""Sequences go in rows of similar length."""
_TEXT = ("Gemma3", "Llama4", "Qwen3_5", "Qwen3_5Moe")
"""Those whose configuration of the same name is of a model with more than text."""


def make_model(folder: Path, architecture: str, *, turned: bool = False, **changes: Any) -> Path:
    """A tiny random model of the architecture, as a Hugging Face folder.

    Args:
        folder: Where its folder goes.
        architecture: As transformers calls it.
        turned: Whether it is the one of TURNED.
        **changes: To its configuration.
    """
    table = TURNED if turned else {**PACKED, **CARRYING, **PADDED}
    name = f"{architecture}TextConfig" if architecture in _TEXT else f"{architecture}Config"
    config = getattr(transformers, name)(**{**COMMON, **table[architecture], **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
    path = folder / (f"{architecture}-turned" if turned else architecture)
    model.save_pretrained(path)
    return path


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


def check_custom(engine: Engine, folder: Path, *, seed: int) -> dict[str, float]:
    """Soft targets, and gradients of a loss of the caller's own, in two calls; returns the second one's metrics."""
    sequences = ragged(k=2, seed=seed)
    batch = to_batch(sequences, with_weights=False)
    gradients = np.random.default_rng(3).normal(size=(batch.num_tokens, 2)).astype(np.float32)

    def loss(logprobs: list[torch.Tensor]) -> torch.Tensor:
        return (torch.cat(logprobs) * torch.tensor(gradients)).sum()

    wanted = reference_of(folder, sequences, loss)
    found = engine.forward(RUN, 2, engine.stage(batch), keep_graph=True)
    wanted.check_logprobs(found.logprobs_TK)
    metrics = engine.backward(RUN, 3, forward_seq_id=2, gradients_TK=gradients)
    wanted.check_gradients(engine.live_model(RUN).named_parameters())
    return metrics


def reference_of(folder: Path, sequences: list[PlainSequence], loss: PlainLoss) -> Reference:
    return Reference.of(lambda dtype: load_plain(folder, dtype=dtype), sequences, loss)


def plan_anew(engine: Engine, settings: EngineSettings) -> None:
    """Has an engine go on as one with these settings would: another need not be made. Gradients are cleared."""
    engine._plan_passes(settings, ModelSize(vocab_size=VOCAB_SIZE))
    engine.zero_grad(RUN)
