"""Ranks compute what one rank does, on parts of the model and shares of the batch."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gradwire.types import AdamParams
from transformers import AutoConfig, AutoModelForCausalLM, HrmTextConfig

from tests import rank_tasks
from tests.engines import RUN, make_batch
from tests.numerics.architectures import make_model
from tests.rank_pool import RankPool, rank_pool
from tests.tiny import VOCAB_SIZE
from trainer_service.engine.rank_channels import Ranks

Arrays = Mapping[str, npt.NDArray[np.float32]]

UNEVEN = [make_batch(5, 9, 3), make_batch(7, seed=1), make_batch(*[6] * 9, 40, seed=2)]
"""Several packs, a single one, so that a rank has nothing to do, and one long sequence among many short."""
GRADIENTS = 1e-6
"""Largest difference of a gradient, relative to its norm."""
STEPS = 2e-5
"""Largest difference of a parameter after three steps, relative to how far it went. Adam divides by what is nearly zero
where gradients are, and with them their rounding errors. One rank that cuts packs otherwise is as far off."""
SMOOTH_STEP = AdamParams(learning_rate=0.1, eps=0.1, grad_clip_norm=1.0)
"""Does not: its eps is as large as gradients are."""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    with rank_pool(2, tmp_path_factory.mktemp("two")) as pool:
        yield pool


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    with rank_pool(3, tmp_path_factory.mktemp("three")) as pool:
        yield pool


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    with rank_pool(4, tmp_path_factory.mktemp("four")) as pool:
        yield pool


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes models' folders."""
    return lambda name, **changes: make_model(tmp_path_factory.mktemp("model"), name, **changes)


def difference(one: Arrays, other: Arrays, scale: Arrays) -> float:
    """The largest of any tensor, relative to a tensor's norm."""
    assert one.keys() == other.keys()
    norm = np.linalg.norm
    return max(float(norm(one[name] - other[name]) / (norm(scale[name]) or 1.0)) for name in one)


def together(tensors: Arrays) -> npt.NDArray[np.float64]:
    """All of them as one vector."""
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)]).astype(np.float64)


def check_equal(
    pool: RankPool, folder: Path, tmp_path: Path, *, within: float = GRADIENTS, **how: Any
) -> list[dict[str, Any]]:
    """Three steps on all of a pool's ranks, compared with one rank's. What the ranks found.

    Steps may differ by as many times more as gradients may, `within`.
    """
    one = rank_tasks.train(Ranks(), folder, tmp_path / "one", UNEVEN, max_pack_tokens=20, **how)
    found = pool.run(rank_tasks.train, folder, tmp_path / "many", UNEVEN, max_pack_tokens=20, **how)
    assert not one["sharded"]
    for many in found:
        assert many["sharded"]
        for got, wanted in zip(many["logprobs"], one["logprobs"], strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-5)
        assert difference(one["gradients"], many["gradients"], one["gradients"]) < within
        moved = {name: one["after"][name] - one["before"][name] for name in one["after"]}
        assert difference(one["after"], many["after"], moved) < STEPS * within / GRADIENTS
        for got, wanted in zip(many["metrics"], one["metrics"], strict=True):
            assert got.keys() == wanted.keys()
            # How many packs there are is a matter of ranks.
            same = [name for name in wanted if name != "forward_passes:sum"]
            assert [got[name] for name in same] == pytest.approx([wanted[name] for name in same], rel=1e-5)
    # Bit for bit the same on all of them, what is whole on each as well.
    for many in found[1:]:
        assert difference(many["after"], found[0]["after"], many["after"]) == 0
    return found


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Llama", {}),
        ("Qwen3", {"tie_word_embeddings": True}),
        # More rows than ranks divide evenly.
        ("Qwen3", {"tie_word_embeddings": False, "vocab_size": 129}),
        ("Gemma2", {}),
        ("Qwen3Moe", {}),
        # One at a time, as it cannot be packed.
        ("Falcon", {}),
    ],
)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_two_ranks_train_as_one_does(
    name: str, changes: dict[str, Any], lora: bool, two: RankPool, folder_of: Callable[..., Path], tmp_path: Path
):
    check_equal(two, folder_of(name, **changes), tmp_path, lora=lora)


