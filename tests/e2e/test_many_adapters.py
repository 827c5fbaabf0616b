"""examples/many_adapters.py as a user runs it, on a tiny model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(300)
def test_each_adapter_learns_its_own_rule(tiny_llama: Path, tmp_path: Path):
    command = [sys.executable, str(ROOT / "examples" / "many_adapters.py"), "--base-model", str(tiny_llama)]
    command += ["--steps", "6", "--batch-size", "6", "--held-out", "4", "--learning-rate", "5e-2"]
    env = {**os.environ, "GRADWIRE_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (before,) = map(float, re.findall(r"per token before: ([0-9.]+)", done.stdout))
    ((own, others),) = re.findall(r"own rule: ([0-9.]+); others' rules: ([0-9.]+)", done.stdout)
    assert float(own) < float(others), done.stdout
    assert float(own) < before, done.stdout
    assert (tmp_path / "many_adapters.png").read_bytes().startswith(b"\x89PNG")
