"""Adapters of experts, and of what mixes tokens in place of attention, are plain peft's: gradients, files, names."""

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gradwire.errors import InvalidArgumentError
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from tests.engines import CROSS_ENTROPY
from tests.loras import ALL, adapter, check_comes_back, lora_engine, randomize
from tests.numerics.plain import Reference, cross_entropy_of, load_plain, plain_logprobs, random_sequences, to_batch
from tests.tiny import VOCAB_SIZE

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings"),
]
SEQUENCES = random_sequences((9, 1, 23, 16), vocab_size=VOCAB_SIZE)
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "num_experts_per_tok": 2,
}
_ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
_MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8}
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 16, "mlp_only_layers": [0]},
    "Qwen2Moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
    "Mixtral": {"num_local_experts": 4},
    "GptOss": {"head_dim": 8, "num_local_experts": 4, "rope_parameters": None},
    "Glm4Moe": {"head_dim": 8, **_ROUTED, "first_k_dense_replace": 1},
    "DeepseekV3": {
        **_ROUTED,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "NemotronH": {
        **_ROUTED,
        **_MAMBA,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "attention", "moe", "mlp"],
        "head_dim": 8,
        "moe_shared_expert_intermediate_size": 16,
    },
    "Mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "JetMoe": {"num_local_experts": 4, "kv_channels": 8},
}


def make_model(folder: Path, architecture: str) -> Path:
    """A tiny random model of the architecture, as a Hugging Face folder."""
    config = getattr(transformers, f"{architecture}Config")(**{**_COMMON, **MODELS[architecture]})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / architecture)
    return folder / architecture


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The model folder of an architecture; each is made once."""
    return functools.cache(functools.partial(make_model, tmp_path_factory.mktemp("models")))


@pytest.mark.parametrize("architecture", MODELS)
def test_logprobs_and_gradients_are_those_of_plain_peft_that_loads_what_was_saved(
    model_of: Callable[[str], Path], architecture: str, tmp_path: Path
) -> None:
    folder = model_of(architecture)
    engine = lora_engine(folder, tmp_path, lora=ALL)
    randomize(engine, "lora")
    engine.save_weights_for_sampler("lora", "adapter")
    found = engine.forward_backward("lora", 1, engine.stage(to_batch(SEQUENCES), CROSS_ENTROPY))

    def load(dtype: torch.dtype) -> Any:
        saved = str(tmp_path / "lora" / "sampler_weights" / "adapter")
        model = PeftModel.from_pretrained(load_plain(folder, dtype=dtype), saved, is_trainable=True)
        return model.eval().to(dtype).get_base_model()

    wanted = Reference.of(load, SEQUENCES, cross_entropy_of(SEQUENCES))
    wanted.check_logprobs(found.logprobs_TK)
    wanted.check_gradients(adapter(engine, "lora").items())


@pytest.mark.parametrize("architecture", MODELS)
def test_an_adapter_goes_out_and_comes_back_whole(
    model_of: Callable[[str], Path], architecture: str, tmp_path: Path
) -> None:
    folder = model_of(architecture)
    engine = lora_engine(folder, tmp_path, lora=ALL, resumed=ALL)
    wanted = check_comes_back(engine, SEQUENCES)
    saved = tmp_path / "lora" / "sampler_weights"
    merged = load_plain(saved / "merged")
    with torch.no_grad():
        found = torch.cat([plain_logprobs(merged, sequence) for sequence in SEQUENCES])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


ADAPTED = {
    "Qwen2Moe": (
        "model.layers.*.mlp.experts.down_proj model.layers.*.mlp.experts.gate_up_proj "
        "model.layers.*.mlp.shared_expert.down_proj model.layers.*.mlp.shared_expert.gate_proj "
        "model.layers.*.mlp.shared_expert.up_proj",
        "model.layers.*.mlp.gate.weight model.layers.*.mlp.shared_expert_gate.weight",
    ),
    "NemotronH": (
        "model.layers.*.mixer.down_proj model.layers.*.mixer.experts.down_proj model.layers.*.mixer.experts.up_proj "
        "model.layers.*.mixer.shared_experts.down_proj model.layers.*.mixer.shared_experts.up_proj "
        "model.layers.*.mixer.up_proj",
        # Plain peft refuses out_proj beside Mamba, whose kernels read its weight without calling it.
        "model.layers.*.mixer.conv1d.weight model.layers.*.mixer.gate.weight model.layers.*.mixer.out_proj.weight",
    ),
}


@pytest.mark.parametrize("architecture", ADAPTED)
def test_train_mlp_means_experts_too_and_what_is_left_out_is_said(
    model_of: Callable[[str], Path], architecture: str, tmp_path: Path
) -> None:
    mlp, others = (text.split() for text in ADAPTED[architecture])
    engine = lora_engine(
        model_of(architecture), tmp_path, mlp=replace(ALL, train_attn=False, train_unembed=False), all=ALL
    )
    assert list(engine.run_state("mlp").adapted) == mlp
    assert list(engine.run_state("all").left_out) == others
    left_out = {*engine.run_state("all").adapted, *others} - set(mlp)
    assert set(engine.run_state("mlp").left_out) == left_out
    saved = engine.save_state("mlp", "a")
    about = json.loads((Path(saved.uri.removeprefix("file://")) / "manifest.json").read_text())["lora"]
    assert about["adapted"].split() == mlp
    assert set(about["left_out"].split()) == left_out


def test_a_kind_that_a_model_lacks_is_left_out_and_refused_only_where_nothing_is_left(
    model_of: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = lora_engine(model_of("Mamba2"), tmp_path, lora=ALL)
    assert engine.run_state("lora").lora == replace(ALL, seed=0, train_mlp=False)
    assert "train_mlp has no effect" in caplog.text
    with pytest.raises(InvalidArgumentError, match="train_mlp is true, but Mamba2ForCausalLM has nothing of that kind"):
        engine.create_run("none", lora=replace(ALL, train_attn=False, train_unembed=False))


def test_no_copy_of_the_experts_weights_is_made(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Neither forward nor backward makes a tensor of three dimensions that is as large as they are."""
    engine = lora_engine(model_of("Mixtral"), tmp_path, lora=ALL)
    model = engine.live_model("lora")
    large = min(parameter.numel() for parameter in model.parameters() if parameter.ndim == 3)
    held = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    made: list[tuple[int, ...]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **kwargs or {})
            for tensor in found if isinstance(found, tuple | list) else [found]:
                stacked = isinstance(tensor, torch.Tensor) and tensor.ndim == 3 and tensor.numel() >= large
                if stacked and tensor.untyped_storage().data_ptr() not in held:
                    made.append(tuple(tensor.shape))
            return found

    with Watch():
        engine.forward_backward("lora", 1, engine.stage(to_batch(SEQUENCES), CROSS_ENTROPY))
    assert made == []


