"""Whose experts ranks can divide, and what others are refused with."""

import pytest
from gradwire.errors import GradwireError
from torch import nn

from tests.unit.engine.parallel.test_cut_layers import make_hollow
from trainer_service.engine.parallel.expert_parallel import check_experts, find_experts, num_gathered
from trainer_service.engine.rank_channels import Ranks

FOUR = Ranks(world_size=4, ep_size=2)


@pytest.mark.parametrize("name", ["Qwen3Moe", "Mixtral", "GptOss", "DeepseekV3", "Qwen2Moe", "GraniteMoe"])
def test_experts_of_these_models_can_be_divided(name: str):
    check_experts(make_hollow(name), FOUR)


@pytest.mark.parametrize(
    ("name", "refusal"),
    [
        ("Llama", "LlamaForCausalLM has no experts in stacked weights that transformers lets others compute; start"),
        (
            "Qwen3Moe",
            "Qwen3MoeForCausalLM has 6 experts, which the 4 ranks that have them cannot divide evenly; start the "
            "trainer with --ep-size 1, or an --fsdp-size of 2, 6.",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused_in_a_sentence(name: str, refusal: str):
    with pytest.raises(GradwireError) as told:
        check_experts(make_hollow(name, num_experts=6), FOUR)
    assert told.value.reason == "INVALID_FIELD"
    assert told.value.message.startswith(f"ep_size is 2, and {refusal}")


def test_experts_with_something_that_all_of_them_share_are_refused():
    model = make_hollow("Qwen3Moe")
    name, experts = next(iter(find_experts(model).items()))
    experts.post_expert_norm = nn.LayerNorm(4, device="meta")
    with pytest.raises(GradwireError) as told:
        check_experts(model, FOUR)
    assert f"has {name}.post_expert_norm.weight, which is not one of 4 experts each" in told.value.message


def test_experts_that_are_divided_are_gathered_in_part():
    model = make_hollow("Qwen3Moe")
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(p.numel() for module in find_experts(model).values() for p in module.parameters())
    assert num_gathered(model, Ranks()) == 0
    assert num_gathered(model, Ranks(world_size=4)) == total
    assert num_gathered(model, FOUR) == total - experts // 2
