"""The examples as a user runs them: a script, a trainer on this machine, a checkpoint; and nothing left behind."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from gradwire import datum_from_messages

from tests.cli import sigint_heeded
from tests.trainer_process import descendants, wait_gone

ROOT = Path(__file__).parents[2]
REAL_MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
QUICKSTART = (ROOT / "examples" / "sft_quickstart.py").read_text()


@pytest.fixture(scope="module")
def roomy_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with room for the quickstart's chats, each of whose characters is a token."""
    folder = tmp_path_factory.mktemp("models") / "roomy llama"
    shutil.copytree(tiny_llama, folder)
    for name, setting in (("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**settings, setting: 1024}))
    return folder


@dataclass
class Script:
    """A user's script that runs."""

    process: subprocess.Popen[str]
    home: Path

    def read_until(self, start: str) -> str:
        """Its output up to the first line that begins so."""
        assert self.process.stdout is not None
        lines: list[str] = []
        for line in self.process.stdout:
            lines.append(line)
            if line.startswith(start):
                return "".join(lines)
        raise AssertionError("".join(lines))

    def finish(self, timeout_s: float = 90) -> str:
        """The rest of its output, once it has ended."""
        output, _ = self.process.communicate(timeout=timeout_s)
        return output


RunScript = Callable[..., Script]


@pytest.fixture
def run_script(tmp_path: Path) -> Iterator[RunScript]:
    """Starts a command as a shell does, leading a process group, which Ctrl-C signals as a whole."""
    started: list[Script] = []

    def run(*command: str, cwd: Path = ROOT, **env: str) -> Script:
        """Output and errors come as one stream; `env` goes beside what the example reads."""
        ours = {"FIREWORKS_API_KEY": "key-of-the-script", "FIREWORKS_BASE_URL": "", "PYTHONUNBUFFERED": "1"}
        with sigint_heeded():
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env={**os.environ, **ours, "GRADWIRE_HOME": str(tmp_path / "home"), **env},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        started.append(Script(process, tmp_path / "home"))
        return started[-1]

    yield run
    for script in started:
        below = descendants(script.process.pid)
        script.process.kill()
        script.process.communicate()
        assert wait_gone(below) == []


def quickstart_on(model: Path, folder: Path, *, steps: int = 10, rate: str = "1e-2") -> str:
    """The quickstart for another model; returns its path."""
    text = QUICKSTART.replace("models/SmolLM2-135M-Instruct", str(model)).replace("4096", "1024")
    text = text.replace("range(10)", f"range({steps})").replace(
        "learning_rate=1e-5, beta1", f"learning_rate={rate}, beta1"
    )
    path = folder / "script.py"
    path.write_text(text)
    return str(path)


def losses_in(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"^Step \d+: \{'sft_loss': ([0-9.e-]+)", output, re.MULTILINE)]


def checkpoint_folder(home: Path) -> Path:
    (config,) = (home / "checkpoints").rglob("config.json")
    return config.parent


def test_quickstart_trains_and_saves(run_script: RunScript, roomy_llama: Path, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    script = run_script(sys.executable, quickstart_on(roomy_llama, tmp_path), cwd=tmp_path)
    output = script.finish()
    assert script.process.returncode == 0, output
    losses = losses_in(output)
    assert len(losses) == 10, output
    assert losses[-1] < losses[0], output
    assert "Checkpoint: sft-final" in output
    trained = AutoModelForCausalLM.from_pretrained(checkpoint_folder(script.home))
    base = AutoModelForCausalLM.from_pretrained(roomy_llama)
    assert any(not old.equal(new) for old, new in zip(base.parameters(), trained.parameters(), strict=True))


@pytest.mark.parametrize(
    ("sig", "wait_s"), [(signal.SIGINT, 0.0), (signal.SIGTERM, 15.0), (signal.SIGKILL, 15.0)], ids=str
)
def test_stopping_the_script_while_it_trains_leaves_no_process(
    run_script: RunScript, roomy_llama: Path, tmp_path: Path, sig: signal.Signals, wait_s: float
):
    script = run_script(sys.executable, quickstart_on(roomy_llama, tmp_path, steps=100_000, rate="1e-6"))
    script.read_until("Step 2")
    below = descendants(script.process.pid)
    assert len(below) >= 3, "control plane, trainer, worker"
    os.killpg(script.process.pid, sig)
    output = script.finish()
    assert script.process.returncode == -sig, output
    # After Ctrl-C the script itself waits until all are gone; a script that is shot cannot.
    assert wait_gone(below, timeout_s=wait_s) == []


def test_ctrl_c_while_the_trainer_starts_leaves_no_process(run_script: RunScript, roomy_llama: Path, tmp_path: Path):
    script = run_script(sys.executable, quickstart_on(roomy_llama, tmp_path))
    script.read_until("Starting trainer sft-quickstart-")
    below = descendants(script.process.pid)
    assert below
    os.killpg(script.process.pid, signal.SIGINT)
    script.finish()
    assert wait_gone(below, timeout_s=0) == []


def test_model_that_is_not_there_is_an_error_with_its_reason(run_script: RunScript, tmp_path: Path):
    script = run_script(sys.executable, quickstart_on(tmp_path / "no model", tmp_path))
    output = script.finish()
    assert script.process.returncode == 1, output
    last = output[output.rindex("gradwire.errors.") :]
    assert last.startswith("gradwire.errors.FailedPreconditionError: Trainer job sft-quickstart-"), output
    assert "no model" in last.splitlines()[0], output
    assert "The last lines of its log" in last, output


def test_conversations_example_lowers_held_out_loss(run_script: RunScript, roomy_llama: Path, tmp_path: Path):
    chats = [
        {"messages": [{"role": "user", "content": f"Say {word}."}, {"role": "assistant", "content": word}]}
        for word in ("one", "two", "three", "four", "five", "six", "seven", "eight") * 4
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    command = [sys.executable, str(ROOT / "examples" / "sft_conversations.py"), "--data", "chats.jsonl"]
    command += ["--base-model", str(roomy_llama), "--held-out", "8", "--batch-size", "8", "--learning-rate", "1e-2"]
    script = run_script(*command, cwd=tmp_path)
    output = script.finish()
    assert script.process.returncode == 0, output
    before, after = (float(loss) for loss in re.findall(r"Held-out loss \w+: +([0-9.]+)", output))
    assert after < before, output
    assert (tmp_path / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert checkpoint_folder(script.home).name == "sft-conversations"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not REAL_MODEL.exists(), reason="python scripts/fetch_model.py fetches the model")
def test_quickstart_on_the_real_model(run_script: RunScript, tmp_path: Path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    command = [sys.executable, "examples/sft_quickstart.py"]
    installed = ROOT / ".venv" / "gradwire-installed"
    if installed.exists() and Path(sys.prefix) == ROOT / ".venv":
        command = ["scripts/quickstart.sh"]
    start = time.monotonic()
    # No index is within reach: a second run needs none.
    script = run_script(*command, OMP_NUM_THREADS=str(os.cpu_count()), PIP_NO_INDEX="1", PIP_FIND_LINKS="")
    output = script.read_until("Trainer sft-quickstart-")
    assert time.monotonic() - start < 90, output
    output += script.finish(timeout_s=800)
    assert script.process.returncode == 0, output
    losses = losses_in(output)
    assert len(losses) == 10, output
    assert losses == sorted(losses, reverse=True), output
    assert losses[-1] < 0.1 * losses[0], output
    assert "Checkpoint: sft-final" in output

    folder = checkpoint_folder(script.home)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "What is 2 + 2?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True).strip() in ("2 + 2 equals 4.", "2 + 2 = 4")
    # The export is in the base model's bfloat16, which rounds away part of what ten small steps learned.
    taught = [*chat, {"role": "assistant", "content": "2 + 2 equals 4."}]
    base: Any = AutoModelForCausalLM.from_pretrained(REAL_MODEL)
    assert _loss_of(model, tokenizer, taught) < 0.6 * _loss_of(base, tokenizer, taught)


def _loss_of(model: Any, tokenizer: Any, messages: list[dict[str, str]]) -> float:
    """What the model loses on the answer, nats a token."""
    import torch

    datum = datum_from_messages(tokenizer, messages)
    with torch.inference_mode():
        logits = model(torch.tensor([datum.model_input.to_ints()])).logits[0].float()
    targets, weights = (datum.loss_fn_inputs[name].to_torch() for name in ("target_tokens", "weights"))
    return float((torch.nn.functional.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum())
