"""Ranks that divide experts among them compute what one rank does."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import rank_tasks
from tests.engines import RUN, make_batch
from tests.numerics.architectures import make_model
from tests.numerics.test_ranks import GRADIENTS, UNEVEN, check_equal, difference, together
from tests.rank_pool import RankPool, rank_pool
from trainer_service.engine.rank_channels import Ranks

BATCH = make_batch(9, 7, 20, 5, 3)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Two ranks, one group."""
    with rank_pool(2, tmp_path_factory.mktemp("two")) as pool:
        yield pool.dividing_experts(2)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Four ranks, two groups."""
    with rank_pool(4, tmp_path_factory.mktemp("four")) as pool:
        yield pool.dividing_experts(2)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes models' folders."""
    return lambda name, **changes: make_model(tmp_path_factory.mktemp("model"), name, **changes)


@pytest.fixture(scope="module")
def folder(folder_of: Callable[..., Path]) -> Path:
    """Qwen3-MoE, with four experts in one of two layers."""
    return folder_of("Qwen3Moe")


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        ("Qwen3Moe", False),
        ("Qwen3Moe", True),
        # Biases, which are experts' too, and weights the other way round.
        ("GptOss", False),
        ("GptOss", True),
        # Experts that all tokens pass.
        ("DeepseekV3", False),
    ],
)
def test_two_ranks_that_divide_experts_train_as_one_does(
    name: str, lora: bool, two: RankPool, folder_of: Callable[..., Path], tmp_path: Path
):
    check_equal(two, folder_of(name), tmp_path, lora=lora)


@pytest.mark.parametrize(
    "how",
    [
        {"custom": True},
        {"custom": True, "max_held_graph_bytes": 1, "lora": True},
        {"activation_checkpointing": "on"},
        {"activation_checkpointing": "on", "lora": True, "fsdp_reshard_after_forward": "always"},
        {"activation_checkpointing": "on", "fsdp_reshard_after_forward": "always", "custom": True},
        {"base_dtype": "bfloat16", "lora": True},
    ],
    ids=["held", "recomputed-lora", "checkpointed", "checkpointed-lora", "checkpointed-held", "bfloat16"],
)
def test_all_ways_to_train_do_so_with_divided_experts(how: dict[str, Any], two: RankPool, folder: Path, tmp_path: Path):
    found = check_equal(two, folder, tmp_path, **how)
    assert (found[0]["recomputed"] > 0) == ("max_held_graph_bytes" in how)


@pytest.mark.parametrize(
    ("ep_size", "replicas", "how"),
    [
        (2, 1, {}),
        (2, 1, {"lora": True, "custom": True}),
        (2, 1, {"fsdp_reshard_after_forward": "always"}),
        (2, 2, {}),
        (2, 2, {"lora": True}),
        (4, 1, {}),
    ],
)
def test_four_ranks_that_divide_experts_train_as_one_does(
    ep_size: int, replicas: int, how: dict[str, Any], four: RankPool, folder: Path, tmp_path: Path
):
    check_equal(four.dividing_experts(ep_size, replicas=replicas), folder, tmp_path, **how)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_rank_whose_experts_nobody_asks_has_gradients_of_zeros(
    lora: bool, four: RankPool, folder: Path, tmp_path: Path
):
    # One token, and the same on ranks that have nothing to do, has two of four experts.
    how: dict[str, Any] = {"batches": [make_batch(1)], "lora": lora}
    wanted = rank_tasks.train(Ranks(), folder, tmp_path / "one", **how)["gradients"]
    for many in four.dividing_experts(4).run(rank_tasks.train, folder, tmp_path / "many", **how):
        # Those of queries and keys are rounding errors.
        error = np.linalg.norm(together(many["gradients"]) - together(wanted))
        assert error < GRADIENTS * np.linalg.norm(together(wanted))
    if not lora:
        assert (wanted["model.layers.1.mlp.experts.down_proj"] != 0).any((1, 2)).sum() == 2


def test_divided_experts_in_bfloat16_are_as_near_to_float32_as_one_ranks(two: RankPool, folder: Path, tmp_path: Path):
    exact = rank_tasks.train(Ranks(), folder, tmp_path / "exact", UNEVEN)["gradients"]
    one = rank_tasks.train(Ranks(), folder, tmp_path / "one", UNEVEN, compute_dtype="bfloat16")["gradients"]
    many = two.run(rank_tasks.train, folder, tmp_path / "many", UNEVEN, compute_dtype="bfloat16")
    errors = [difference(each, exact, exact) for each in (many[0]["gradients"], one)]
    assert 0 < errors[0] < 1.5 * errors[1] < 0.5, errors
    assert difference(many[0]["after"], many[1]["after"], many[0]["after"]) == 0


def test_experts_that_ranks_divide_are_not_gathered(two: RankPool, folder: Path, tmp_path: Path):
    without = two.uncut().run(rank_tasks.kept, folder, tmp_path)
    divided = two.run(rank_tasks.kept, folder, tmp_path)
    assert [each["held"] for each in divided] == [each["held"] for each in without]
    # Of one layer: four experts of three matrices, in float32.
    experts = 4 * 3 * 16 * 32 * 4
    assert {sum(one["gathered"]) - sum(each["gathered"]) for one, each in zip(without, divided, strict=True)} == {
        experts
    }


