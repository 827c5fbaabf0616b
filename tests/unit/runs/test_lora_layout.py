"""What GetRun says that an adapter adapts."""

import json
from pathlib import Path

import pytest
from gradwire.v1.trainer_service_pb2 import CreateRunRequest
from gradwire.v1.worker_service_pb2 import LoraTargets

from trainer_service.adapter_folders import CONFIG, WEIGHTS, starred
from trainer_service.runs.lora_layout import lora_layout

TARGETS = LoraTargets(
    attn=["model.layers.*.self_attn.q_proj"],
    mlp=["model.layers.*.mlp.experts.down_proj", "model.layers.*.mlp.experts.gate_up_proj"],
    unembed=["lm_head"],
    others=["model.layers.*.mlp.gate.weight"],
)


def test_a_new_adapter_adapts_the_kinds_asked_for_and_the_rest_is_left_out():
    every = lora_layout(CreateRunRequest(lora_rank=8), TARGETS)
    assert list(every.adapted) == sorted([*TARGETS.attn, *TARGETS.mlp, *TARGETS.unembed])
    assert list(every.left_out) == ["model.layers.*.mlp.gate.weight"]
    assert (every.lora_alpha, every.train_attn, every.train_mlp, every.train_unembed) == (32, True, True, True)
    some = lora_layout(CreateRunRequest(lora_rank=8, lora_alpha=4, train_mlp=False, train_unembed=False), TARGETS)
    assert list(some.adapted) == ["model.layers.*.self_attn.q_proj"]
    assert set(some.left_out) == {*TARGETS.mlp, *TARGETS.unembed, *TARGETS.others}
    assert (some.lora_alpha, some.train_attn, some.train_mlp, some.train_unembed) == (4, True, False, False)


def test_a_kind_that_the_model_lacks_is_none_that_trains():
    found = lora_layout(CreateRunRequest(lora_rank=8), LoraTargets(attn=["layers.*.mixer.in_proj"]))
    assert (found.train_attn, found.train_mlp, found.train_unembed) == (True, False, False)


def test_an_adapter_that_was_there_adapts_what_it_has_matrices_for(tmp_path: Path):
    keys = [
        f"base_model.model.model.layers.{layer}.mlp.experts{within}.lora_{side}.weight"
        for layer in range(2)
        for within in ("", ".base_layer")
        for side in "AB"
    ]
    header = json.dumps({key: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for key in keys}).encode()
    (tmp_path / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)
    (tmp_path / CONFIG).write_text(json.dumps({"r": 4, "lora_alpha": 16}))
    found = lora_layout(CreateRunRequest(lora_rank=4, adapter_path=str(tmp_path)), TARGETS)
    assert list(found.adapted) == list(TARGETS.mlp)
    assert (found.lora_alpha, found.train_attn, found.train_mlp, found.train_unembed) == (16, False, True, False)


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["model.layers.0.mlp", "model.layers.11.mlp"], ["model.layers.*.mlp"]),
        (["a.0", "h.2.fc1"], ["a.*", "h.*.fc1"]),
        (["lm_head"], ["lm_head"]),
    ],
)
def test_numbers_of_layers_are_told_as_a_star(names: list[str], shown: list[str]):
    assert starred(names) == shown
