"""The examples that learn sums, in a small form: each starts from its trainer's random model and learns something."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.trainer_process import TrainerProcess, running_trainer

ROOT = Path(__file__).parents[2]
Run = Callable[..., str]
EXECUTE = """
import sys, nbclient, nbformat
notebook, done = sys.argv[1:]
book = nbformat.read(notebook, 4)
where = {"metadata": {"path": notebook.rpartition("/")[0]}}
nbclient.NotebookClient(book, timeout=100, resources=where).execute()
nbformat.write(book, done)
"""


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainerProcess]:
    """Over the examples' random model."""
    folder = tmp_path_factory.mktemp("sums")
    make = "import sys, sums; sums.make_model(sys.argv[1])"
    made = [sys.executable, "-c", make, str(folder / "model")]
    subprocess.run(made, cwd=ROOT / "examples", check=True, capture_output=True, timeout=60)
    with running_trainer(folder / "model", folder, forked=True) as trainer:
        trainer.wait_ready()
        yield trainer


@pytest.fixture
def run(trainer: TrainerProcess, tmp_path: Path) -> Run:
    """Runs an example; returns what it printed. Its plot must be there."""

    def run(name: str, *arguments: str) -> str:
        plot = tmp_path / f"{name}.png"
        command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--base-url", trainer.base_url]
        command += ["--plot", str(plot), "--held-out", "60", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert plot.read_bytes().startswith(b"\x89PNG")
        return done.stdout

    return run


def test_dpo_makes_the_chosen_answer_likelier_in_held_out_pairs(run: Run):
    output = run("dpo", "--supervised-steps", "30", "--steps", "15")
    before, *_, after = (float(share) for share in re.findall(r"held-out pairs(?:, before:)? ([0-9.]+)%", output))
    assert after > before + 5, output


def test_distillation_brings_the_student_nearer_to_its_teacher(run: Run):
    output = run("distill", "--supervised-steps", "30", "--steps", "24", "--sums", "200", "--batch-size", "32")
    first, *_, last = (float(nats) for nats in re.findall(r"([0-9.]+) nats from the teacher", output))
    assert last < first / 2, output


def test_curves_are_drawn_from_the_journal_and_logged_on_the_way(run: Run, tmp_path: Path):
    output = run("curves", "--steps", "20", "--csv", str(tmp_path / "curves.csv"), "--tensorboard", str(tmp_path))
    first, last = map(float, re.findall(r"20 steps, ([0-9.]+) to ([0-9.]+) nats", output)[0])
    assert last < first, output
    lines = (tmp_path / "curves.csv").read_text().splitlines()
    assert (len(lines), "loss:sum" in lines[0]) == (21, True)
    assert list(tmp_path.glob("events.*"))


def test_the_notebook_trains_and_draws(trainer: TrainerProcess, tmp_path: Path):
    """Its cells, in a kernel of its own, as they are."""
    nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed; see the dev extra")
    done = tmp_path / "done.ipynb"
    command = [sys.executable, "-c", EXECUTE, str(ROOT / "examples" / "watch.ipynb"), str(done)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GRADWIRE_BASE_URL": trainer.base_url, "STEPS": "15"}
    # What a kernel keeps of its own goes with the test.
    environment |= {"JUPYTER_RUNTIME_DIR": str(tmp_path), "IPYTHONDIR": str(tmp_path), "JUPYTER_PREFER_ENV_PATH": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    outputs = [output for cell in nbformat.read(done, 4).cells for output in cell.get("outputs", [])]
    drawn = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(drawn) == 3
    text = "".join(output.get("text", "") for output in outputs)
    first, last = map(float, re.findall(r"([0-9.]+) to ([0-9.]+) nats a token", text)[0])
    assert last < first, text


@pytest.mark.parametrize("loss", ["importance_sampling", "ppo"])
def test_reinforcement_learning_goes_through_its_steps(run: Run, loss: str):
    output = run("rl_arithmetic", "--supervised-steps", "30", "--steps", "3", "--sums", "16", "--loss", loss)
    rewards = re.findall(r"first and last steps: ([0-9.]+) ([0-9.]+)", output)
    assert rewards, output
    assert 0 <= float(rewards[0][1]) <= 1
