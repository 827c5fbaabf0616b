"""docs/grpcurl.md, run as it stands with the real grpcurl."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.grpcurl import ROOT, bash, documents
from tests.trainer_process import TrainerProcess


def blocks() -> list[str]:
    """The two bash blocks behind this test's mark."""
    mark = r"<!-- run by tests/e2e/test_grpcurl\.py -->\s*```bash\n(.*?)```"
    return re.findall(mark, (ROOT / "docs" / "grpcurl.md").read_text(), re.DOTALL)


def test_every_grpcurl_command_of_the_page_works(trainer: TrainerProcess):
    first, second = blocks()
    asked = bash(first, trainer.address)
    assert "gradwire.v1.TrainerService" in asked
    assert "grpc.health.v1.Health" in asked
    assert "rpc ForwardBackward" in asked
    assert "loss_fn_config" in asked
    health, info, created = documents(asked)[-3:]
    assert health == {"status": "SERVING"}
    assert info["ready"] is True
    assert "cross_entropy" in [loss["name"] for loss in info["losses"]]

    trained = bash(second, trainer.address, RUN=created["run"]["run_id"])
    forward_backward, optim_step, run = documents(trained)
    logprobs = forward_backward["loss_fn_outputs"]["logprobs"]["floats"]["values"]
    assert len(logprobs) == 3
    assert forward_backward["metrics"]["loss:sum"] == pytest.approx(-sum(logprobs[1:]), rel=1e-5)
    assert optim_step["step"] == "1"
    assert optim_step["metrics"]["grad_norm:mean"] > 0
    assert run["run"]["step"] == "1"


def test_a_wrong_request_typed_by_hand_says_what_is_wrong(trainer: TrainerProcess):
    created = documents(bash(blocks()[0], trainer.address))[-1]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    request = {
        "run_id": created["run"]["run_id"],
        "loss_fn": "cross_entropie",
        "data": [{"model_input": {"tokens": [1]}, "loss_fn_inputs": {"target_tokens": {"ints": {"values": [2]}}}}],
    }
    method = "gradwire.v1.TrainerService/ForwardBackward"
    done = subprocess.run(
        ["grpcurl", "-plaintext", "-d", json.dumps(request), trainer.address, method],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert "InvalidArgument" in done.stderr
    assert "cross_entropy" in done.stderr
