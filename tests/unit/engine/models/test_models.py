"""Loading models, and exports that plain transformers loads."""

import errno
import gc
import json
import os
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from gradwire.errors import AlreadyExistsError, FailedPreconditionError, InvalidArgumentError
from gradwire.types import AdamParams
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.engines import CPU, RUN, forward_backward, make_batch, make_engine
from tests.tiny import MAX_CONTEXT_LENGTH, VOCAB_SIZE, make_tiny_llama
from trainer_service import atomic_folders
from trainer_service.engine.engine import Engine


def load_engine(base_model: str, tmp_path: Path, **settings: Any) -> Engine:
    return Engine(base_model, device=CPU, checkpoint_dir=tmp_path / "checkpoints", **settings)


def refusal(base_model: str, tmp_path: Path) -> str:
    with pytest.raises(InvalidArgumentError) as caught:
        load_engine(base_model, tmp_path)
    assert caught.value.metadata["field"] == "base_model"
    assert base_model in caught.value.message
    return caught.value.message


def changed(folder: Path, tmp_path: Path, **settings: Any) -> Path:
    """A copy of the model whose config differs."""
    copy = shutil.copytree(folder, tmp_path / "changed")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **settings}))
    return copy


def test_description_says_what_was_loaded(tiny_llama: Path, tmp_path: Path) -> None:
    model = load_engine(str(tiny_llama), tmp_path).model
    assert model.base_model == str(tiny_llama)
    assert model.architecture == "LlamaForCausalLM"
    assert model.vocab_size == VOCAB_SIZE
    assert model.max_context_length == MAX_CONTEXT_LENGTH
    assert model.dtype == "float32"
    stored = load_file(tiny_llama / "model.safetensors")
    assert model.num_parameters == sum(tensor.numel() for tensor in stored.values())


@pytest.mark.parametrize(("asked", "taken"), [(0, MAX_CONTEXT_LENGTH), (16, 16), (1 << 20, MAX_CONTEXT_LENGTH)])
def test_context_length_is_the_lesser_of_the_model_s_and_the_trainer_s(
    tiny_llama: Path, tmp_path: Path, asked: int, taken: int
) -> None:
    assert load_engine(str(tiny_llama), tmp_path, max_context_length=asked).model.max_context_length == taken


@pytest.mark.parametrize(
    ("rope", "own", "asked", "taken"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 32, 0, 128),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 32, 100, 100),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128, 0, 128),
        ({"rope_type": "yarn", "factor": 4.0}, 32, 0, 128),
        ({"type": "dynamic", "factor": 2.0}, 32, 0, 64),
        ({"rope_type": "linear", "factor": 2.0}, 32, 0, 32),
        ({"rope_type": "default"}, 32, 0, 32),
    ],
)
def test_context_length_reaches_as_far_as_positions_are_scaled(
    tiny_llama: Path, tmp_path: Path, rope: dict[str, Any], own: int, asked: int, taken: int
) -> None:
    rope = {"rope_theta": 10000.0, **rope}
    folder = changed(tiny_llama, tmp_path, rope_parameters=rope, max_position_embeddings=own)
    engine = load_engine(str(folder), tmp_path, max_context_length=asked)
    assert engine.model.max_context_length == taken


