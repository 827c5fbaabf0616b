"""Recipes of tinker's cookbook, unmodified, from a folder made here: its data sets are local, and no hub is asked.

The cookbook's newest release wants a package that its registry lacks, so it cannot be a dependency: scripts/recipes.sh
makes an environment for it and runs these.
"""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.conftest import KEY
from tests.gateway_process import running_gateway
from tests.tiny import make_tiny_llama
from tests.trainer_process import running_trainer

PYTHON = os.environ.get("GRADWIRE_RECIPES_PYTHON", "")
MODEL = "meta-llama/Llama-3.2-1B"
"""A name that the cookbook knows a renderer for."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not PYTHON, reason="tinker's cookbook is not here; scripts/recipes.sh fetches and runs it"),
]


@dataclass
class Kitchen:
    """A folder that recipes run in, and what they talk to."""

    folder: Path
    base_url: str

    def start(self, recipe: str, **config: Any) -> subprocess.Popen[str]:
        """Starts one."""
        config = {"model_name": MODEL, "lora_rank": 4, **config, "log_path": self.log_path(recipe)}
        command = [PYTHON, "-m", f"tinker_cookbook.recipes.{recipe}", *(f"{name}={it}" for name, it in config.items())]
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        env |= {"TINKER_BASE_URL": self.base_url, "TINKER_API_KEY": KEY, "TINKER_TELEMETRY": "0"}
        env |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(self.folder / "cache"), "WANDB_MODE": "disabled"}
        return subprocess.Popen(
            command, cwd=self.folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, recipe: str, **config: Any) -> list[dict[str, float]]:
        """Runs one to its end; the metrics of each of its steps."""
        process = self.start(recipe, **config)
        told, _ = process.communicate(timeout=500)
        assert process.returncode == 0, told[-5000:]
        return [json.loads(line) for line in (self.log_path(recipe) / "metrics.jsonl").read_text().splitlines()]

    def log_path(self, recipe: str) -> Path:
        """Where it writes to."""
        return self.folder / f"log-{recipe}"


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kitchen]:
    """Data sets and a model under the names that the recipes look for, found before any hub is asked."""
    folder = tmp_path_factory.mktemp("kitchen")
    model = make_tiny_llama(folder / MODEL)
    for name, setting in (("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")):
        settings = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps({**settings, setting: 1024}))
    talk = [
        {"messages": [{"role": "user", "content": f"count to {n}"}, {"role": "assistant", "content": "1 2 3 " * 4}]}
        for n in range(32)
    ]
    sums = [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}. #### {n + 1}"} for n in range(8)]
    write_dataset(folder / "HuggingFaceH4" / "no_robots", "default", talk)
    write_dataset(folder / "openai" / "gsm8k", "main", sums)
    (folder / "talk.jsonl").write_text("".join(json.dumps(one) + "\n" for one in talk))
    for name in ("trainer", "gateway"):
        (folder / name).mkdir()
    with running_trainer(model, folder / "trainer", "--max-runs", "32", forked=True) as trainer:
        trainer.wait_ready()
        with running_gateway(trainer.base_url, folder / "gateway", "--alias", MODEL) as gateway:
            yield Kitchen(folder, gateway.base_url)


def write_dataset(folder: Path, config: str, rows: list[dict[str, Any]]) -> None:
    """A data set as the hub has them."""
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(lines)
    files = "".join(f"  - split: {split}\n    path: {split}.jsonl\n" for split in ("train", "test"))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{files}---\n")


def falls(metrics: list[dict[str, float]], name: str) -> bool:
    """Whether it ends below where it began."""
    values = [one[name] for one in metrics if name in one]
    return len(values) > 2 and values[-1] < values[0]


def test_sl_loop_learns(kitchen: Kitchen):
    metrics = kitchen.run("sl_loop", batch_size=8, learning_rate=1e-2, max_length=512, save_every=2)
    assert falls(metrics, "train_mean_nll")


def test_chat_sl_goes_on_where_it_stopped(kitchen: Kitchen):
    config = {
        "dataset": "talk.jsonl",
        "batch_size": 2,
        "learning_rate": 1e-2,
        "save_every": 2,
        "eval_every": 0,
        "renderer_name": "role_colon",
        "max_length": 512,
    }
    stopped = kitchen.start("chat_sl.train", **config)
    saved = kitchen.log_path("chat_sl.train") / "checkpoints.jsonl"
    deadline = time.monotonic() + 400
    while not (saved.exists() and saved.read_text()):
        assert stopped.poll() is None and time.monotonic() < deadline, stopped.communicate()[0]  # noqa: PT018
        time.sleep(0.01)
    stopped.kill()
    stopped.communicate()
    metrics = kitchen.run("chat_sl.train", **config, behavior_if_log_dir_exists="resume")
    losses: dict[float, float] = {}
    for one in metrics:
        if "train_mean_nll" in one:
            # A step that was lost and done again comes out as it did.
            assert losses.setdefault(one["step"], one["train_mean_nll"]) == one["train_mean_nll"]
    assert sorted(losses) == list(range(len(losses)))
    assert losses[len(losses) - 1] < losses[0]


def test_math_rl_runs_on_arithmetic(kitchen: Kitchen):
    metrics = kitchen.run(
        "math_rl.train",
        env="arithmetic",
        loss_fn="importance_sampling",
        group_size=4,
        groups_per_batch=4,
        learning_rate=1e-3,
        eval_every=0,
        renderer_name="role_colon",
        max_steps=3,
    )
    rewards = [one["env/all/reward/total"] for one in metrics if "env/all/reward/total" in one]
    assert len(rewards) == 3
    assert rewards[-1] >= rewards[0]
    # What the sampler said of its tokens is what the trainer says.
    assert all(abs(one["optim/kl_sample_train_v1"]) < 1e-4 for one in metrics if "optim/kl_sample_train_v1" in one)


def test_rl_loop_runs_with_cispo(kitchen: Kitchen):
    metrics = kitchen.run("rl_loop", loss_fn="cispo", batch_size=4, group_size=4, max_tokens=16, max_steps=2)
    assert [one["reward/total"] for one in metrics] == [0.0, 0.0], "a tiny random model solves nothing"
