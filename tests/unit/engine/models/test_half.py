"""LoRA beside a base model in bfloat16: what is kept, what trains, what is written."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradwire.errors import InvalidArgumentError
from torch import nn

from tests.engines import BATCH, CPU, CROSS_ENTROPY
from tests.loras import ALL, BODY, adapter, gradient, randomize
from tests.numerics.architectures import make_model
from tests.numerics.plain import load_plain
from tests.tiny import make_tiny_llama
from trainer_service.engine.device import Device
from trainer_service.engine.engine import Engine
from trainer_service.engine.models.half import HalfLinear
from trainer_service.engine.models.quantized import held_bytes
from trainer_service.engine.tensor_files import read_tensors
from trainer_service.worker_config import BaseDtype, EngineSettings

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings"),
]
IN_BFLOAT16 = Device(torch.device("cpu"), "cpu", torch.bfloat16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "llama", tied=False)


def make(folder: Path, checkpoint_dir: Path, base_dtype: BaseDtype, device: Device = CPU) -> Engine:
    settings = EngineSettings(base_dtype=base_dtype)
    return Engine(str(folder), device=device, checkpoint_dir=checkpoint_dir, settings=settings)


def is_matrix(name: str) -> bool:
    """Whether it is kept in bfloat16, by its name in the model."""
    return name.endswith(("_proj.weight", "experts.gate_up_proj", "experts.down_proj"))


def test_matrices_are_kept_in_bfloat16_and_memory_is_planned_for_that(folder: Path, tmp_path: Path) -> None:
    engine = make(folder, tmp_path, "bfloat16")
    engine.create_run("lora", lora=ALL)
    plain: Any = load_plain(folder)
    kept = {name: parameter.dtype for name, parameter in engine.base_model().named_parameters()}
    assert kept == {name: torch.bfloat16 if is_matrix(name) else torch.float32 for name in kept}
    size = sum(p.numel() * (2 if is_matrix(name) else 4) for name, p in plain.named_parameters())
    # Buffers come on top.
    assert size <= held_bytes(engine.base_model()) < size + 1000
    assert engine.model.dtype == "bfloat16"
    free = engine.device.total_bytes() - held_bytes(engine.base_model())
    assert engine.memory.max_held_graph_bytes + engine.memory.pass_bytes == free // 2
    with pytest.raises(InvalidArgumentError, match=r"keeps its base model in bfloat16 \(--base-dtype\)"):
        engine.create_run("full")


@pytest.mark.parametrize("base_dtype", ["float32", "bfloat16"])
def test_adapters_start_from_the_same_float32_numbers(base_dtype: BaseDtype, folder: Path, tmp_path: Path) -> None:
    engine = make(folder, tmp_path, base_dtype)
    engine.create_run("lora", lora=ALL)
    other = make(folder, tmp_path, "float32")
    other.create_run("lora", lora=ALL)
    for name, parameter in adapter(engine, "lora").items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, adapter(other, "lora")[name])


@pytest.mark.parametrize("name", ["llama", "Qwen3Moe"])
def test_what_is_computed_and_merged_is_that_of_the_same_base_made_float32(name: str, tmp_path: Path) -> None:
    made = make_tiny_llama(tmp_path / "m", tied=False) if name == "llama" else make_model(tmp_path / "m", name)
    plain: Any = load_plain(made)
    with torch.no_grad():
        for parameter_name, parameter in plain.named_parameters():
            if is_matrix(parameter_name):
                parameter.copy_(parameter.to(torch.bfloat16))
    plain.save_pretrained(tmp_path / "rounded")
    engine, other = make(made, tmp_path / "a", "bfloat16"), make(tmp_path / "rounded", tmp_path / "b", "float32")
    found: list[Any] = []
    for each in (engine, other):
        each.create_run("lora", lora=BODY)
        randomize(each, "lora")
        found.append(each.forward_backward("lora", 1, each.stage(BATCH, CROSS_ENTROPY)).logprobs_TK)
        each.save_weights_for_sampler("lora", "merged", merged=True, dtype="float32")
    # The weights are the same numbers, and so is every product.
    np.testing.assert_array_equal(*found)
    for name, parameter in adapter(engine, "lora").items():
        assert torch.equal(gradient(parameter), gradient(adapter(other, "lora")[name])), name
    merged, wanted = (
        read_tensors(tmp_path / each / "lora" / "sampler_weights" / "merged" / "model.safetensors") for each in "ab"
    )
    assert merged.keys() == wanted.keys()
    assert all(torch.equal(merged[name], wanted[name]) for name in wanted)


def test_auto_halves_what_adapters_share_where_that_changes_no_bit(folder: Path, tmp_path: Path) -> None:
    plain: Any = load_plain(folder, dtype=torch.bfloat16)
    plain.save_pretrained(tmp_path / "stored")
    engines = [make(tmp_path / "stored", tmp_path / each, each, IN_BFLOAT16) for each in ("auto", "float32")]
    found: list[Any] = []
    for engine in engines:
        engine.create_run("full")
        engine.create_run("lora", lora=ALL)
        randomize(engine, "lora")
        for run_id in ("full", "lora"):
            found.append(engine.forward_backward(run_id, 1, engine.stage(BATCH, CROSS_ENTROPY)).logprobs_TK)
    for got, wanted in zip(found[:2], found[2:], strict=True):
        np.testing.assert_array_equal(got, wanted)
    for run_id in ("full", "lora"):
        one, other = (adapter(engine, run_id) for engine in engines)
        for name, parameter in one.items():
            # What trains is in float32.
            assert parameter.dtype == torch.float32
            assert torch.equal(gradient(parameter), gradient(other[name])), (run_id, name)
    halved, whole = (engine.run_state("lora").model.state_dict() for engine in engines)
    assert {tensor.dtype for tensor in whole.values()} == {torch.float32}
    names = [name for name, tensor in halved.items() if tensor.dtype == torch.bfloat16]
    assert len(names) == 7 * 2


@pytest.mark.parametrize(("stored", "device"), [(torch.float32, IN_BFLOAT16), (torch.bfloat16, CPU)])
def test_auto_halves_nothing_where_something_would_be_lost(
    stored: torch.dtype, device: Device, folder: Path, tmp_path: Path
) -> None:
    plain: Any = load_plain(folder, dtype=stored)
    plain.save_pretrained(tmp_path / "stored")
    engine = make(tmp_path / "stored", tmp_path, "auto", device)
    engine.create_run("lora", lora=ALL)
    assert {p.dtype for p in engine.base_model().parameters()} == {torch.float32}


def test_no_float32_copy_of_a_weight_outlives_its_product() -> None:
    layer: Any = nn.Linear(8, 4).to(torch.bfloat16).requires_grad_(False)
    layer.__class__ = HalfLinear
    x = torch.randn(3, 8, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = layer(x)
    assert saved == []
    y.sum().backward()
    wanted = layer.weight.float().sum(0).expand(3, 8)
    torch.testing.assert_close(x.grad, wanted)
