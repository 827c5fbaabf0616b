"""Which models can be cut for tensor parallel, and what those that cannot are refused with."""

from typing import Any

import pytest
import torch
import transformers
from gradwire.errors import GradwireError
from torch import nn
from transformers import AutoModelForCausalLM

from tests.numerics.architectures import COMMON, PACKED
from trainer_service.engine.parallel.cut_layers import EMBEDDING, HEAD, plan_cuts


def make_hollow(name: str, **changes: Any) -> Any:
    """A tiny model without what its parameters hold."""
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **PACKED.get(name, {}), **changes})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_a_plan_covers_layers_embedding_and_head():
    styles = plan_cuts(make_hollow("Qwen3"), 2)
    assert styles["model.embed_tokens"] == EMBEDDING
    assert styles["lm_head"] == HEAD
    assert styles["model.layers.1.self_attn.o_proj"] == styles["model.layers.0.mlp.down_proj"] == "rowwise"
    assert styles["model.layers.0.self_attn.q_norm"] == "replicated_with_grad_allreduce"


@pytest.mark.parametrize(
    ("name", "changes", "refusal"),
    [
        (
            "Llama",
            {"num_attention_heads": 6, "hidden_size": 24},
            "has 6 attention heads, which it must divide, as 1, 2, 3",
        ),
        ("Llama", {"num_key_value_heads": 2}, "has 2 key/value heads, which it must divide, as 1 and 2 do"),
        ("Llama", {"num_key_value_heads": 4, "vocab_size": 130}, "has 130 tokens in its vocabulary, which it must"),
        (
            "Llama",
            {"num_key_value_heads": 4, "intermediate_size": 42},
            "has 42 outputs of model.layers.*.mlp.gate_proj, which it must divide",
        ),
        ("GPT2", {}, "transformers has no plan to cut GPT2LMHeadModel by"),
        ("Falcon", {}, "transformers has no plan to cut FalconForCausalLM by"),
        ("Phi3", {}, 'plan for Phi3ForCausalLM has "rowwise_split_input" for model.layers.*.self_attn.o_proj'),
        ("Qwen3Moe", {}, 'plan for Qwen3MoeForCausalLM has "moe_tp_experts" for model.layers.*.mlp.experts'),
        ("DiffLlama", {}, "no plan to cut DiffLlamaForCausalLM by"),
    ],
)
def test_what_cannot_be_cut_is_refused_in_a_sentence(name: str, changes: dict[str, Any], refusal: str):
    with pytest.raises(GradwireError, match="--tp-size, such as 1") as told:
        plan_cuts(make_hollow(name, **changes), 4)
    assert told.value.reason == "INVALID_FIELD"
    assert told.value.message.startswith("tp_size is 4, and ")
    assert refusal in told.value.message


def test_what_stands_between_cut_layers_and_is_not_in_the_plan_is_refused():
    model = make_hollow("Llama")
    # It would see one rank's heads alone, and train on their gradient.
    model.model.layers[1].self_attn.q_norm = nn.LayerNorm(8)
    with pytest.raises(GradwireError, match=r"says nothing of model\.layers\.\*\.self_attn\.q_norm in it"):
        plan_cuts(model, 2)
