"""Rows padded on the right equal plain transformers on what cannot be packed: logprobs and every gradient, as near to
float64 as float32 allows (plain.py)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gradwire.errors import InvalidArgumentError
from transformers import LlamaForCausalLM

from tests.engines import make_engine
from tests.numerics.architectures import PADDED, check, check_custom, make_model, plan_anew, ragged
from trainer_service.worker_config import EngineSettings

WHY: dict[str, str] = {
    "Llama4": "it has layers of kind chunked_attention, full logits",
    **dict.fromkeys(
        ("Falcon", "Bloom", "Mpt", "GPTJ", "GPTNeo", "CodeGen", "XGLM", "Rwkv"),
        "its attention does not go through transformers' interface",
    ),
}


@pytest.mark.parametrize("architecture", PADDED)
def test_what_cannot_be_packed_goes_in_rows_and_equals_plain_transformers(
    folder_of: Callable[..., Path], architecture: str, tmp_path: Path
) -> None:
    folder, sequences = folder_of(architecture), ragged()
    engine = make_engine(folder, tmp_path)
    why = WHY.get(architecture, "packed sequences see one another")
    assert engine.traits.batching == f"rows of similar length, padded: {why}"
    metrics = check(engine, folder, sequences)
    assert metrics["forward_passes:sum"] < len(sequences) / 2
    assert metrics["num_shared_tokens:sum"] == 0
    assert engine.counters.padding_tokens_total > 0
    # Soft targets in several forwards whose graph finds no room; layers are computed again in their backward.
    plan_anew(engine, EngineSettings(max_pack_tokens=70, max_held_graph_bytes=1, activation_checkpointing="on"))
    assert check_custom(engine, folder, seed=1)["forward_passes:sum"] > 1


def test_rows_that_would_see_one_another_go_one_at_a_time_and_it_is_said(
    folder_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of which nobody has told us that it is none that is batched."""
    forward: Any = LlamaForCausalLM.forward

    def beside_others(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        output = forward(model, input_ids, **kwargs)
        output.logits = output.logits * len(input_ids)
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", beside_others)
    monkeypatch.setattr("trainer_service.engine.models.probe._why_never_packed", lambda model: "it is tried")
    engine = make_engine(folder_of("Llama"), tmp_path)
    assert (
        engine.traits.batching == "one sequence at a time: it is tried, and rows come out otherwise beside one another"
    )
    sequences = ragged()
    metrics = check(engine, folder_of("Llama"), sequences)
    assert metrics["forward_passes:sum"] == len(sequences)


def test_a_model_whose_forward_changes_its_parameters_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PADDED, "Rwkv", {**PADDED["Rwkv"], "rescale_every": 6})
        folder = make_model(tmp_path, "Rwkv")
    with pytest.raises(InvalidArgumentError, match=r"is a RwkvForCausalLM whose forward changes its own parameters"):
        make_engine(folder, tmp_path)
