"""Models of more than text: their text part trains, and the original class loads what is exported, images and all."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gradwire.errors import InvalidArgumentError
from gradwire.types import AdamParams
from peft import PeftModel

from tests.engines import CPU, CROSS_ENTROPY
from tests.loras import ALL, lora_engine, randomize
from tests.numerics.plain import Reference, cross_entropy_of, plain_logprobs, random_sequences, to_batch
from tests.tiny import VOCAB_SIZE
from trainer_service.engine.engine import Engine

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings"),
]
SEQUENCES = random_sequences((9, 1, 23, 16), vocab_size=VOCAB_SIZE)
_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": None,
}
_QWEN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
_QWEN_IMAGES = {"depth": 1, "num_heads": 2, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32}
_SIGLIP = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "Qwen2_5_VL": {
        "text_config": {**_TEXT, **_QWEN_ROPE},
        "vision_config": {**_QWEN_IMAGES, "fullatt_block_indexes": [0]},
    },
    "Qwen3VLMoe": {
        "text_config": {
            **_TEXT,
            **_QWEN_ROPE,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
        },
        "vision_config": {**_QWEN_IMAGES, "deepstack_visual_indexes": [0]},
    },
    "Gemma3": {
        "text_config": {
            **_TEXT,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 8,
            "query_pre_attn_scalar": 8,
        },
        "vision_config": {**_SIGLIP, "image_size": 16, "patch_size": 8},
        "mm_tokens_per_image": 4,
    },
}


def make_model(root: Path, architecture: str) -> Path:
    """A tiny random model of the architecture, as a Hugging Face folder."""
    config = getattr(transformers, f"{architecture}Config")(**MODELS[architecture])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        original(architecture)(config).save_pretrained(root / architecture)
    return root / architecture


def original(architecture: str) -> Any:
    return getattr(transformers, f"{architecture}ForConditionalGeneration")


def load(architecture: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """As any script would load it, with the gradients that text has."""
    experts = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    model = original(architecture).from_pretrained(folder, dtype=dtype, **experts).eval().requires_grad_(False)
    for part in (model.get_decoder(), model.get_output_embeddings()):
        part.requires_grad_(True)
    return model


def logprobs_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([plain_logprobs(model, sequence) for sequence in SEQUENCES])


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The model folder of an architecture; each is made once."""
    return functools.cache(functools.partial(make_model, tmp_path_factory.mktemp("models")))


@pytest.mark.parametrize("architecture", MODELS)
def test_the_text_part_trains_and_the_original_class_loads_the_export(
    model_of: Callable[[str], Path], architecture: str, tmp_path: Path
) -> None:
    folder = model_of(architecture)
    engine = lora_engine(folder, tmp_path)
    engine.create_run("full")
    found = engine.forward_backward("full", 1, engine.stage(to_batch(SEQUENCES), CROSS_ENTROPY))
    wanted = Reference.of(lambda dtype: load(architecture, folder, dtype), SEQUENCES, cross_entropy_of(SEQUENCES))
    wanted.check_logprobs(found.logprobs_TK)
    wanted.check_gradients(engine.live_model("full").named_parameters())
    engine.optim_step("full", 2, AdamParams(learning_rate=1e-2))
    trained = engine.forward("full", 3, engine.stage(to_batch(SEQUENCES))).logprobs_TK
    assert np.abs(trained - found.logprobs_TK).max() > 1e-2
    saved = engine.save_weights_for_sampler("full", "a")
    exported, report = original(architecture).from_pretrained(
        saved.uri.removeprefix("file://"), output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    np.testing.assert_allclose(logprobs_of(exported.eval()), trained, rtol=0, atol=1e-4)
    before = load(architecture, folder).state_dict()
    seeing = [name for name in before if "visual" in name or "vision" in name]
    assert seeing
    assert all(torch.equal(exported.state_dict()[name], before[name]) for name in seeing)


@pytest.mark.parametrize("architecture", MODELS)
def test_its_adapters_are_plain_pefts_and_merge_into_the_original_class(
    model_of: Callable[[str], Path], architecture: str, tmp_path: Path
) -> None:
    engine = lora_engine(model_of(architecture), tmp_path, lora=ALL, resumed=ALL)
    randomize(engine, "lora")
    wanted = engine.forward("lora", 1, engine.stage(to_batch(SEQUENCES))).logprobs_TK
    engine.save_weights_for_sampler("lora", "adapter")
    engine.save_weights_for_sampler("lora", "merged", merged=True)
    folder = tmp_path / "lora" / "sampler_weights"
    adapted = PeftModel.from_pretrained(load(architecture, model_of(architecture)), str(folder / "adapter"))
    np.testing.assert_allclose(logprobs_of(adapted.eval().get_base_model()), wanted, rtol=0, atol=1e-4)
    np.testing.assert_allclose(logprobs_of(load(architecture, folder / "merged")), wanted, rtol=0, atol=1e-4)
    assert not any("vis" in name for name in engine.run_state("lora").adapted)


def test_what_reads_text_by_an_encoder_is_refused_in_a_sentence(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=VOCAB_SIZE, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(InvalidArgumentError, match="cannot be loaded as a causal language model") as caught:
        Engine(str(tmp_path / "t5"), device=CPU, checkpoint_dir=tmp_path)
    assert caught.value.metadata["field"] == "base_model"