@pytest.mark.parametrize("name", ["Llama", "Qwen3Moe"])
def test_adapters_beside_a_base_in_bfloat16_train_as_on_one_rank(
    name: str, two: RankPool, folder_of: Callable[..., Path], tmp_path: Path
):
    check_equal(two, folder_of(name), tmp_path, lora=True, base_dtype="bfloat16")


def test_a_base_in_bfloat16_takes_half_and_half_of_it_travels(
    two: RankPool, folder_of: Callable[..., Path], tmp_path: Path
):
    folder = folder_of("Llama")
    in_float32, halved = (
        two.run(rank_tasks.kept, folder, tmp_path, base_dtype=each) for each in ("float32", "bfloat16")
    )
    config: Any = AutoConfig.from_pretrained(folder)
    norms = (2 * config.num_hidden_layers) * config.hidden_size * 4
    layers = sum(in_float32[0]["gathered"]) - max(in_float32[0]["gathered"])
    # Norms stay as they are, as do the embedding and the head, which the root gathers once.
    assert sum(halved[0]["gathered"]) - max(halved[0]["gathered"]) == norms + (layers - norms) // 2
    saved = (layers - norms) // 2
    assert in_float32[0]["whole"] - halved[0]["whole"] == saved
    assert [one["held"] - other["held"] for one, other in zip(in_float32, halved, strict=True)] == [saved // 2] * 2


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_graphs_held_by_ranks_go_backward_in_any_order(lora: bool, two: RankPool, tiny_llama: Path, tmp_path: Path):
    found = check_equal(two, tiny_llama, tmp_path, lora=lora, custom=True)
    assert [many["recomputed"] for many in found] == [0, 0]


def test_ranks_drop_and_recompute_the_same_graphs(two: RankPool, tiny_llama: Path, tmp_path: Path):
    found = check_equal(two, tiny_llama, tmp_path, custom=True, max_held_graph_bytes=1)
    assert found[0]["recomputed"] == found[1]["recomputed"] > 0


def test_layers_of_ranks_are_computed_again_in_backward(two: RankPool, tiny_llama: Path, tmp_path: Path):
    check_equal(two, tiny_llama, tmp_path, activation_checkpointing="on")


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_layers_gathered_in_bfloat16_compute_what_autocast_does(
    lora: bool, two: RankPool, tiny_llama: Path, tmp_path: Path
):
    how = {"max_pack_tokens": 20, "compute_dtype": "bfloat16", "lora": lora}
    one = rank_tasks.train(Ranks(), tiny_llama, tmp_path / "one", UNEVEN, **how)
    many = two.run(rank_tasks.train, tiny_llama, tmp_path / "many", UNEVEN, **how)[1]
    exact = rank_tasks.train(Ranks(), tiny_llama, tmp_path / "exact", UNEVEN, max_pack_tokens=20, lora=lora)
    for got, wanted in zip(many["logprobs"], one["logprobs"], strict=True):
        np.testing.assert_array_equal(got, wanted)
    # No further from float32 than one rank's are.
    errors = [difference(each["gradients"], exact["gradients"], exact["gradients"]) for each in (many, one)]
    assert 0 < errors[0] < 1.2 * errors[1] < 0.5


def test_three_ranks_most_of_which_have_nothing_to_do(three: RankPool, tiny_llama: Path, tmp_path: Path):
    check_equal(three, tiny_llama, tmp_path)


@pytest.mark.parametrize(
    ("name", "lora", "world_size"),
    [
        ("Llama", False, 2),
        ("Gemma2", False, 2),
        ("Qwen3Moe", False, 2),
        ("Llama", True, 2),
        ("Qwen3Moe", True, 2),
        ("Llama", False, 4),
        ("Qwen3Moe", True, 4),
    ],
)
def test_three_steps_of_ranks_end_where_one_rank_s_do_to_a_millionth_of_the_way(
    name: str,
    lora: bool,
    world_size: int,
    two: RankPool,
    four: RankPool,
    folder_of: Callable[..., Path],
    tmp_path: Path,
):
    """Of all parameters together, where AdamW is smooth and steps are large beside what rounds them in float32."""
    pool = two if world_size == 2 else four.with_replicas(2)
    how = {"lora": lora, "params": SMOOTH_STEP, "max_pack_tokens": 20}
    one = rank_tasks.train(Ranks(), folder_of(name), tmp_path / "one", UNEVEN, **how)
    for many in pool.run(rank_tasks.train, folder_of(name), tmp_path / "many", UNEVEN, **how):
        before, after, there = (together(found) for found in (one["before"], one["after"], many["after"]))
        assert np.linalg.norm(there - after) < 1e-6 * np.linalg.norm(after - before)


@pytest.mark.parametrize(
    ("name", "changes", "replicas"),
    [
        ("Llama", {}, 1),
        ("Qwen3", {"tie_word_embeddings": True}, 2),
        ("Qwen3", {"tie_word_embeddings": False, "vocab_size": 129}, 1),
        ("Gemma2", {}, 2),
        ("Qwen3Moe", {}, 2),
    ],
)
def test_four_ranks_train_as_one_does(
    name: str,
    changes: dict[str, Any],
    replicas: int,
    four: RankPool,
    folder_of: Callable[..., Path],
    tmp_path: Path,
):
    check_equal(four.with_replicas(replicas), folder_of(name, **changes), tmp_path)


@pytest.mark.parametrize("how", [{"lora": True}, {"custom": True}], ids=["lora", "custom"])
def test_replicas_of_parts_train_as_one_rank_does(
    how: dict[str, Any], four: RankPool, tiny_llama: Path, tmp_path: Path
):
    check_equal(four.with_replicas(2), tiny_llama, tmp_path, **how)


@pytest.mark.parametrize("how", [{}, {"custom": True}], ids=["full", "custom"])
def test_layers_gathered_anew_for_each_pass_train_as_one_rank_does(
    how: dict[str, Any], two: RankPool, tiny_llama: Path, tmp_path: Path
):
    check_equal(two, tiny_llama, tmp_path, fsdp_reshard_after_forward="always", **how)


def test_ranks_of_a_replica_wait_for_one_another_as_long_as_the_operator_says(
    four: RankPool, tiny_llama: Path, tmp_path: Path
):
    assert four.with_replicas(2).run(rank_tasks.timeouts, tiny_llama, tmp_path) == [[60.0, 60.0]] * 4


def test_replicas_of_layers_gathered_anew_train_as_one_rank_does(four: RankPool, tiny_llama: Path, tmp_path: Path):
    check_equal(four.with_replicas(2), tiny_llama, tmp_path, fsdp_reshard_after_forward="always")


def test_whole_replicas_train_as_one_rank_does(two: RankPool, tiny_llama: Path, tmp_path: Path):
    check_equal(two.with_replicas(2), tiny_llama, tmp_path)


def test_the_same_log_leads_ranks_to_the_same_bits(two: RankPool, tiny_llama: Path, tmp_path: Path):
    first, again = (two.run(rank_tasks.train, tiny_llama, tmp_path / each, UNEVEN)[0] for each in ("a", "b"))
    assert difference(first["after"], again["after"], first["after"]) == 0


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("replicas", [False, True], ids=["parts", "replicas"])
def test_what_ranks_saved_goes_on_at_any_number(
    replicas: bool, lora: bool, two: RankPool, three: RankPool, four: RankPool, tiny_llama: Path, tmp_path: Path
):
    batch = make_batch(9, 7, 20, 5, 3)
    writers, others = (four.with_replicas(2), (two, three)) if replicas else (two, (three, four))
    saved, *also = writers.run(rank_tasks.save, tiny_llama, tmp_path, batch, lora=lora)
    assert [each["sizes"] for each in also] == [saved["sizes"]] * len(also)
    # What is there several times is written once: by two ranks what they share out, by one what is whole on all.
    files = [file.name for file in (tmp_path / RUN / "state" / "state").glob("*.safetensors")]
    numbers = "1" if lora else "12"
    assert sorted(files) == [
        f"{group}-0000{number}-of-0000{4 if replicas else 2}.safetensors"
        for group in ("optimizer", "parameters")
        for number in numbers
    ]
    arguments = (tiny_llama, tmp_path, batch, saved["path"])
    alone = rank_tasks.go_on(Ranks(), *arguments, lora=lora)
    as_before = writers.run(rank_tasks.go_on, *arguments, lora=lora)
    elsewhere = [found for pool in others for found in pool.run(rank_tasks.go_on, *arguments, lora=lora)]
    for found in (alone, *as_before, *elsewhere):
        assert found["step"] == 1
        assert difference(found["loaded"], alone["loaded"], alone["loaded"]) == 0
        assert difference(found["after"], saved["after"], saved["after"]) < 1e-6
    assert {difference(each["after"], saved["after"], saved["after"]) for each in as_before} == {0}


@pytest.mark.parametrize(
    ("replicas", "lora"), [(False, False), (False, True), (True, False)], ids=["parts-full", "parts-lora", "replicas"]
)
def test_a_snapshot_of_half_a_step_goes_on_at_any_number(
    replicas: bool, lora: bool, two: RankPool, three: RankPool, four: RankPool, tiny_llama: Path, tmp_path: Path
):
    batch, where = make_batch(9, 7, 20, 5, 3), tmp_path / "snapshot"
    writers = four.with_replicas(2) if replicas else two
    wanted = writers.run(rank_tasks.snapshot, tiny_llama, tmp_path, batch, where, lora=lora)[0]["after"]
    arguments = (tiny_llama, tmp_path, batch, where)
    got = [found["after"] for found in writers.run(rank_tasks.restore, *arguments, lora=lora)]
    assert {difference(each, wanted, wanted) for each in got} == {0}
    for found in (
        rank_tasks.restore(Ranks(), *arguments, lora=lora),
        *three.run(rank_tasks.restore, *arguments, lora=lora),
    ):
        assert difference(found["after"], wanted, wanted) < 1e-6


def test_what_ranks_export_is_what_one_exports(two: RankPool, tiny_llama: Path, tmp_path: Path):
    batch = make_batch(9, 7, 20, 5, 3)
    path = two.run(rank_tasks.save, tiny_llama, tmp_path / "many", batch)[0]["path"]
    # One rank with those very parameters.
    rank_tasks.export(Ranks(), tiny_llama, tmp_path / "many", path, "weights-of-one")
    exports = tmp_path / "many" / "run-1" / "sampler_weights"
    for file in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        if file == "model.safetensors":
            one, many = (rank_tasks.read(exports / name / file) for name in ("weights-of-one", "weights"))
            assert difference(one, many, one) == 0
        else:
            assert (exports / "weights" / file).read_text() == (exports / "weights-of-one" / file).read_text()


@pytest.mark.parametrize(
    ("name", "changes", "settings"),
    [
        ("Llama", {}, {}),
        # The head gets an adapter of its own, and the embedding none.
        ("Qwen3", {"tie_word_embeddings": True}, {"unembed": True}),
        ("Qwen3Moe", {}, {"base_dtype": "bfloat16"}),
    ],
)
def test_adapters_are_merged_a_whole_tensor_at_a_time_into_what_one_rank_merges(
    name: str,
    changes: dict[str, Any],
    settings: dict[str, Any],
    two: RankPool,
    folder_of: Callable[..., Path],
    tmp_path: Path,
):
    arguments = folder_of(name, **changes), tmp_path / "many"
    leader, other = two.run(rank_tasks.merge, *arguments, "merged-2", **settings)
    # That very adapter.
    one = rank_tasks.merge(Ranks(), *arguments, "merged-1", adapter=leader["adapter"], **settings)
    exports = tmp_path / "many" / "run-1" / "sampler_weights"
    got, wanted = (rank_tasks.read(exports / each / "model.safetensors") for each in ("merged-2", "merged-1"))
    assert difference(got, wanted, wanted) == 0
    assert (exports / "merged-2" / "config.json").read_text() == (exports / "merged-1" / "config.json").read_text()
    assert leader["size"] == other["size"] == one["size"]
    # No more than the largest tensor is whole at a time.
    assert leader["whole"] == other["whole"] == max(tensor.nbytes for tensor in wanted.values())


@pytest.mark.parametrize(
    ("name", "world_size", "settings"),
    [
        ("Llama", 2, {}),
        ("Qwen3", 2, {"lora": True, "base_dtype": "bfloat16"}),
        ("Qwen3Moe", 4, {"lora": True}),
        ("Gemma2", 2, {}),
        # Layers are gathered in bfloat16, norms with them, which are all ones here.
        ("Llama", 2, {"lora": True, "compute_dtype": "bfloat16"}),
        # Whose sequences are decoded one at a time.
        ("Falcon", 2, {}),
    ],
)
def test_what_is_sampled_in_parts_is_what_is_sampled_of_a_whole_model(
    name: str,
    world_size: int,
    settings: dict[str, Any],
    two: RankPool,
    four: RankPool,
    folder_of: Callable[..., Path],
    tmp_path: Path,
):
    pool = two if world_size == 2 else four.with_replicas(2)
    folder = folder_of(name)
    prompts = [[5, 6, 7], [9] * 20, [8, 7]]
    found = {
        how: pool.run(
            rank_tasks.sample, folder, tmp_path / how, prompts=prompts, sampling_reshard_after_forward=how, **settings
        )
        for how in ("never", "always")
    }
    whole, parts = (found[how][0]["answers"] for how in ("never", "always"))
    assert len(whole) == 6
    assert all(answer.keys() == {0, 1, "prompt"} for answer in whole.values())
    assert parts == whole
    assert [each["answers"] for each in found["always"][1:]] == [{}] * (world_size - 1)
    assert all("gathered anew" in each["described"] for each in found["always"])
    for each in found["always"]:
        # Let go on all ranks together, once the last request of a closed sampler is done.
        assert each["held"] == found["always"][0]["held"]
        assert (each["held"][0], each["held"][-1]) == (3, 2)


def test_a_model_of_which_ranks_read_wrong_parts_is_refused_by_all(two: RankPool, tmp_path: Path) -> None:
    # Its files have q, k and v in one matrix, which transformers splits when each rank has read its part of it.
    config = HrmTextConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_layers_per_stack=2
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    refusals = two.run(rank_tasks.refused_model, tmp_path / "model", tmp_path)
    assert refusals[0] == refusals[1]
    assert "transformers gives ranks wrong parts; start the trainer with --nproc-per-node 1" in refusals[0][1]


def test_a_state_that_does_not_fit_is_refused_by_all_ranks(
    two: RankPool, folder_of: Callable[..., Path], tmp_path: Path
):
    batch = make_batch(9, 7)
    path = two.run(rank_tasks.save, folder_of("Llama"), tmp_path, batch)[0]["path"]
    refusals = two.run(rank_tasks.refused, folder_of("Llama", intermediate_size=64), tmp_path, path)
    assert [reason for reason, _ in refusals] == ["CHECKPOINT_MISMATCH"] * 2
    assert refusals[0] == refusals[1]


def test_a_loss_that_is_not_finite_names_its_datum_on_all_ranks(two: RankPool, tiny_llama: Path, tmp_path: Path):
    batch = make_batch(5, 9, 3, 8)
    batch.loss_fn_inputs["weights"][15] = np.inf
    refusals = two.run(rank_tasks.not_finite, tiny_llama, tmp_path, batch)
    assert refusals[0] == refusals[1]
    reason, text = refusals[0]
    assert reason == "NON_FINITE"
    assert "data[2]" in text


def test_gradients_are_added_up_in_the_order_of_ranks_and_stay_when_buffers_are_used_again(three: RankPool):
    # A part of the second is as large as what is summed in the third.
    sizes = [12, 36, 12, 36, 12]
    found = three.run(rank_tasks.sums, sizes)
    for number, size in enumerate(sizes):
        wanted = rank_tasks.summand(0, number, size)
        for rank in (1, 2):
            wanted = wanted + rank_tasks.summand(rank, number, size)
        np.testing.assert_array_equal(np.concatenate([parts[number] for parts in found]), wanted)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_deleted_run_s_parameters_are_gone_from_all_ranks(
    lora: bool, two: RankPool, tiny_llama: Path, tmp_path: Path
):
    assert two.run(rank_tasks.delete, tiny_llama, tmp_path, lora=lora) == [0, 0]
