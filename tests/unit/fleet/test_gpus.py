"""How many ranks a machine gets."""

import argparse
from typing import Any

import pytest

from trainer_service.command_lines import SettingsError, add_options, read_options
from trainer_service.config import TrainerConfig
from trainer_service.fleet.gpus import count_gpus, local_world_size


@pytest.mark.parametrize(
    ("asked", "num_gpus", "base_dtype", "wanted"),
    [
        ("auto", 0, "float32", 1),
        ("auto", 4, "float32", 4),
        ("auto", 4, "auto", 4),
        ("auto", 4, "bfloat16", 4),
        # What one rank alone can do is no reason to refuse to start.
        ("auto", 4, "int8", 1),
        ("gpu", 2, "float32", 2),
        (3, 0, "float32", 3),
        (2, 4, "float32", 2),
    ],
)
def test_every_gpu_has_a_rank_unless_told_otherwise(asked: Any, num_gpus: int, base_dtype: Any, wanted: int):
    assert local_world_size(asked, num_gpus=num_gpus, base_dtype=base_dtype) == wanted


@pytest.mark.parametrize(
    ("asked", "num_gpus", "refusal"),
    [
        ("gpu", 0, "--nproc-per-node is gpu, and this machine has no GPU"),
        (5, 4, "--nproc-per-node is 5, and this machine has 4 GPUs; each rank needs one of its own"),
    ],
)
def test_ranks_without_a_gpu_each_are_refused_before_anything_starts(asked: Any, num_gpus: int, refusal: str):
    with pytest.raises(SettingsError, match=refusal):
        local_world_size(asked, num_gpus=num_gpus, base_dtype="float32")


async def test_a_machine_without_a_driver_has_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.path.exists", lambda _: False)
    assert await count_gpus() == 0


@pytest.mark.parametrize(
    ("given", "wanted"), [([], "auto"), (["--nproc-per-node", "gpu"], "gpu"), (["--nproc-per-node=2"], 2)]
)
def test_the_option_takes_a_number_or_torchrun_s_words(given: list[str], wanted: Any):
    parser = argparse.ArgumentParser()
    add_options(parser, TrainerConfig)
    config = read_options(TrainerConfig, parser.parse_args(["--base-model", "m", *given]))
    assert config.ranks.nproc_per_node == wanted


@pytest.mark.parametrize("given", ["0", "-1", "many", "²"])
def test_other_words_are_refused(given: str, capsys: pytest.CaptureFixture[str]):
    parser = argparse.ArgumentParser()
    add_options(parser, TrainerConfig)
    with pytest.raises(SystemExit):
        parser.parse_args(["--base-model", "m", f"--nproc-per-node={given}"])
    assert 'it must be at least 1, or "auto" or "gpu"' in capsys.readouterr().err
