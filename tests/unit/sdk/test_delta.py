"""Deltas of sampler weights: lossless, small, verified, and refused without the base they were made from."""

import json
from pathlib import Path

import numpy as np
import pytest
from gradwire._wire import delta
from gradwire.errors import FailedPreconditionError, GradwireError
from gradwire.types import AdamParams

from tests.engines import RUN, forward_backward, make_batch, make_engine
from trainer_service.engine.engine import Engine
from trainer_service.engine.storage.deltas import whole_weights

WEIGHTS = "model.safetensors"


def train(engine: Engine, seed: int = 0, learning_rate: float = 1e-5) -> None:
    forward_backward(engine, batch=make_batch(5, 9, seed=seed))
    engine.optim_step(RUN, 1, AdamParams(learning_rate=learning_rate))


@pytest.fixture
def engine(tiny_llama: Path, tmp_path: Path) -> Engine:
    made = make_engine(tiny_llama, tmp_path)
    train(made)
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / RUN / "sampler_weights"


@pytest.mark.parametrize("size", [0, 1, 3, 4, 1000, 1003])
def test_what_is_expanded_is_what_was_compressed(size: int) -> None:
    rng = np.random.default_rng(size)
    base, changed = rng.bytes(size), rng.bytes(size)
    assert delta.expand(base, delta.compress(base, changed)) == changed
    assert delta.compress(base, base) == b""
    assert delta.expand(base, b"") == base


@pytest.mark.parametrize("compressed", [b"nonsense", delta.compress(bytes(8), b"12345678"), b"\0"])
def test_a_chunk_that_is_none_is_refused(compressed: bytes) -> None:
    with pytest.raises(ValueError, match=r"bytes instead of|decompress"):
        delta.expand(bytes(4), compressed)


def test_a_delta_and_its_base_make_the_very_files_a_base_would_be_and_it_is_smaller(
    engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Many chunks, the last one short.
    monkeypatch.setattr(delta, "_CHUNK_BYTES", 4096)
    engine.save_weights_for_sampler(RUN, "base")
    train(engine, seed=1)
    engine.save_weights_for_sampler(RUN, "delta", delta=True)
    engine.save_weights_for_sampler(RUN, "whole")
    with whole_weights(folder / "delta") as made:
        for path in (folder / "whole").iterdir():
            if path.name != "manifest.json":
                assert (made / path.name).read_bytes() == path.read_bytes(), path.name
    saved = json.loads((folder / "delta" / "manifest.json").read_text())
    assert (saved["checkpoint_type"], saved["base_path"]) == ("delta", f"gradwire://{RUN}/sampler_weights/base")
    assert not (folder / "delta" / WEIGHTS).exists()
    size_bytes = (folder / "delta" / "delta.safetensors").stat().st_size
    assert size_bytes < 0.8 * (folder / "whole" / WEIGHTS).stat().st_size


def test_deltas_build_on_the_newest_base(engine: Engine, folder: Path) -> None:
    for name, is_delta in (("a", False), ("b", False), ("c", True), ("d", True)):
        train(engine)
        engine.save_weights_for_sampler(RUN, name, delta=is_delta)
    for name in ("c", "d"):
        assert json.loads((folder / name / "delta.json").read_text())["base"]["path"].endswith("/b")


def test_an_unchanged_model_costs_next_to_nothing(engine: Engine, folder: Path) -> None:
    engine.save_weights_for_sampler(RUN, "base")
    engine.save_weights_for_sampler(RUN, "delta", delta=True)
    assert (folder / "delta" / "delta.safetensors").stat().st_size < 200


def test_a_delta_without_a_base_is_refused(engine: Engine, folder: Path) -> None:
    with pytest.raises(FailedPreconditionError, match='"a" cannot be saved as a delta: this run has saved no base'):
        engine.save_weights_for_sampler(RUN, "a", delta=True)
    assert not folder.exists() or not list(folder.iterdir())


def refusal(folder: Path) -> GradwireError:
    with pytest.raises(GradwireError) as caught, whole_weights(folder):
        pass
    return caught.value


def test_a_delta_whose_base_is_gone_or_changed_or_damaged_is_refused(engine: Engine, folder: Path) -> None:
    engine.save_weights_for_sampler(RUN, "base")
    train(engine)
    engine.save_weights_for_sampler(RUN, "delta", delta=True)
    (folder / "base").rename(folder / "away")
    assert refusal(folder / "delta").reason == "DELTA_BASE_UNUSABLE"
    engine.save_weights_for_sampler(RUN, "base")
    assert "saved anew" in refusal(folder / "delta").message
    content = bytearray((folder / "base" / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / "base" / WEIGHTS).write_bytes(content)
    with pytest.raises(FailedPreconditionError, match="is damaged") as caught:
        engine.save_weights_for_sampler(RUN, "another", delta=True)
    assert caught.value.reason == "DELTA_BASE_UNUSABLE"
    assert sorted(path.name for path in folder.iterdir()) == ["away", "base", "delta"]


@pytest.mark.parametrize("file", ["delta.json", "delta.safetensors"])
@pytest.mark.parametrize("at", [0, 0.5, 1])
def test_a_damaged_delta_is_refused(engine: Engine, folder: Path, file: str, at: float) -> None:
    engine.save_weights_for_sampler(RUN, "base")
    train(engine)
    engine.save_weights_for_sampler(RUN, "delta", delta=True)
    content = bytearray((folder / "delta" / file).read_bytes())
    content[min(int(at * len(content)), len(content) - 1)] ^= 0x55
    (folder / "delta" / file).write_bytes(content)
    assert refusal(folder / "delta").reason in ("CHECKPOINT_DAMAGED", "DELTA_BASE_UNUSABLE")
