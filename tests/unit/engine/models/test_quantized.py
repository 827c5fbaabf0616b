"""LoRA beside a base model in 8 and 4 bits: what is kept, what trains, what is written."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradwire.errors import InvalidArgumentError
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.engines import BATCH, CPU, CROSS_ENTROPY
from tests.loras import ALL, BODY, adapter, gradient, randomize
from tests.numerics.plain import load_plain, plain_logprobs, random_sequences, relative_error, to_batch
from tests.tiny import VOCAB_SIZE, make_tiny_llama
from trainer_service.engine.engine import Engine
from trainer_service.engine.models.quantized import QuantizedLinear, held_bytes, quantize
from trainer_service.worker_config import BaseDtype, EngineSettings

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings"),
]
SEQUENCES = random_sequences((9, 1, 23, 16), vocab_size=VOCAB_SIZE)
BITS = {"int8": 8, "int4": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "llama", tied=False)


def make(folder: Path, checkpoint_dir: Path, base_dtype: BaseDtype) -> Engine:
    pytest.importorskip("bitsandbytes")
    settings = EngineSettings(base_dtype=base_dtype)
    engine = Engine(str(folder), device=CPU, checkpoint_dir=checkpoint_dir, settings=settings)
    engine.create_run("lora", lora=ALL)
    randomize(engine, "lora")
    return engine


@pytest.mark.parametrize("base_dtype", BITS)
def test_a_run_computes_what_plain_transformers_does_with_the_merged_model(
    folder: Path, tmp_path: Path, base_dtype: BaseDtype
) -> None:
    engine = make(folder, tmp_path, base_dtype)
    found = engine.forward("lora", 1, engine.stage(to_batch(SEQUENCES))).logprobs_TK
    saved = engine.save_weights_for_sampler("lora", "merged", merged=True, dtype="float32")
    merged: Any = load_plain(Path(saved.uri.removeprefix("file://")))
    with torch.no_grad():
        wanted = torch.cat([plain_logprobs(merged, sequence) for sequence in SEQUENCES])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    # The bits are really gone.
    adapted: Any = engine.live_model("lora").get_submodule("model.layers.0.mlp.up_proj")
    kept = adapted.get_base_layer()
    plain: Any = load_plain(folder)
    before = dict(plain.named_parameters())["model.layers.0.mlp.up_proj.weight"]
    assert 1e-3 < relative_error(kept.weight, before) < {"int8": 0.03, "int4": 0.15}[base_dtype]
    assert kept.quantized.numel() * kept.quantized.itemsize * 8 == before.numel() * BITS[base_dtype]
    assert engine.model.dtype == base_dtype


def made_whole(layer: QuantizedLinear) -> torch.Tensor:
    """The weight that a layer's bits stand for, by plain arithmetic."""
    if layer.base_dtype == "int8":
        return layer.quantized * layer.scales[:, None] / 127
    # Two values a byte, the first in its upper half; each block of 64 has a scale.
    halves = torch.stack([layer.quantized >> 4, layer.quantized & 15], dim=-1).flatten().long()
    values = (layer.code[halves].view(-1, 64) * layer.scales[:, None]).flatten()
    return values[: layer.out_features * layer.in_features].view(layer.out_features, layer.in_features)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama none of whose layers has rows of whole blocks, of 40 and 84 values, and some an odd number of blocks."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=40,
        intermediate_size=84,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    path = tmp_path_factory.mktemp("model") / "odd"
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("shape", ["folder", "odd"])
@pytest.mark.parametrize("base_dtype", BITS)
def test_gradients_are_those_of_the_same_base_made_whole(
    request: pytest.FixtureRequest, tmp_path: Path, base_dtype: BaseDtype, shape: str
) -> None:
    folder: Path = request.getfixturevalue(shape)
    engine = make(folder, tmp_path / "one", base_dtype)
    engine.create_run("part", lora=BODY)
    whole = {
        f"{name}.weight": made_whole(module)
        for name, module in engine.base_model().named_modules()
        if isinstance(module, QuantizedLinear)
    }
    assert len(whole) == 7 * 2
    plain: Any = load_plain(folder)
    plain.load_state_dict(whole, strict=False)
    plain.save_pretrained(tmp_path / "whole")
    other = Engine(str(tmp_path / "whole"), device=CPU, checkpoint_dir=tmp_path / "two")
    for run_id, settings in (("lora", ALL), ("part", BODY)):
        other.create_run(run_id, lora=settings)
        randomize(engine, run_id)
        randomize(other, run_id)
        for each in (engine, other):
            each.forward_backward(run_id, 1, each.stage(BATCH, CROSS_ENTROPY))
        wanted = adapter(other, run_id)
        for name, parameter in adapter(engine, run_id).items():
            assert relative_error(gradient(parameter), gradient(wanted[name])) < 1e-5, name


@pytest.mark.parametrize("shape_OI", [(64, 32), (48, 96), (10, 100), (3, 7)])
def test_rows_that_are_no_whole_blocks_lose_no_more_than_others(shape_OI: tuple[int, int]) -> None:
    layer = nn.Linear(shape_OI[1], shape_OI[0], bias=False).requires_grad_(False)
    before = layer.weight.detach().clone()
    quantize(layer, [""], "int4")
    assert relative_error(layer.weight, before) < 0.15


@pytest.mark.parametrize("base_dtype", BITS)
def test_memory_is_planned_for_the_bits_that_are_kept(folder: Path, tmp_path: Path, base_dtype: BaseDtype) -> None:
    engine = make(folder, tmp_path, base_dtype)
    plain: Any = load_plain(folder)
    layers = {
        name for name, module in plain.named_modules() if isinstance(module, nn.Linear) and name.startswith("model")
    }
    kept = sum(plain.get_submodule(name).weight.numel() * BITS[base_dtype] // 8 for name in layers)
    others = sum(p.numel() * 4 for name, p in plain.named_parameters() if name.removesuffix(".weight") not in layers)
    # Scales and codes come on top: of rows, or of blocks.
    assert kept + others < held_bytes(engine.base_model()) < 1.2 * (kept + others)
    free = engine.device.total_bytes() - held_bytes(engine.base_model())
    assert engine.memory.max_held_graph_bytes + engine.memory.pass_bytes == free // 2


def test_runs_share_what_is_kept_and_all_parameters_never_train(folder: Path, tmp_path: Path) -> None:
    engine = make(folder, tmp_path, "int4")
    engine.create_run("other", lora=BODY)
    kept = [
        {name: buffer.data_ptr() for name, buffer in engine.live_model(run_id).named_buffers() if "quantized" in name}
        for run_id in ("lora", "other")
    ]
    assert set(kept[0].values()) == set(kept[1].values())
    with pytest.raises(InvalidArgumentError, match=r"keeps its base model in int4 \(--base-dtype\)") as caught:
        engine.create_run("full")
    assert caught.value.metadata["field"] == "lora_rank"


def test_bits_that_cannot_be_had_are_refused_in_a_sentence(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(InvalidArgumentError, match=r"needs bitsandbytes .*pip install 'gradwire\[quantized\]'"):
        Engine(str(folder), device=CPU, checkpoint_dir=tmp_path, settings=EngineSettings(base_dtype="int8"))
