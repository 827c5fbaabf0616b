"""What an export is written in: the base's dtype, or float32 on request; told, and ties kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gradwire.errors import GradwireError, InvalidArgumentError
from gradwire.types import AdamParams
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.trainer_service_pb2 import TrainRequest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.engines import RUN, forward_backward, make_engine
from tests.loras import ALL, BODY, lora_engine, randomize
from tests.tiny import make_tiny_llama
from trainer_service.checkpoints import manifests
from trainer_service.checkpoints.checkpoint import Checkpoint
from trainer_service.engine.engine import Engine
from trainer_service.engine.models.export import stored_dtype
from trainer_service.engine.storage.deltas import whole_weights
from trainer_service.engine.worker.operations import RunOperations
from trainer_service.paths import CheckpointPath
from trainer_service.rpc.checkpoint_servicer import _message
from trainer_service.served_model import ServedModel

WEIGHTS = "model.safetensors"


def base_in(folder: Path, dtype: torch.dtype, *, tied: bool = True) -> Path:
    """A tiny model whose files are in a dtype."""
    make_tiny_llama(folder, tied=tied)
    AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
    return folder


def trained(base: Path, checkpoint_dir: Path) -> Engine:
    engine = make_engine(base, checkpoint_dir)
    forward_backward(engine)
    engine.optim_step(RUN, 2, AdamParams(learning_rate=1e-2))
    return engine


def saved(engine: Engine, root: Path, name: str, run_id: str = RUN, **arguments: Any) -> Path:
    engine.save_weights_for_sampler(run_id, name, **arguments)
    return root / run_id / "sampler_weights" / name


def told(folder: Path) -> str:
    """What a caller is told of a checkpoint's dtype."""
    path = CheckpointPath(folder.parent.parent.name, "sampler_weights", folder.name)
    manifest = manifests.read(path, (folder / "manifest.json").read_bytes())
    return _message(Checkpoint(path, manifest, None), ServedModel("base")).dtype


@pytest.mark.parametrize("base", ["bfloat16", "float16", "float32"])
def test_an_export_is_in_the_bases_dtype_and_in_float32_on_request(tmp_path: Path, base: str):
    dtype: torch.dtype = getattr(torch, base)
    engine = trained(base_in(tmp_path / "base", dtype), tmp_path)
    live = dict(engine.live_model(RUN).named_parameters())
    for asked, wanted in dict.fromkeys((("", base), (base, base), ("float32", "float32"))):
        folder = saved(engine, tmp_path, f"a-{asked}", dtype=asked)
        tensors = load_file(folder / WEIGHTS)
        for name, tensor in tensors.items():
            assert torch.equal(tensor, live[name].to(getattr(torch, wanted))), name
        assert told(folder) == wanted
        assert json.loads((folder / "config.json").read_text())["dtype"] == wanted
        # As the hub's own tools would load it, without being told.
        assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == getattr(torch, wanted)
    # The run trains on in float32, as if nothing had been saved.
    assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in live.values())
    assert engine.live_model(RUN).config.dtype in (None, torch.float32, "float32")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("dtype", ["", "float32"])
def test_ties_are_kept_unless_the_head_itself_was_adapted(tmp_path: Path, tied: bool, head: bool, dtype: str):
    engine = lora_engine(base_in(tmp_path / "base", torch.bfloat16, tied=tied), tmp_path, lora=ALL if head else BODY)
    randomize(engine, "lora")
    folder = saved(engine, tmp_path, "m", "lora", merged=True, dtype=dtype)
    stays_tied = tied and not head
    assert ("lm_head.weight" in load_file(folder / WEIGHTS)) == (not stays_tied)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] == stays_tied
    assert told(folder) == (dtype or "bfloat16")
    assert {str(tensor.dtype) for tensor in load_file(folder / WEIGHTS).values()} == {f"torch.{told(folder)}"}
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == stays_tied