@pytest.mark.parametrize("architecture", ["Mixtral", "Qwen3Moe"])
def test_an_adapter_of_older_transformers_with_layers_for_every_expert_goes_on(
    model_of: Callable[[str], Path], architecture: str, tmp_path: Path
) -> None:
    engine = lora_engine(model_of(architecture), tmp_path, lora=ALL)
    randomize(engine, "lora")
    saved = engine.save_weights_for_sampler("lora", "a")
    folder = shutil.copytree(saved.uri.removeprefix("file://"), tmp_path / "adapter")
    gate, down, up = ("w1", "w2", "w3") if architecture == "Mixtral" else ("gate_proj", "down_proj", "up_proj")
    older: dict[str, torch.Tensor] = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        layer, stacked, end = key.partition(".experts.")
        if not stacked:
            older[key] = tensor
            continue
        names = (gate, up) if end.startswith("base_layer.") else (down,)
        end = end.removeprefix("base_layer.")
        for expert in range(4):
            # An expert's rows of the first matrix are behind one another; its columns of the second are apart.
            own = tensor.chunk(4)[expert] if "lora_A" in end else tensor[:, expert::4]
            parts = [own] * len(names) if "lora_A" in end else own.chunk(len(names))
            for name, part in zip(names, parts, strict=True):
                older[f"{layer}.experts.{expert}.{name}.{end}"] = part.clone()
    save_file(older, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"target_parameters": None, "target_modules": [*config["target_modules"], gate, up, down]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    engine.create_run("older", adapter=str(folder))
    engine.save_weights_for_sampler("older", "again")
    engine.create_run("again", adapter=str(tmp_path / "older" / "sampler_weights" / "again"))
    wanted = engine.forward("lora", 1, engine.stage(to_batch(SEQUENCES))).logprobs_TK
    for run_id in ("older", "again"):
        found = engine.forward(run_id, 1, engine.stage(to_batch(SEQUENCES))).logprobs_TK
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
