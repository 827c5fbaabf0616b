"""Losses over the wire: those of reinforcement learning, and one of the trainer's owner."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gradwire import AdamParams, Datum, ModelInput, ServiceClient, TrainingClient
from gradwire.errors import InvalidArgumentError

from tests.focal import FOCAL
from tests.trainer_process import running_trainer


def sampled(client: TrainingClient, lengths: list[int]) -> list[Datum]:
    """Datums whose sampler is the model as it is now, the first half of them good, the others bad."""
    rng = np.random.default_rng(0)
    plain = [
        Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:]})
        for tokens in (rng.integers(3, 127, n + 1) for n in lengths)
    ]
    found = client.forward(plain).result(60).loss_fn_outputs
    good = [1.0] * (len(lengths) // 2) + [-1.0] * (len(lengths) - len(lengths) // 2)
    return [
        Datum(
            datum.model_input,
            {
                **datum.loss_fn_inputs,
                "logprobs": output["logprobs"],
                "advantages": np.full(len(output["logprobs"]), advantage, dtype=np.float32),
            },
        )
        for datum, output, advantage in zip(plain, found, good, strict=True)
    ]


def test_ppo_makes_good_datums_likelier_and_bad_ones_rarer(client: TrainingClient):
    data = sampled(client, [9, 14, 7, 12])
    first = client.forward_backward(data, "ppo").result(60)
    client.optim_step(AdamParams(learning_rate=1e-2)).result(60)
    assert first.metrics["ratio:mean"] == pytest.approx(1, abs=1e-5)
    assert first.metrics["clipped_fraction:mean"] == 0
    assert first.metrics["kl:mean"] == pytest.approx(0, abs=1e-6)
    assert first.metrics["loss:sum"] == pytest.approx(-(9 + 14 - 7 - 12), rel=1e-4)
    second = client.forward(data, "ppo").result(60)
    assert second.metrics["loss:sum"] < first.metrics["loss:sum"]
    assert second.metrics["kl:mean"] > 0
    assert second.metrics["ratio:max"] > 1
    moved = [
        float((after["logprobs"].to_numpy() - datum.loss_fn_inputs["logprobs"].to_numpy()).sum())
        for datum, after in zip(data, second.loss_fn_outputs, strict=True)
    ]
    assert sum(moved[:2]) > 0 > sum(moved[2:])


def test_a_setting_that_is_missing_or_misspelt_reaches_the_caller_as_a_sentence(client: TrainingClient):
    data = sampled(client, [3])
    with pytest.raises(InvalidArgumentError, match="dro has no default for it"):
        client.forward_backward(data, "dro").result(60)
    with pytest.raises(InvalidArgumentError, match="known: clip_low_threshold"):
        client.forward_backward(data, "ppo", {"clip_range": 0.2}).result(60)


def test_a_loss_of_the_trainers_owner_is_announced_and_trains(tiny_llama: Path, tmp_path: Path):
    (tmp_path / "my_losses.py").write_text(FOCAL)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    arguments = ("--loss-module", "my_losses")
    with (
        running_trainer(tiny_llama, tmp_path, *arguments, env={"PYTHONPATH": path}, forked=True) as trainer,
        ServiceClient(trainer.base_url, timeout_s=60) as service,
    ):
        client = service.create_training_client()
        losses = {loss.name: loss for loss in service.get_server_info().losses}
        assert list(losses)[-1] == "focal"
        assert dict(losses["focal"].loss_fn_config_defaults) == {"gamma": 2.0}
        assert list(losses["gspo"].loss_fn_config_keys) == ["clip_low_threshold", "clip_high_threshold"]
        assert not losses["gspo"].loss_fn_config_defaults
        assert [name for name, loss in losses.items() if loss.soft_targets] == ["cross_entropy"]
        datum = Datum(
            ModelInput.from_ints([3, 4, 5]),
            {"target_tokens": [4, 5, 6], "weights": np.ones(3, dtype=np.float32)},
        )
        values = []
        for _ in range(3):
            values.append(client.forward_backward([datum], "focal").result(60).metrics["loss:sum"])
            client.optim_step(AdamParams(learning_rate=1e-2)).result(60)
        assert values == sorted(values, reverse=True)


def test_a_trainer_whose_loss_module_is_not_there_says_so_and_ends(tiny_llama: Path, tmp_path: Path):
    command = [sys.executable, "-m", "trainer_service", "serve", "--base-model", str(tiny_llama)]
    command += ["--listen", "127.0.0.1:0", "--data-dir", str(tmp_path), "--loss-module", "no_such_losses"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert 'gradwire: --loss-module "no_such_losses" is no module here' in done.stderr
