"""A run's state on disk: what goes in comes out bit for bit, whole or not at all, and damage is seen."""

import errno
import hashlib
import itertools
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradwire.errors import AlreadyExistsError, DataLossError, FailedPreconditionError, GradwireError
from gradwire.types import AdamParams
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from tests.engines import BATCH, RUN, forward_backward, make_batch, make_engine
from tests.tiny import make_tiny_llama
from trainer_service import atomic_folders
from trainer_service.engine.engine import Engine
from trainer_service.engine.models.lora import LoraSettings
from trainer_service.engine.run_state import RunState
from trainer_service.engine.storage.state_files import State, capture, open_state, write_state

STEP = AdamParams(learning_rate=1e-2, weight_decay=0.1)
ABOUT = {"architecture": "LlamaForCausalLM"}


def run_of(engine: Engine, run_id: str = RUN) -> RunState:
    return engine._run(run_id)


def train(engine: Engine, seeds: range, run_id: str = RUN) -> None:
    for seed in seeds:
        forward_backward(engine, batch=make_batch(5, 9, 3, seed=seed), run_id=run_id)
        engine.optim_step(run_id, 1, STEP)


def everything(run: RunState) -> dict[str, torch.Tensor]:
    state = capture(run, gradients=True).copied()
    return {
        f"{group}/{name}": tensor
        for group in ("parameters", "optimizer", "gradients")
        for name, tensor in getattr(state, group).items()
    }


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def engine(tiny_llama: Path, tmp_path: Path) -> Engine:
    return make_engine(tiny_llama, tmp_path / "checkpoints")


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit_and_a_cold_start_is_not(
    engine: Engine, tmp_path: Path
) -> None:
    train(engine, range(3))
    forward_backward(engine, batch=make_batch(4, 4))
    write_state(capture(run_of(engine), gradients=True), tmp_path / "a", about=ABOUT)
    forward_backward(engine, batch=make_batch(6, 2))
    engine.optim_step(RUN, 1, STEP)
    train(engine, range(3, 6))
    uninterrupted = everything(run_of(engine))

    def resumed(run_id: str, **what: bool) -> dict[str, torch.Tensor]:
        engine.create_run(run_id)
        open_state(tmp_path / "a").restore(run_of(engine, run_id), **what)
        assert run_of(engine, run_id).step == 3
        forward_backward(engine, batch=make_batch(6, 2), run_id=run_id)
        engine.optim_step(run_id, 1, STEP)
        train(engine, range(3, 6), run_id)
        return everything(run_of(engine, run_id))

    assert same(resumed("all", optimizer=True, gradients=True), uninterrupted)
    assert not same(resumed("no-optimizer", optimizer=False, gradients=True), uninterrupted)
    assert not same(resumed("no-gradients", optimizer=True), uninterrupted)


def test_counters_and_taint_come_back(engine: Engine, tmp_path: Path) -> None:
    forward_backward(engine)
    passed = run_of(engine).accumulation
    write_state(capture(run_of(engine), gradients=True), tmp_path / "a", about=ABOUT)
    engine.fail_pass(RUN, 7)
    write_state(capture(run_of(engine), gradients=True), tmp_path / "tainted", about=ABOUT)
    open_state(tmp_path / "a").restore(run_of(engine), optimizer=True, gradients=True)
    assert run_of(engine).accumulation == passed
    open_state(tmp_path / "tainted").restore(run_of(engine), optimizer=True, gradients=True)
    assert run_of(engine).accumulation.failed_seq_id == 7


def test_no_operation_draws_from_torchs_generator_which_no_state_has(engine: Engine) -> None:
    engine.create_run("lora", lora=LoraSettings(rank=2))
    before = torch.get_rng_state()
    for run_id in (RUN, "lora"):
        engine.forward(run_id, 1, engine.stage(BATCH), keep_graph=True)
        engine.backward(run_id, 2, forward_seq_id=1, gradients_TK=np.ones(BATCH.num_tokens, dtype=np.float32))
        train(engine, range(1), run_id)
    engine.create_run("another", lora=LoraSettings(rank=2))
    assert torch.equal(torch.get_rng_state(), before)


class Memory(TorchDispatchMode):
    """A device with room for so many more tensors, scalars apart."""

    ALLOCATE = ("_to_copy", "clone", "empty", "empty_like", "empty_strided", "zeros", "zeros_like")

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in self.ALLOCATE and made.numel() > 1:
            if not self.room:
                raise torch.OutOfMemoryError("no room")
            self.room -= 1
        return made


def test_a_load_that_runs_out_of_memory_anywhere_changes_nothing(engine: Engine, tmp_path: Path) -> None:
    train(engine, range(1))
    forward_backward(engine)
    write_state(capture(run_of(engine), gradients=True), tmp_path / "a", about=ABOUT)
    saved, state = everything(run_of(engine)), open_state(tmp_path / "a")
    engine.create_run("other")
    run = run_of(engine, "other")
    forward_backward(engine, run_id="other", batch=make_batch(4, seed=9))
    before, accumulation = everything(run), run.accumulation

    def fits(room: int) -> bool:
        try:
            with Memory(room):
                state.restore(run, optimizer=True, gradients=True)
        except torch.OutOfMemoryError:
            assert same(everything(run), before)
            assert (run.step, run.accumulation) == (0, accumulation)
            return False
        return True

    tried = next(room for room in itertools.count() if fits(room))
    assert tried >= 3 * len(run.trained_parameters())
    assert same(everything(run), saved)


