"""Ranks that compute each layer together compute what one rank does."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import rank_tasks
from tests.engines import RUN, make_batch
from tests.numerics.architectures import make_model
from tests.numerics.plain import load_plain
from tests.numerics.test_ranks import STEPS, UNEVEN, check_equal, difference
from tests.rank_pool import RankPool, rank_pool
from trainer_service.engine.rank_channels import Ranks

CUT = 3e-6
"""Largest difference of a gradient, relative to its norm. Every sum in a model that is cut is added up in another
order: a test below compares with float64, too."""
BATCH = make_batch(9, 7, 20, 5, 3)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Two ranks, one group."""
    with rank_pool(2, tmp_path_factory.mktemp("two")) as pool:
        yield pool.cutting_layers(2)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Four ranks, two groups."""
    with rank_pool(4, tmp_path_factory.mktemp("four")) as pool:
        yield pool.cutting_layers(2)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes models' folders."""
    return lambda name, **changes: make_model(tmp_path_factory.mktemp("model"), name, **changes)


@pytest.mark.parametrize(
    ("name", "changes", "lora"),
    [
        # Biases beside everything that is cut.
        ("Llama", {"attention_bias": True, "mlp_bias": True}, False),
        ("Llama", {"attention_bias": True, "mlp_bias": True, "pad_token_id": 100}, True),
        ("Qwen3", {"tie_word_embeddings": True}, False),
        ("Qwen3", {"tie_word_embeddings": True}, True),
        ("Qwen3", {"tie_word_embeddings": False}, False),
        ("Gemma2", {}, False),
        ("Gemma2", {}, True),
    ],
)
def test_two_ranks_that_cut_layers_train_as_one_does(
    name: str, changes: dict[str, Any], lora: bool, two: RankPool, folder_of: Callable[..., Path], tmp_path: Path
):
    check_equal(two, folder_of(name, **changes), tmp_path, within=CUT, lora=lora)


@pytest.mark.parametrize(
    "how",
    [
        {"lora": True, "unembed": True},
        {"custom": True},
        {"custom": True, "max_held_graph_bytes": 1},
        {"activation_checkpointing": "on", "lora": True},
        {"activation_checkpointing": "on", "fsdp_reshard_after_forward": "always"},
    ],
    ids=["head", "held", "recomputed", "checkpointed-lora", "checkpointed"],
)
def test_all_ways_to_train_do_so_on_cut_layers(how: dict[str, Any], two: RankPool, tiny_llama: Path, tmp_path: Path):
    found = check_equal(two, tiny_llama, tmp_path, within=CUT, **how)
    assert (found[0]["recomputed"] > 0) == ("max_held_graph_bytes" in how)


