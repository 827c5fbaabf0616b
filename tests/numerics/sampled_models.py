"""Tiny models that samples are compared with plain forwards of, and what is told of how each is decoded."""

from typing import Any

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
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    RwkvConfig,
)

from trainer_service.engine.models.positions import forget_longest_sequence

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
LONG_ROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.0, 1.2],
    "long_factor": [4.0, 8.0, 2.0, 3.0],
    "original_max_position_embeddings": 24,
    "factor": 4.0,
}
TOGETHER = r"together"
LONGER: dict[str, Any] = {**COMMON, "max_position_embeddings": 128}
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
BOUNDED: dict[str, tuple[PretrainedConfig, str]] = {
    "llama4, by chunks of 24": (
        Llama4TextConfig(**LLAMA4, attention_chunk_size=24, attn_temperature_tuning=False),
        TOGETHER,
    ),
    "llama4, whose scores grow with the place in a row": (
        Llama4TextConfig(**LLAMA4, attention_chunk_size=24, floor_scale=20, attn_scale=0.5),
        TOGETHER,
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
        r"together; beyond 24 tokens together, a row each: .*",
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
        r"together, a row each: it has attention that does not go through transformers' interface",
    ),
    "falcon with alibi": (
        FalconConfig(**LONGER, alibi=True, new_decoder_architecture=False, bos_token_id=0, eos_token_id=1),
        r"together, a row each: its forward in company fails .*",
    ),
    "rwkv, which takes no cache": (
        RwkvConfig(vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32),
        r"together, every token computes all before it again: it has no cache that its forward takes",
    ),
}


def make_model(name: str, seed: int = 0) -> PreTrainedModel:
    config = CONFIGS[name] if name in CONFIGS else BOUNDED[name][0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
    # As load_model does.
    forget_longest_sequence(model)
    model.generation_config.pad_token_id = 0
    return model