def test_a_full_run_keeps_its_tie(tmp_path: Path):
    engine = trained(base_in(tmp_path / "base", torch.bfloat16), tmp_path)
    assert "lm_head.weight" not in load_file(saved(engine, tmp_path, "a") / WEIGHTS)


def test_an_adapter_is_written_as_it_trains(tmp_path: Path):
    engine = lora_engine(base_in(tmp_path / "base", torch.bfloat16), tmp_path, lora=ALL)
    folder = saved(engine, tmp_path, "a", "lora")
    assert {tensor.dtype for tensor in load_file(folder / "adapter_model.safetensors").values()} == {torch.float32}
    assert told(folder) == "float32"
    with pytest.raises(InvalidArgumentError, match=r'dtype is "bfloat16"; it must be "float32"'):
        engine.save_weights_for_sampler("lora", "b", dtype="bfloat16")


@pytest.mark.parametrize("dtype", ["", "float32"])
def test_a_delta_is_in_the_dtype_of_its_base(tmp_path: Path, dtype: str):
    engine = trained(base_in(tmp_path / "base", torch.bfloat16), tmp_path)
    saved(engine, tmp_path, "base", dtype=dtype)
    forward_backward(engine)
    engine.optim_step(RUN, 3, AdamParams(learning_rate=1e-2))
    delta, whole = saved(engine, tmp_path, "delta", delta=True), saved(engine, tmp_path, "whole", dtype=dtype)
    assert told(delta) == told(whole) == (dtype or "bfloat16")
    with whole_weights(delta) as made:
        assert (made / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    other = "bfloat16" if dtype else "float32"
    with pytest.raises(InvalidArgumentError, match=f'dtype is "{other}"; it must be "{dtype or "bfloat16"}"'):
        engine.save_weights_for_sampler(RUN, "other", delta=True, dtype=other)


def test_a_dtype_that_is_none_and_one_that_cannot_hold_a_parameter_are_refused(tmp_path: Path):
    engine = trained(base_in(tmp_path / "base", torch.float16), tmp_path)
    for dtype in ("bfloat16", "float8", "x" * 10_000):
        with pytest.raises(InvalidArgumentError, match=r'it must be "float32" or "float16", as it trains') as caught:
            engine.save_weights_for_sampler(RUN, "a", dtype=dtype)
        assert caught.value.field_violations[0][0] == "dtype"
        assert len(caught.value.message) < 400
    next(engine.live_model(RUN).parameters()).data.fill_(1e5)
    with pytest.raises(InvalidArgumentError, match=r'dtype is "float16", in which .* is infinite; pass "float32"'):
        engine.save_weights_for_sampler(RUN, "a")
    assert not list((tmp_path / RUN / "sampler_weights").glob("*"))
    saved(engine, tmp_path, "a", dtype="float32")


def test_what_transformers_keeps_in_float32_stays_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    engine = trained(base_in(tmp_path / "base", torch.bfloat16), tmp_path)
    monkeypatch.setattr(engine.live_model(RUN), "_keep_in_fp32_modules_strict", {"norm"})
    tensors = load_file(saved(engine, tmp_path, "a") / WEIGHTS)
    assert tensors["model.norm.weight"].dtype == torch.float32
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16


def test_the_dtype_of_files_that_say_none_is_float32(tmp_path: Path):
    assert stored_dtype(tmp_path) == "float32"
    (tmp_path / "a.safetensors").write_bytes(b"nonsense")
    assert stored_dtype(tmp_path) == "float32"


def test_frozen_weights_have_no_dtype_of_their_own(tmp_path: Path, tiny_llama: Path):
    operations = RunOperations(make_engine(tiny_llama, tmp_path), sampling=None)
    save = ops.SaveWeightsForSamplerRequest(ephemeral=True, dtype="float32")
    with pytest.raises(GradwireError, match="ephemeral frozen weights have the dtype that trains"):
        operations.prepare(RUN, TrainRequest(seq_id=1, save_weights_for_sampler=save))
