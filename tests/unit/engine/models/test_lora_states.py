"""States of LoRA runs, and steps: resumed bit for bit, refused where they do not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gradwire.errors import FailedPreconditionError, GradwireError
from gradwire.types import AdamParams

from tests.engines import CROSS_ENTROPY, make_batch
from tests.loras import ALL, BODY, adapter, lora_engine, train
from tests.numerics.plain import load_plain
from tests.tiny import make_tiny_llama
from trainer_service.engine.models.lora import LoraSettings


def test_a_resumed_lora_run_is_the_uninterrupted_one_bit_for_bit(tiny_llama: Path, tmp_path: Path) -> None:
    engine = lora_engine(tiny_llama, tmp_path / "checkpoints", lora=ALL)
    train(engine, "lora", range(3))
    saved = engine.save_state("lora", "half")
    train(engine, "lora", range(3, 5))
    again = lora_engine(tiny_llama, tmp_path / "checkpoints", resumed=ALL, cold=ALL)
    assert again.load_state("resumed", saved.path, with_optimizer=True) == 3
    again.load_state("cold", saved.path, with_optimizer=False)
    for run_id in ("resumed", "cold"):
        train(again, run_id, range(3, 5))
    wanted = adapter(engine, "lora")
    assert all(torch.equal(parameter, wanted[name]) for name, parameter in adapter(again, "resumed").items())
    assert not all(torch.equal(parameter, wanted[name]) for name, parameter in adapter(again, "cold").items())
    # What trains, twice over for Adam, and not the base model.
    floats = sum(parameter.numel() for parameter in wanted.values())
    assert saved.size_bytes < 3 * 4 * floats + 40_000


def test_a_state_of_another_rank_or_of_a_full_run_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    engine = lora_engine(tiny_llama, tmp_path, lora=ALL, wider=LoraSettings(rank=8), body=BODY)
    engine.create_run("full")
    path = engine.save_state("lora", "a").path
    for run_id in ("wider", "body", "full"):
        with pytest.raises(FailedPreconditionError) as caught:
            engine.load_state(run_id, path, with_optimizer=True)
        assert caught.value.reason == "CHECKPOINT_MISMATCH"
    with pytest.raises(GradwireError, match="does not fit"):
        engine.load_state("lora", engine.save_state("full", "a").path, with_optimizer=True)


def test_a_learning_rate_moves_an_adapter_of_a_bfloat16_model_by_just_that(tmp_path: Path):
    """In bfloat16, 1e-3 would be 0.00099945."""
    folder = make_tiny_llama(tmp_path / "model")
    model: Any = load_plain(folder)
    model.to(torch.bfloat16).save_pretrained(folder)
    engine = lora_engine(folder, tmp_path / "checkpoints", lora=ALL)
    before = {name: parameter.detach().clone() for name, parameter in adapter(engine, "lora").items()}
    engine.forward_backward("lora", 1, engine.stage(make_batch(5, 9), CROSS_ENTROPY))
    engine.optim_step("lora", 2, AdamParams(learning_rate=1e-3))
    run = engine.run_state("lora")
    moved = 0
    for name, parameter in adapter(engine, "lora").items():
        moments = run.optimizer.state_of(parameter)
        assert {parameter.dtype, *(tensor.dtype for tensor in moments.values())} == {torch.float32}
        # AdamW's first step goes by the learning rate, whatever the gradient, but for eps. B begins as 0.
        if ".lora_B" in name:
            assert not before[name].any()
            steps = parameter.detach().abs()
            torch.testing.assert_close(steps[steps > 0], torch.full_like(steps[steps > 0], 1e-3), rtol=1e-5, atol=0)
            moved += int((steps > 0).sum())
    assert moved > 100