def test_what_a_longer_sequence_left_behind_changes_no_shorter_one(tiny_llama: Path, tmp_path: Path) -> None:
    """Rotary embeddings that grow with the sequence keep, by themselves, the angles of the longest there was."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    folder = changed(tiny_llama, tmp_path, rope_parameters=rope, max_position_embeddings=16)
    lengths = (16, 20, 10)

    def logprobs(engine: Engine, length: int) -> npt.NDArray[np.float32]:
        return engine.forward(RUN, 1, engine.stage(make_batch(length))).logprobs_TK

    wanted = [logprobs(make_engine(folder, tmp_path), length) for length in lengths]
    engine = make_engine(folder, tmp_path)
    assert engine.traits.batching.endswith("; beyond 16 tokens by length")
    logprobs(engine, 60)
    for length, alone in zip(lengths, wanted, strict=True):
        np.testing.assert_array_equal(logprobs(engine, length), alone)
        logprobs(engine, 60)


def test_bfloat16_model_trains_in_float32(tiny_llama: Path, tmp_path: Path) -> None:
    folder = changed(tiny_llama, tmp_path, dtype="bfloat16")
    stored = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    engine = make_engine(folder, tmp_path)
    assert {parameter.dtype for parameter in engine.live_model(RUN).parameters()} == {torch.float32}


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in refusal(str(tmp_path / "nothing"), tmp_path)


def test_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    assert "without config.json" in refusal(str(tmp_path), tmp_path)


def test_hub_id_that_cannot_be_had_is_refused(tmp_path: Path) -> None:
    assert "hub" in refusal("gradwire/no-such-model", tmp_path)


def test_model_that_is_no_causal_one_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    folder = changed(tiny_llama, tmp_path, architectures=["BertForMaskedLM"], model_type="bert")
    assert "BertForMaskedLM, which is no causal language model" in refusal(str(folder), tmp_path)


def test_unknown_architecture_is_refused_in_a_sentence(tiny_llama: Path, tmp_path: Path) -> None:
    folder = changed(tiny_llama, tmp_path, architectures=["FooForCausalLM"], model_type="foo")
    assert "cannot be loaded as a causal language model" in refusal(str(folder), tmp_path)


def test_missing_parameters_are_refused_not_made_up(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "lacking")
    stored = load_file(folder / "model.safetensors")
    del stored["model.norm.weight"]
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 parameters of LlamaForCausalLM, for example model.norm.weight" in refusal(str(folder), tmp_path)


@pytest.mark.parametrize("kept", [0, 100])
def test_truncated_file_is_refused(tiny_llama: Path, tmp_path: Path, kept: int) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "truncated")
    os.truncate(folder / "model.safetensors", kept)
    refusal(str(folder), tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_plain_transformers_loads_the_export_as_trained(tmp_path: Path, tied: bool) -> None:
    engine = make_engine(make_tiny_llama(tmp_path / "base", tied=tied), tmp_path / "checkpoints")
    forward_backward(engine, 1)
    engine.optim_step(RUN, 2, AdamParams(learning_rate=1e-2))
    saved = engine.save_weights_for_sampler(RUN, "step-1")
    folder = tmp_path / "checkpoints" / RUN / "sampler_weights" / "step-1"
    assert saved.path == f"gradwire://{RUN}/sampler_weights/step-1"
    assert saved.uri == folder.as_uri()
    assert saved.size_bytes == sum(path.stat().st_size for path in folder.iterdir())
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for (name, ours), theirs in zip(engine.live_model(RUN).named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("Hi there").input_ids) == "Hi there"
    assert "user: Hi" in tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    # The export is only data: nothing in it runs code when loaded, and nothing tells where it was made.
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors", ".jinja"}
    assert str(tmp_path) not in (folder / "config.json").read_text()
    # An export is a base model like any other.
    again = make_engine(folder, tmp_path / "more")
    assert torch.equal(next(again.live_model(RUN).parameters()), next(engine.live_model(RUN).parameters()))


def test_overwrite_replaces_and_leaves_nothing_beside(tiny_llama: Path, tmp_path: Path) -> None:
    engine = make_engine(tiny_llama, tmp_path)
    engine.save_weights_for_sampler(RUN, "a")
    folder = tmp_path / RUN / "sampler_weights"
    before = (folder / "a" / "model.safetensors").read_bytes()
    with pytest.raises(AlreadyExistsError):
        engine.save_weights_for_sampler(RUN, "a")
    forward_backward(engine, 1)
    engine.optim_step(RUN, 2, AdamParams(learning_rate=1e-2))
    engine.save_weights_for_sampler(RUN, "a", overwrite=True)
    assert (folder / "a" / "model.safetensors").read_bytes() != before
    assert [path.name for path in folder.iterdir()] == ["a"]


@pytest.mark.parametrize("at", ["space", "write", "sync"])
def test_full_disk_leaves_nothing_behind_and_the_old_export_in_place(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    engine = make_engine(tiny_llama, tmp_path)
    engine.save_weights_for_sampler(RUN, "a")
    folder = tmp_path / RUN / "sampler_weights"
    before = (folder / "a" / "model.safetensors").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        if at == "space":
            usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
            patched.setattr(atomic_folders.shutil, "disk_usage", lambda _: usage)
        elif at == "write":
            patched.setattr(type(engine.live_model(RUN).config), "save_pretrained", full)
        else:
            patched.setattr(atomic_folders.os, "fsync", full)
        with pytest.raises(FailedPreconditionError) as caught:
            engine.save_weights_for_sampler(RUN, "a", overwrite=True)
    assert caught.value.reason == "STORAGE_FAILED"
    assert str(folder) in caught.value.message
    assert [path.name for path in folder.iterdir()] == ["a"]
    assert (folder / "a" / "model.safetensors").read_bytes() == before
    engine.save_weights_for_sampler(RUN, "b")


def test_what_a_killed_worker_left_is_cleared_and_what_it_moved_comes_back(tiny_llama: Path, tmp_path: Path) -> None:
    engine = make_engine(tiny_llama, tmp_path)
    folder = tmp_path / RUN / "sampler_weights"
    engine.save_weights_for_sampler(RUN, "a")
    (folder / "a").rename(folder / ".replaced-a")
    (folder / ".partial-a-0123").mkdir()
    engine.save_weights_for_sampler(RUN, "b")
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]


def test_a_deleted_run_s_parameters_go_at_once(tiny_llama: Path, tmp_path: Path) -> None:
    """Not when Python next looks for cycles: until then a large model's would not fit beside the next one's."""
    engine = make_engine(tiny_llama, tmp_path / "checkpoints")
    forward_backward(engine)
    engine.optim_step(RUN, 1, AdamParams())
    alive = weakref.WeakSet(engine.run_state(RUN).trained_parameters().values())
    assert alive
    gc.disable()
    try:
        engine.delete_run(RUN)
        assert not list(alive)
    finally:
        gc.enable()
