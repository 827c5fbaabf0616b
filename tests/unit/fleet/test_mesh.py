"""How ranks may be arranged."""

import argparse

import pytest

from trainer_service.command_lines import SettingsError, add_options, command_line, read_options
from trainer_service.config import TrainerConfig
from trainer_service.fleet.mesh import check_cut, check_mesh
from trainer_service.worker_config import EngineSettings, RankSettings


@pytest.mark.parametrize(
    "settings",
    [
        RankSettings(),
        RankSettings(fsdp_size=8),
        RankSettings(dp_replicate_size=2),
        RankSettings(fsdp_size=4, dp_replicate_size=2),
        RankSettings(fsdp_size=1, dp_replicate_size=8),
        RankSettings(tp_size=4),
        RankSettings(tp_size=2, fsdp_size=2, dp_replicate_size=2),
        RankSettings(ep_size=8),
        RankSettings(ep_size=2, dp_replicate_size=2),
    ],
)
def test_sizes_that_come_to_all_ranks_are_taken(settings: RankSettings):
    check_mesh(settings, local_world_size=4, nnodes=2)


@pytest.mark.parametrize(
    ("settings", "nnodes", "refusal"),
    [
        (
            RankSettings(fsdp_size=2),
            1,
            "--fsdp-size 2 times --dp-replicate-size 1 is 2, and there are 4 ranks; give --dp-replicate-size 2.",
        ),
        (
            RankSettings(fsdp_size=3, dp_replicate_size=2),
            1,
            "--fsdp-size 3 times --dp-replicate-size 2 is 6, and there are 4 ranks; give an --fsdp-size of 1, 2 or 4.",
        ),
        (
            RankSettings(dp_replicate_size=3),
            2,
            "--dp-replicate-size is 3, and there are 8 ranks, 4 on each of 2 machines; it must divide them: one of "
            "1, 2, 4 or 8.",
        ),
        (RankSettings(tp_size=3), 1, "--tp-size is 3, and there are 4 ranks; it must divide them: one of 1, 2 or 4."),
        (
            RankSettings(tp_size=8),
            2,
            "--tp-size is 8, and there are 8 ranks, 4 on each of 2 machines; it must divide those of a machine: one of "
            "1, 2 or 4.",
        ),
        (
            RankSettings(tp_size=2, fsdp_size=4),
            1,
            "--fsdp-size 4 times --dp-replicate-size 1 times --tp-size 2 is 8, and there are 4 ranks; give an "
            "--fsdp-size of 1 or 2.",
        ),
        (
            RankSettings(tp_size=2, dp_replicate_size=3),
            2,
            "--dp-replicate-size is 3, and there are 8 ranks, 4 on each of 2 machines, 4 groups of --tp-size 2; it "
            "must divide them: one of 1, 2 or 4.",
        ),
        (
            RankSettings(ep_size=4, dp_replicate_size=2),
            1,
            "--ep-size is 4, and parameters lie in parts on 2 ranks (--fsdp-size); it must divide them: one of 1 or 2.",
        ),
        (
            RankSettings(ep_size=2, tp_size=2),
            1,
            "--ep-size is 2, and --tp-size 2; layers with experts are not cut yet: give one of them, and leave the "
            "other at 1.",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_numbers(settings: RankSettings, nnodes: int, refusal: str):
    with pytest.raises(SettingsError) as told:
        check_mesh(settings, local_world_size=4, nnodes=nnodes)
    assert refusal in str(told.value)


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [
        (EngineSettings(base_dtype="bfloat16"), "--base-dtype is bfloat16, and --tp-size 2"),
        (EngineSettings(sampling_reshard_after_forward="always"), "--sampling-reshard-after-forward is always, and"),
    ],
)
def test_what_does_not_go_with_cut_layers_is_refused(settings: EngineSettings, refusal: str):
    check_cut(settings, tp_size=1)
    with pytest.raises(SettingsError) as told:
        check_cut(settings, tp_size=2)
    assert refusal in str(told.value)


def test_replicas_of_one_rank_are_refused():
    with pytest.raises(SettingsError, match="there is 1 rank; it must divide them: one of 1\\."):
        check_mesh(RankSettings(dp_replicate_size=2), local_world_size=1, nnodes=1)


@pytest.mark.parametrize("given", [[], ["--fsdp-size=2", "--dp-replicate-size=2", "--tp-size=2", "--ep-size=2"]])
def test_ranks_read_the_sizes_that_the_trainer_was_given(given: list[str]):
    parser = argparse.ArgumentParser()
    add_options(parser, TrainerConfig)
    config = read_options(TrainerConfig, parser.parse_args(["--base-model", "m", *given]))
    again = read_options(TrainerConfig, parser.parse_args(command_line(config)))
    assert again.ranks == config.ranks
    found = config.ranks
    sizes = found.fsdp_size, found.dp_replicate_size, found.tp_size, found.ep_size
    assert sizes == ((2, 2, 2, 2) if given else (None, 1, 1, 1))