@pytest.mark.parametrize(("groups", "replicas", "how"), [(2, 1, {}), (2, 2, {"lora": True}), (2, 2, {}), (1, 1, {})])
def test_four_ranks_that_cut_layers_train_as_one_does(
    groups: int, replicas: int, how: dict[str, Any], four: RankPool, folder_of: Callable[..., Path], tmp_path: Path
):
    arranged = four.cutting_layers(4 // groups, replicas=replicas)
    folder = folder_of("Qwen3", tie_word_embeddings=True, num_key_value_heads=4)
    check_equal(arranged, folder, tmp_path, within=CUT, **how)


def test_gradients_of_cut_layers_are_as_near_to_float64s_as_one_ranks(two: RankPool, tiny_llama: Path, tmp_path: Path):
    exact = load_plain(tiny_llama, dtype=torch.float64)
    for batch in UNEVEN:
        targets, weights = (torch.from_numpy(batch.loss_fn_inputs[name]) for name in ("target_tokens", "weights"))
        for start, stop in pairwise(batch.cu_seqlens.tolist()):
            tokens = torch.from_numpy(batch.tokens_T[start:stop]).long()
            logprobs = exact(tokens[None]).logits[0].log_softmax(-1).gather(-1, targets[start:stop, None])[:, 0]
            (-(weights[start:stop] * logprobs).sum()).backward()
    wanted = {name: p.grad.numpy() for name, p in exact.named_parameters() if p.grad is not None}
    one = rank_tasks.train(Ranks(), tiny_llama, tmp_path / "one", UNEVEN)
    many = two.run(rank_tasks.train, tiny_llama, tmp_path / "many", UNEVEN)[0]
    errors = [difference(each["gradients"], wanted, wanted) for each in (many, one)]
    assert errors[0] < 2 * errors[1] < 1e-5


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_cut_layers_in_bfloat16_are_as_near_to_float32_as_one_ranks(
    lora: bool, two: RankPool, tiny_llama: Path, tmp_path: Path
):
    how: dict[str, Any] = {"max_pack_tokens": 20, "lora": lora}
    exact = rank_tasks.train(Ranks(), tiny_llama, tmp_path / "exact", UNEVEN, **how)["gradients"]
    one = rank_tasks.train(Ranks(), tiny_llama, tmp_path / "one", UNEVEN, compute_dtype="bfloat16", **how)["gradients"]
    many = two.run(rank_tasks.train, tiny_llama, tmp_path / "many", UNEVEN, compute_dtype="bfloat16", **how)
    errors = [difference(each, exact, exact) for each in (many[0]["gradients"], one)]
    assert 0 < errors[0] < 1.5 * errors[1] < 0.5, errors
    assert difference(many[0]["after"], many[1]["after"], many[0]["after"]) == 0


@pytest.mark.parametrize("columns", [0, 3], ids=["one", "many"])
@pytest.mark.parametrize(
    "head",
    [
        {"trains": True, "low_rank": 0},
        {"trains": True, "low_rank": 0, "scale": 0.3, "softcap": 2.0, "keep_logits": True},
        {"trains": False, "low_rank": 0},
        {"trains": False, "low_rank": 0, "scale": 0.3, "softcap": 2.0},
        {"trains": False, "low_rank": 2, "softcap": 2.0},
    ],
    ids=["trained", "kept", "frozen", "frozen-capped", "adapted"],
)
def test_a_head_whose_vocabulary_ranks_divide_answers_as_a_whole_one(head: dict[str, Any], columns: int, two: RankPool):
    for errors in two.run(rank_tasks.answer, columns=columns, **head):
        assert {"logprobs", "hidden"} <= errors.keys()
        assert max(errors.values()) < 1e-6, errors


def test_the_same_log_leads_ranks_that_cut_layers_to_the_same_bits(two: RankPool, tiny_llama: Path, tmp_path: Path):
    first, again = (two.run(rank_tasks.train, tiny_llama, tmp_path / each, UNEVEN)[0] for each in ("a", "b"))
    assert difference(first["after"], again["after"], first["after"]) == 0


def alone(task: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
    """A task of one rank."""
    return [task(Ranks(), *args, **kwargs)]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_states_go_from_one_arrangement_to_another(
    lora: bool, two: RankPool, four: RankPool, tiny_llama: Path, tmp_path: Path
):
    ways = {"alone": alone, "cut": two.run, "in parts": two.uncut().run, "both": four.run}
    reads = {"cut": ["alone", "cut", "in parts", "both"], "alone": ["cut"], "in parts": ["cut"], "both": ["cut"]}
    for writer, readers in reads.items():
        folder = tmp_path / writer
        saved = ways[writer](rank_tasks.save, tiny_llama, folder, BATCH, lora=lora, exports=False)[0]
        for reader in readers:
            for found in ways[reader](rank_tasks.go_on, tiny_llama, folder, BATCH, saved["path"], lora=lora):
                assert found["step"] == 1
                error = difference(found["after"], saved["after"], saved["after"])
                assert error == 0 if reader == writer else error < STEPS, (writer, reader, error)
    # Each rank writes its part, and what a group has twice its first.
    files = sorted((tmp_path / "both" / RUN / "state" / "state").glob("parameters-*.safetensors"))
    shapes = [{name: values.shape for name, values in rank_tasks.read(file).items()} for file in files]
    if lora:
        a, b = (f"model.layers.0.self_attn.q_proj.lora_{each}.default.weight" for each in "AB")
        assert [(a in each, each[b]) for each in shapes] == [(True, (16, 4)), (False, (16, 4))]
    else:
        weight, norm = "model.layers.0.mlp.down_proj.weight", "model.norm.weight"
        whole = load_plain(tiny_llama).get_parameter(weight).shape
        assert [each[weight] for each in shapes] == [(whole[0] // 2, whole[1] // 2)] * 4
        assert [norm in each for each in shapes] == [True, False, True, False]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_snapshots_of_half_a_step_go_on_in_any_arrangement(
    lora: bool, two: RankPool, four: RankPool, tiny_llama: Path, tmp_path: Path
):
    arguments = (tiny_llama, tmp_path, BATCH)
    for name, writers, others in (("cut", two, (alone, four.run)), ("in parts", two.uncut(), (two.run,))):
        wanted = writers.run(rank_tasks.snapshot, *arguments, tmp_path / name, lora=lora)[0]["after"]
        again = writers.run(rank_tasks.restore, *arguments, tmp_path / name, lora=lora)
        assert {difference(each["after"], wanted, wanted) for each in again} == {0}
        for run in others:
            for found in run(rank_tasks.restore, *arguments, tmp_path / name, lora=lora):
                assert difference(found["after"], wanted, wanted) < STEPS


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_what_ranks_that_cut_layers_export_is_what_one_exports(
    lora: bool, two: RankPool, tiny_llama: Path, tmp_path: Path
):
    path = two.run(rank_tasks.save, tiny_llama, tmp_path, BATCH, lora=lora)[0]["path"]
    # One rank with those very parameters.
    rank_tasks.export(Ranks(), tiny_llama, tmp_path, path, "weights-of-one", lora=lora)
    exports = tmp_path / RUN / "sampler_weights"
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    one, many = (rank_tasks.read(exports / name / file) for name in ("weights-of-one", "weights"))
    assert difference(one, many, one) == 0
    if lora:
        # Its product with the frozen weights, whole.
        rank_tasks.export(Ranks(), tiny_llama, tmp_path, path, "merged-of-one", lora=True, merged=True)
        one, many = (rank_tasks.read(exports / name / "model.safetensors") for name in ("merged-of-one", "merged"))
        assert difference(one, many, one) < 1e-6
        assert two.run(rank_tasks.adapter, tiny_llama, tmp_path, exports / "weights") == [0.0, 0.0]


def test_a_loss_that_is_not_finite_is_told_once_by_ranks_that_cut_layers(
    two: RankPool, tiny_llama: Path, tmp_path: Path
):
    batch = make_batch(5, 9, 3, 8)
    batch.loss_fn_inputs["weights"][15] = np.inf
    refusals = two.run(rank_tasks.not_finite, tiny_llama, tmp_path, batch)
    assert refusals[0] == refusals[1]
    assert refusals[0][0] == "NON_FINITE"
    assert "data[2]" in refusals[0][1]


def test_a_deleted_run_leaves_nothing_of_cut_layers(two: RankPool, tiny_llama: Path, tmp_path: Path):
    assert two.run(rank_tasks.delete, tiny_llama, tmp_path, lora=False) == [0, 0]


def test_a_model_whose_plan_says_nothing_of_its_embedding_is_cut_all_the_same(
    two: RankPool, folder_of: Callable[..., Path], tmp_path: Path
):
    folder = folder_of("GPTNeoX")
    one = rank_tasks.train(Ranks(), folder, tmp_path, UNEVEN)
    many = two.run(rank_tasks.train, folder, tmp_path, UNEVEN)[0]
    # Not its steps: gradients of biases of keys are rounding errors, by which Adam goes as far as by others.
    assert difference(one["gradients"], many["gradients"], one["gradients"]) < CUT


def test_a_model_that_cannot_be_cut_is_refused_by_all_ranks(
    two: RankPool, folder_of: Callable[..., Path], tmp_path: Path
):
    refusals = two.run(rank_tasks.refused_model, folder_of("Qwen3", num_key_value_heads=1), tmp_path)
    assert refusals[0] == refusals[1]
    assert "tp_size is 2, and Qwen3ForCausalLM has 1 key/value heads" in refusals[0][1]


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        # Each rank's gradient is all of it, and not a summand.
        (
            {"layers.*.input_layernorm": "replicated_with_grad_allreduce"},
            "the gradient of model.layers.0.input_layernorm.weight comes out otherwise",
        ),
        # Its inputs are one rank's.
        ({"layers.*.mlp.down_proj": "colwise"}, "RuntimeError: "),
    ],
)
def test_a_plan_that_makes_another_model_of_it_is_refused_by_all_ranks(
    plan: dict[str, str], why: str, two: RankPool, tiny_llama: Path, tmp_path: Path
):
    refusals = two.run(rank_tasks.refused_model, tiny_llama, tmp_path, plan)
    assert refusals[0] == refusals[1]
    assert refusals[0][0] == "INVALID_FIELD"
    assert "tp_size is 2, and a LlamaForCausalLM cut by transformers' plan is another model: " in refusals[0][1]
    assert why in refusals[0][1]


def test_a_model_whose_head_is_not_known_is_refused_by_all_ranks(two: RankPool, tiny_llama: Path, tmp_path: Path):
    refusals = two.run(rank_tasks.refused_model, tiny_llama, tmp_path, headless=True)
    assert refusals[0] == refusals[1]
    assert "tp_size is 2, and a LlamaForCausalLM makes logits in a way of its own" in refusals[0][1]
