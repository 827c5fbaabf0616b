"""The gradwire command line against a real trainer."""

import json
import os
import subprocess
import sys
from pathlib import Path

from gradwire import ServiceClient, TrainingClient

from tests.e2e.test_training import ADAM, data
from tests.trainer_process import TrainerProcess


def gradwire(trainer: TrainerProcess, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "gradwire.cli", *arguments],
        env={**os.environ, "GRADWIRE_BASE_URL": trainer.base_url},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_runs_and_checkpoints_from_the_command_line(
    trainer: TrainerProcess, service: ServiceClient, client: TrainingClient, tmp_path: Path
):
    import torch
    from transformers import AutoModelForCausalLM

    base = client.save_weights_for_sampler_ext("base").path
    client.forward_backward(data(6), "cross_entropy")
    client.optim_step(ADAM)
    delta = client.save_weights_for_sampler_ext("delta", checkpoint_type="delta").path
    whole = client.save_weights_for_sampler_ext("whole").path
    state = client.save_state("state").result(60)

    runs = json.loads(gradwire(trainer, "runs", "list", "--json").stdout)
    assert client.run_id in {run["run_id"] for run in runs}
    assert client.run_id in gradwire(trainer, "runs", "list").stdout
    assert "step" in gradwire(trainer, "runs", "show", client.run_id).stdout
    listed = json.loads(gradwire(trainer, "checkpoints", "list", "--run", client.run_id, "--json").stdout)
    assert [one["path"] for one in listed] == [state, whole, delta, base]
    table = gradwire(trainer, "checkpoints", "list", "--run", client.run_id).stdout
    assert table.splitlines()[0].split() == ["CHECKPOINT", "TYPE", "STEP", "SIZE", "CREATED", "EXPIRES"]
    assert "model.safetensors" in gradwire(trainer, "checkpoints", "show", whole).stdout

    # Half of a file is here already, as after a stop.
    folder = tmp_path / "whole"
    folder.mkdir()
    saved = Path(client.save_weights_for_sampler_ext("again").uri.removeprefix("file://"))
    content = (saved / "model.safetensors").read_bytes()
    (folder / ".model.safetensors.part").write_bytes(content[: len(content) // 2])
    said = gradwire(trainer, "checkpoints", "download", whole, str(folder))
    assert "100%" in said.stderr
    assert (folder / "model.safetensors").read_bytes() == content
    assert not list(folder.glob(".*"))
    gradwire(trainer, "export", delta, str(tmp_path / "exported"))
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (folder, tmp_path / "exported")]
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)

    assert "only training reads" in gradwire(trainer, "export", state, code=1).stderr
    assert "is the base of 1 deltas" in gradwire(trainer, "checkpoints", "delete", base, code=1).stderr
    gradwire(trainer, "checkpoints", "delete", delta)
    assert "There is no checkpoint" in gradwire(trainer, "checkpoints", "show", delta, code=1).stderr
    assert "There is no run" in gradwire(trainer, "runs", "show", "run-0", code=1).stderr
    gradwire(trainer, "runs", "show", code=2)


def test_a_trainer_that_is_not_there_is_a_sentence(trainer: TrainerProcess):
    done = gradwire(trainer, "runs", "list", "--base-url", "nonsense", code=2)
    assert "nonsense" in done.stderr