def test_a_load_into_a_run_with_moments_needs_no_memory_for_more(engine: Engine, tmp_path: Path) -> None:
    train(engine, range(1))
    write_state(capture(run_of(engine), gradients=False), tmp_path / "a", about=ABOUT)
    saved, state = everything(run_of(engine)), open_state(tmp_path / "a")
    train(engine, range(1, 3))
    with Memory(room=0):
        state.restore(run_of(engine), optimizer=True)
    assert same(everything(run_of(engine)), saved)


def test_a_copy_is_what_was_there_when_it_was_made(engine: Engine, tmp_path: Path) -> None:
    train(engine, range(2))
    then = everything(run_of(engine))
    copy = capture(run_of(engine), gradients=True).copied()
    train(engine, range(2, 4))
    assert not same(everything(run_of(engine)), then)
    write_state(copy, tmp_path / "a", about=ABOUT)
    open_state(tmp_path / "a").restore(run_of(engine), optimizer=True, gradients=True)
    assert same(everything(run_of(engine)), then)


def test_the_files_are_plain_safetensors_and_json(engine: Engine, tmp_path: Path) -> None:
    train(engine, range(1))
    size_bytes = write_state(capture(run_of(engine), gradients=True), tmp_path / "a", about=ABOUT)
    files = {path.name: path for path in (tmp_path / "a").iterdir()}
    assert set(files) == {
        "parameters.safetensors",
        "optimizer.safetensors",
        "state.json",
        "manifest.json",
    }
    assert size_bytes == sum(path.stat().st_size for path in files.values())
    assert load_file(files["parameters.safetensors"]).keys() == run_of(engine).trained_parameters().keys()
    assert json.loads(files["state.json"].read_text())["step"] == 1


