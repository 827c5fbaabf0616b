"""The wheel, installed into an environment of its own: what a user has who never saw this tree."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRAIN = """
import json, subprocess, sys, time
from pathlib import Path
import gradwire

assert Path(gradwire.__file__).is_relative_to(sys.prefix), gradwire.__file__
command = [f"{sys.prefix}/bin/gradwire", "serve", "--base-model", sys.argv[1], "--listen", "127.0.0.1:0"]
command += ["--data-dir", "data", "--ready-file", "ready.json", "--exit-with-parent"]
trainer = subprocess.Popen(command, stdin=subprocess.PIPE)
while not Path("ready.json").exists():
    assert trainer.poll() is None
    time.sleep(0.05)
service = gradwire.ServiceClient("http://" + json.loads(Path("ready.json").read_text())["address"])
client = service.create_training_client()
datum = gradwire.datum_from_tokens_weights([1, 2, 3, 4], [0.0, 1.0, 1.0, 1.0])
losses = []
for _ in range(3):
    passed = client.forward_backward([datum], "cross_entropy")
    client.optim_step(gradwire.AdamParams(learning_rate=1e-2)).result(120)
    losses.append(passed.result(120).metrics["loss:sum"])
assert losses[2] < losses[0], losses
service.close()
trainer.stdin.close()
assert trainer.wait(60) == 0
print("trained")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_says_what_it_is_and_carries_no_tests(wheel: Path):
    with zipfile.ZipFile(wheel) as files:
        names = files.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        about = files.read(metadata).decode()
        (scripts,) = (name for name in names if name.endswith("/entry_points.txt"))
        assert "gradwire = gradwire.cli:main" in files.read(scripts).decode()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"gradwire", "trainer_service"}
    assert {"gradwire/py.typed", "trainer_service/py.typed", "gradwire/v1/trainer_service_pb2.pyi"} <= set(names)
    static = {f"trainer_service/page/static/{name}" for name in ("index.html", "app.js", "vendor/uPlot.LICENSE")}
    assert static <= set(names)
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    for line in ("License-Expression: Apache-2.0", "Author: The Gradwire authors", "Provides-Extra: server"):
        assert f"\n{line}\n" in about


@pytest.mark.slow
def test_a_model_is_trained_from_the_wheel_in_an_environment_of_its_own(wheel: Path, tiny_llama: Path, tmp_path: Path):
    """What gradwire needs comes from this environment, by a .pth file; gradwire itself must come from the wheel."""
    prefix, work = tmp_path / "environment", tmp_path / "work"
    work.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(prefix)], check=True, timeout=60)
    python = prefix / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-qq", "--no-deps", str(wheel)]
    subprocess.run(install, check=True, timeout=100)
    (site_packages,) = prefix.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(python), "-c", TRAIN, str(tiny_llama)], cwd=work, env=env, capture_output=True, text=True, timeout=110
    )
    assert (done.returncode, done.stdout.strip()) == (0, "trained"), done.stderr
