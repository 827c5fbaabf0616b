"""Fireworks' official SDK against the gateway: the quickstart of its guide, from the job to its deletion."""

import runpy
from pathlib import Path

import httpx
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.gateway.conftest import KEY
from tests.gateway_process import running_gateway
from tests.trainer_process import TrainerProcess

QUICKSTART = Path(__file__).parent / "fireworks_quickstart.py"
"""The guide's script but for three lines that its own SDK refuses today: `account_id`, a function that the cookbook has
no more, and parameters of tinker's package."""


@pytest.fixture
def qwen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer that the script asks for, where it is found without a hub: a word is a token."""
    folder = tmp_path / "Qwen" / "Qwen3-8B"
    text = "What is the capital of France ? The Paris . 2 + equals 4 user assistant :"
    vocab = {word: 3 + place for place, word in enumerate(dict.fromkeys(text.split()))}
    tokenizer = Tokenizer(models.WordLevel(vocab | {"<unk>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.chat_template = "{% for one in messages %}{{ one['role'] }}: {{ one['content'] }} {% endfor %}"
    fast.save_pretrained(folder)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("qwen")
def test_the_guides_quickstart_runs_to_its_end(
    trainer: TrainerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "gateway"
    folder.mkdir()
    with running_gateway(trainer.base_url, folder, "--alias", "accounts/fireworks/models/qwen3-8b") as gateway:
        monkeypatch.setenv("FIREWORKS_API_KEY", KEY)
        monkeypatch.setenv("FIREWORKS_BASE_URL", gateway.base_url)
        ran = runpy.run_path(str(QUICKSTART))
        told = capsys.readouterr().out.splitlines()
        losses = [float(line.partition("'sft_loss': ")[2].rstrip("}")) for line in told if line.startswith("Step ")]
        assert len(losses) == 10
        assert losses == sorted(losses, reverse=True)
        # Each second pass was the first one's backward.
        assert all("'forward_passes:sum': 0.0" in line for line in told if line.startswith("Step "))
        assert told[-1].startswith("Checkpoint: sft-final")
        with httpx.Client(base_url=gateway.base_url, headers={"x-api-key": KEY}, trust_env=False) as http:
            jobs = http.get(f"/v1/accounts/{ran['rlor_mgr'].account_id}/rlorTrainerJobs").json()
            assert jobs == {"rlorTrainerJobs": []}
            saved = http.get("/api/v1/checkpoints").json()["checkpoints"]
            assert any("sft-final" in one["tinker_path"] for one in saved)
            [session] = http.get("/api/v1/sessions").json()["sessions"]
            found = http.post("/api/v1/sessions/search", json={"session_id": session}).json()["sessions"]
            assert found[0]["status"]["type"] == "cancelled"