def test_tensors_larger_than_a_chunk_of_every_dtype_and_scalars_survive(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(3, 1_000_003, generator=generator)
    tensors = {
        "large": large,
        "turned": large.T,
        "bf16": large[0].bfloat16(),
        "f16": large[0, :7].half(),
        "scalar": torch.tensor(3.5),
        "int64": torch.arange(5),
        "empty": torch.empty(0, 4),
    }
    write_state(State(tensors, {}, {}, {}), tmp_path / "a", about={})
    loaded = load_file(tmp_path / "a" / "parameters.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name


Break = Callable[[Path], object]


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["parameters.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("how", [flip_a_byte, lambda path: os.truncate(path, path.stat().st_size // 2), Path.unlink])
def test_damage_anywhere_is_refused_and_the_run_stays_as_it_was(
    engine: Engine, tmp_path: Path, name: str, how: Break
) -> None:
    train(engine, range(2))
    write_state(capture(run_of(engine), gradients=True), tmp_path / "a", about=ABOUT)
    train(engine, range(2, 3))
    before = everything(run_of(engine))
    how(tmp_path / "a" / name)
    with pytest.raises(GradwireError, match='"a" is damaged') as caught:
        open_state(tmp_path / "a").restore(run_of(engine), optimizer=True)
    assert caught.value.reason == "CHECKPOINT_DAMAGED"
    assert same(everything(run_of(engine)), before)


def signed(folder: Path, name: str, content: bytes) -> None:
    """Replaces a file of a state, as whoever writes its manifest can."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


CRAFTED: list[Any] = [
    *({"step": step} for step in (1 << 70, 1 << 63, -1, True, 1.5, "3", None, float("nan"))),
    *({"accumulation": other} for other in ([], None, {"num_passes": "1"}, {"num_passes": -1}, {"more": 1})),
    *({"accumulation": {name: 1 << 70}} for name in ("num_passes", "num_loss_tokens", "num_sequences")),
    *({"accumulation": {"failed_seq_id": value}} for value in (-1, 1 << 70, "1", True)),
]


@pytest.mark.parametrize("crafted", [*CRAFTED, b"[" * 100_000, b"[]", b"null", b"\xff"])
def test_a_crafted_state_is_refused_before_anything_of_the_run_changes(
    engine: Engine, tmp_path: Path, crafted: Any
) -> None:
    folder = tmp_path / "checkpoints" / RUN / "state" / "a"
    write_state(capture(run_of(engine), gradients=False), folder, about=ABOUT)
    train(engine, range(1))
    forward_backward(engine)
    before, step = everything(run_of(engine)), run_of(engine).step
    counters = json.loads((folder / "state.json").read_text())
    content = crafted if isinstance(crafted, bytes) else json.dumps(counters | crafted).encode()
    signed(folder, "state.json", content)
    with pytest.raises(DataLossError, match=r"state\.json cannot be read") as caught:
        engine.load_state(RUN, f"gradwire://{RUN}/state/a", with_optimizer=True)
    assert len(caught.value.message) < 500
    assert same(everything(run_of(engine)), before)
    assert run_of(engine).step == step


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), 1e30])
def test_a_crafted_count_of_the_optimizer_is_refused_before_anything_of_the_run_changes(
    engine: Engine, tmp_path: Path, value: float
) -> None:
    train(engine, range(1))
    state = capture(run_of(engine), gradients=False)
    name = next(key for key in state.optimizer if key.startswith("step."))
    optimizer = {**state.optimizer, name: torch.tensor(value)}
    write_state(State(state.parameters, optimizer, {}, state.counters), tmp_path / "a", about=ABOUT)
    before = everything(run_of(engine))
    with pytest.raises(DataLossError, match="for 'step"):
        open_state(tmp_path / "a").restore(run_of(engine), optimizer=True)
    assert same(everything(run_of(engine)), before)


def test_a_manifest_that_leads_out_of_its_folder_is_refused(engine: Engine, tmp_path: Path) -> None:
    write_state(capture(run_of(engine), gradients=True), tmp_path / "a", about=ABOUT)
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    for name in ("../b", "/etc/passwd", "", "a//b", "..\\b", "a\0b"):
        manifest["files"] = {name: {"size_bytes": 0, "sha256": ""}}
        (tmp_path / "a" / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(GradwireError, match="it names a file"):
            open_state(tmp_path / "a")


def test_a_state_of_another_model_is_refused_naming_what_differs(
    engine: Engine, tmp_path: Path, tiny_llama: Path
) -> None:
    write_state(capture(run_of(engine), gradients=False), tmp_path / "a", about=ABOUT)
    untied = make_engine(make_tiny_llama(tmp_path / "untied", tied=False), tmp_path / "c")
    with pytest.raises(FailedPreconditionError, match=r"lacks 1 of the parameters .*lm_head\.weight"):
        open_state(tmp_path / "a").restore(run_of(untied), optimizer=True)
    write_state(capture(run_of(untied), gradients=False), tmp_path / "b", about=ABOUT)
    with pytest.raises(
        FailedPreconditionError, match=r"has 1 parameters this run does not train, for example lm_head\.weight"
    ):
        open_state(tmp_path / "b").restore(run_of(engine), optimizer=True)
    state = capture(run_of(engine), gradients=False)
    name = "model.norm.weight"
    longer = State({**state.parameters, name: torch.zeros(33)}, {}, {}, state.counters)
    write_state(longer, tmp_path / "c2", about=ABOUT)
    before = everything(run_of(engine))
    with pytest.raises(FailedPreconditionError, match=r"F32 \[33\], and this run needs F32 \[32\]") as caught:
        open_state(tmp_path / "c2").restore(run_of(engine), optimizer=True)
    assert caught.value.reason == "CHECKPOINT_MISMATCH"
    assert same(everything(run_of(engine)), before)


@pytest.mark.parametrize("at", ["space", "write", "sync", "rename"])
def test_a_full_disk_leaves_nothing_and_what_was_there_stays(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    folder = tmp_path / "states"
    write_state(capture(run_of(engine), gradients=True), folder / "a", about=ABOUT)
    before = (folder / "a" / "manifest.json").read_bytes()
    train(engine, range(1))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        if at == "space":
            usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
            patched.setattr(atomic_folders.shutil, "disk_usage", lambda _: usage)
        elif at == "write":
            patched.setattr(atomic_folders.DigestedFile, "write", full)
        elif at == "sync":
            patched.setattr(atomic_folders.os, "fsync", full)
        else:
            patched.setattr(atomic_folders, "_swap_in", full)
        for name in ("a", "b"):
            with pytest.raises(FailedPreconditionError) as caught:
                write_state(capture(run_of(engine), gradients=True), folder / name, about=ABOUT, overwrite=True)
            assert caught.value.reason == "STORAGE_FAILED"
    assert [path.name for path in folder.iterdir()] == ["a"]
    assert (folder / "a" / "manifest.json").read_bytes() == before
    write_state(capture(run_of(engine), gradients=True), folder / "b", about=ABOUT)


def test_a_taken_name_is_refused_without_overwrite_before_anything_is_written(engine: Engine, tmp_path: Path) -> None:
    write_state(capture(run_of(engine), gradients=True), tmp_path / "s" / "a", about=ABOUT)
    with pytest.raises(AlreadyExistsError, match='named "a" exists'):
        write_state(capture(run_of(engine), gradients=True), tmp_path / "s" / "a", about=ABOUT)
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["a"]


def test_writers_side_by_side_do_not_clear_each_others_work(engine: Engine, tmp_path: Path) -> None:
    """A snapshot is written in the background while another is begun."""
    state = capture(run_of(engine), gradients=True)
    with atomic_folders.whole_folder(tmp_path / "s" / "a", about={}, overwrite=False) as writer:
        (writer.path / "half").write_bytes(random.Random(0).randbytes(1000))
        write_state(state, tmp_path / "s" / "b", about=ABOUT)
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["a", "b"]
    atomic_folders.verify(tmp_path / "s" / "a", atomic_folders.read_manifest(tmp_path / "s" / "a"))