def test_the_same_log_leads_ranks_that_divide_experts_to_the_same_bits(two: RankPool, folder: Path, tmp_path: Path):
    first, again = (two.run(rank_tasks.train, folder, tmp_path / each, UNEVEN)[0] for each in ("a", "b"))
    assert difference(first["after"], again["after"], first["after"]) == 0


def alone(task: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
    """A task of one rank."""
    return [task(Ranks(), *args, **kwargs)]


@pytest.mark.parametrize(
    ("reads", "lora"),
    [
        ({"divided": ["alone", "twice"], "in parts": ["divided"], "twice": ["four"]}, False),
        ({"divided": ["in parts"], "alone": ["divided"]}, True),
    ],
    ids=["full", "lora"],
)
def test_states_go_on_with_divided_experts_and_without(
    reads: dict[str, list[str]], lora: bool, two: RankPool, four: RankPool, folder: Path, tmp_path: Path
):
    replicas = four.dividing_experts(2, replicas=2)
    ways = {"alone": alone, "divided": two.run, "in parts": two.uncut().run, "four": four.run, "twice": replicas.run}
    for writer, readers in reads.items():
        where = tmp_path / writer
        saved = ways[writer](rank_tasks.save, folder, where, BATCH, lora=lora, exports=False)[0]
        for reader in readers:
            for found in ways[reader](rank_tasks.go_on, folder, where, BATCH, saved["path"], lora=lora):
                assert found["step"] == 1
                assert difference(found["after"], saved["after"], saved["after"]) < 1e-6, (writer, reader)
        # Each rank writes the experts that it would have had in any case, those of the second replica none.
        files = sorted((where / RUN / "state" / "state").glob("parameters-*"))
        name = "model.layers.1.mlp.experts.down_proj"
        assert lora or [rank_tasks.read(file)[name].shape for file in files] == [(2, 32, 16)] * 2


def test_snapshots_of_half_a_step_go_on_with_divided_experts_and_without(two: RankPool, folder: Path, tmp_path: Path):
    arguments = (folder, tmp_path, BATCH)
    for name, writers, others in (("divided", two, (alone, two.uncut().run)), ("parts", two.uncut(), (two.run,))):
        wanted = writers.run(rank_tasks.snapshot, *arguments, tmp_path / name)[0]["after"]
        again = writers.run(rank_tasks.restore, *arguments, tmp_path / name)
        assert {difference(each["after"], wanted, wanted) for each in again} == {0}
        for run in others:
            for found in run(rank_tasks.restore, *arguments, tmp_path / name):
                assert difference(found["after"], wanted, wanted) < 1e-6


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_what_ranks_that_divide_experts_export_is_what_one_exports(
    lora: bool, two: RankPool, folder: Path, tmp_path: Path
):
    path = two.run(rank_tasks.save, folder, tmp_path, BATCH, lora=lora)[0]["path"]
    # One rank with those very parameters.
    rank_tasks.export(Ranks(), folder, tmp_path, path, "weights-of-one", lora=lora)
    rank_tasks.export(Ranks(), folder, tmp_path, path, "merged-of-one", lora=lora, merged=lora)
    exports = tmp_path / RUN / "sampler_weights"
    for name in ("weights", "merged") if lora else ("weights",):
        file = "adapter_model.safetensors" if lora and name == "weights" else "model.safetensors"
        one, many = (rank_tasks.read(exports / each / file) for each in (f"{name}-of-one", name))
        assert difference(one, many, one) == 0
    if lora:
        assert two.run(rank_tasks.adapter, folder, tmp_path, exports / "weights") == [0.0, 0.0]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_what_is_sampled_with_divided_experts_is_what_is_sampled_of_a_whole_model(
    lora: bool, two: RankPool, folder: Path, tmp_path: Path
):
    prompts = [[5, 6, 7], [9] * 20, [8, 7]]
    found = {
        how: two.run(
            rank_tasks.sample, folder, tmp_path / how, prompts=prompts, sampling_reshard_after_forward=how, lora=lora
        )
        for how in ("never", "always")
    }
    whole, parts = (found[how][0]["answers"] for how in ("never", "always"))
    assert len(whole) == 6
    for number, answer in whole.items():
        prompt, again = answer.pop("prompt"), parts[number].pop("prompt")
        assert again == pytest.approx(prompt, abs=1e-5)
        assert answer.keys() == parts[number].keys() == {0, 1}
        for sample, (tokens, logprobs) in answer.items():
            # Products of more rows, which other ranks ask for, are rounded otherwise.
            assert parts[number][sample] == (tokens, pytest.approx(logprobs, abs=1e-5))
    assert found["always"][1]["answers"] == {}
    assert all("gathered anew" in each["described"] for each in found["always"])


def test_a_deleted_run_leaves_nothing_of_divided_experts(two: RankPool, folder: Path, tmp_path: Path):
    assert two.run(rank_tasks.delete, folder, tmp_path, lora=False) == [0, 0]


def test_a_model_whose_experts_cannot_be_divided_is_refused_by_all_ranks(
    two: RankPool, folder_of: Callable[..., Path], tmp_path: Path
):
    refusals = two.run(rank_tasks.refused_model, folder_of("Qwen3Moe", num_experts=5), tmp_path)
    assert refusals[0] == refusals[1]
    assert refusals[0][0] == "INVALID_FIELD"
    assert "ep_size is 2, and Qwen3MoeForCausalLM has 5 experts, which the 2 ranks that have them" in refusals[0][1]
