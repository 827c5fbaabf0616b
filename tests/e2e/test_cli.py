"""The gradwire command line against a real trainer."""

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gradwire import ServiceClient, TrainingClient
from transformers import AutoModelForCausalLM

from tests.cli import gradwire, refusal
from tests.pem import make_pem
from tests.trainer_process import TrainerProcess, running_trainer
from tests.training import ADAM, all_logprobs, data


def test_runs_and_checkpoints_from_the_command_line(trainer: TrainerProcess, client: TrainingClient, tmp_path: Path):
    url = trainer.base_url
    base = client.save_weights_for_sampler_ext("base").path
    client.forward_backward(data(6), "cross_entropy")
    client.optim_step(ADAM)
    delta = client.save_weights_for_sampler_ext("delta", checkpoint_type="delta").path
    whole = client.save_weights_for_sampler_ext("whole").path
    state = client.save_state("state").result(60)

    runs = json.loads(gradwire(url, "runs", "list", "--json").stdout)
    assert client.run_id in {run["run_id"] for run in runs}
    assert client.run_id in gradwire(url, "runs", "list").stdout
    assert "step" in gradwire(url, "runs", "show", client.run_id).stdout
    listed = json.loads(gradwire(url, "checkpoints", "list", "--run", client.run_id, "--json").stdout)
    assert [one["path"] for one in listed] == [state, whole, delta, base]
    table = gradwire(url, "checkpoints", "list", "--run", client.run_id).stdout
    assert table.splitlines()[0].split() == ["CHECKPOINT", "TYPE", "STEP", "SIZE", "CREATED", "EXPIRES", "METADATA"]
    assert "model.safetensors" in gradwire(url, "checkpoints", "show", whole).stdout

    folder = tmp_path / "whole"
    gradwire(url, "checkpoints", "download", whole, folder)
    gradwire(url, "export", delta, tmp_path / "exported")
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (folder, tmp_path / "exported")]
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)

    assert "only training reads" in refusal(url, "export", state)
    assert "is the base of 1 deltas" in refusal(url, "checkpoints", "delete", base)
    assert gradwire(url, "checkpoints", "delete", delta).stdout == f"Deleted {delta}.\n"
    assert json.loads(gradwire(url, "checkpoints", "delete", base, "--json").stdout) == {"deleted": base}
    assert "There is no checkpoint" in refusal(url, "checkpoints", "show", delta)


def test_a_fork_from_the_command_line_is_the_run_as_it_was(
    trainer: TrainerProcess, service: ServiceClient, client: TrainingClient
):
    url = trainer.base_url
    before = all_logprobs(client, data(6))
    client.forward_backward(data(6), "cross_entropy")
    client.optim_step(ADAM).result(60)
    after = all_logprobs(client, data(6))
    made = json.loads(gradwire(url, "runs", "fork", client.run_id, "--step", 0, "--name", "early", "--json").stdout)
    assert (made["step"], made["display_name"]) == ("0", "early")
    np.testing.assert_array_equal(all_logprobs(service.training_client(made["run_id"]), data(6)), before)
    # Without a step: as the run is now.
    shown = dict(line.split(maxsplit=1) for line in gradwire(url, "runs", "fork", client.run_id).stdout.splitlines())
    assert (shown["step"], shown["state"]) == ("1", "active")
    np.testing.assert_array_equal(all_logprobs(service.training_client(shown["run_id"]), data(6)), after)

    assert "step is 7, which" in refusal(url, "runs", "fork", client.run_id, "--step", 7)
    said = gradwire(url, "runs", "delete", shown["run_id"]).stdout
    assert said == f"Deleted {shown['run_id']}; its checkpoints stay.\n"
    deleted = json.loads(gradwire(url, "runs", "delete", made["run_id"], "--json").stdout)
    assert deleted == {"deleted": made["run_id"]}
    runs = json.loads(gradwire(url, "runs", "list", "--json").stdout)
    assert not {made["run_id"], shown["run_id"]} & {run["run_id"] for run in runs}


@pytest.mark.parametrize("verb", ["show", "delete", "fork", "replay"])
def test_a_run_there_is_none_of_is_refused(trainer: TrainerProcess, verb: str):
    for json_too in ([], ["--json"]):
        assert refusal(trainer.base_url, "runs", verb, "run-0", *json_too).startswith("There is no run 'run-0'")


def test_a_replay_from_the_command_line_ends_with_3_where_an_answer_differs(
    trainer: TrainerProcess, client: TrainingClient
):
    client.forward_backward(data(6), "cross_entropy")
    client.optim_step(ADAM).result(60)
    client.save_state("kept").result(60)
    replay = ["runs", "replay", client.run_id]
    done = gradwire(trainer.base_url, *replay)
    assert done.stdout.splitlines() == [
        f"{client.run_id} came out as it did.",
        "after_seq_id  0",
        "compared      2",
        "not_compared  1",
    ]
    found = json.loads(gradwire(trainer.base_url, *replay, "--verify", "--json").stdout)
    assert found == {"after_seq_id": "0", "compared": "2", "not_compared": "1"}

    journal = trainer.log.parent / "data" / "runs" / client.run_id / "journal.sqlite"
    with contextlib.closing(sqlite3.connect(journal)) as db, db:
        [(seq_id, answer)] = db.execute(
            "SELECT seq_id, answer FROM outcomes JOIN operations USING (seq_id) WHERE kind = 'optim_step'"
        )
        changed = bytearray(answer)
        # One bit of a metric.
        changed[answer.index(b"grad_norm:mean") + 20] ^= 1
        db.execute("UPDATE outcomes SET answer = ? WHERE seq_id = ?", (bytes(changed), seq_id))
    said = gradwire(trainer.base_url, *replay, code=3)
    assert said.stderr == ""
    first, *rest = said.stdout.splitlines()
    assert first == f"{client.run_id} differs at seq_id {seq_id} (optim_step, behind optimizer step 0)."
    assert {line.split()[0] for line in rest} >= {"difference.recorded_digest", "difference.replayed_digest"}
    difference = json.loads(gradwire(trainer.base_url, *replay, "--json", code=3).stdout)["difference"]
    assert (difference["seq_id"], difference["kind"], difference["step"]) == (str(seq_id), "optim_step", "0")
    assert difference["recorded_digest"] != difference["replayed_digest"]


def test_the_command_is_a_process_and_reads_the_environment(trainer: TrainerProcess, client: TrainingClient):
    done = subprocess.run(
        [sys.executable, "-m", "gradwire.cli", "runs", "list"],
        env={**os.environ, "GRADWIRE_BASE_URL": trainer.base_url},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert client.run_id in done.stdout


def test_a_trainer_process_that_asks_for_a_certificate_is_opened_with_one(tiny_llama: Path, tmp_path: Path):
    pem = make_pem(tmp_path)
    cert, key = pem.server
    options = ["--tls-cert-file", cert, "--tls-key-file", key, "--tls-client-ca-file", pem.ca]
    client = ["--tls-ca-file", pem.ca, "--tls-cert-file", pem.client[0], "--tls-key-file", pem.client[1]]
    with running_trainer(tiny_llama, tmp_path, *map(str, options), forked=True) as trainer:
        # It lists runs before its model is loaded.
        assert gradwire(f"https://{trainer.address}", "runs", "list", "--json", *client).stdout == "[]\n"
