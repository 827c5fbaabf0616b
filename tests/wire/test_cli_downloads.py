"""gradwire checkpoints download and gradwire export: stopped and gone on with, and what is seen of it meanwhile."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from gradwire._wire import delta

from tests.cli import command, gradwire, refusal
from tests.cut_proxy import CutProxy, cut_proxy
from tests.front_end import FrontEnd, front_end_on_a_thread
from tests.waiting import wait_until
from trainer_service.atomic_folders import whole_folder
from trainer_service.paths import CheckpointPath

WEIGHTS = "model.safetensors"
BYTES = 3_000_000
HELD = 1_500_000
"""Of the weights' bytes, what a proxy lets through before it holds: one message and a piece of the next."""
MESSAGE = 1 << 20
WHOLE = "gradwire://run-1/sampler_weights/whole"
BEFORE = "gradwire://run-2/sampler_weights/before"
DELTA = "gradwire://run-2/sampler_weights/delta"
STOPPED = "gradwire: stopped; the same command goes on from here."


def put(trainer: FrontEnd, path: str, files: dict[str, bytes], **about: object) -> None:
    """A checkpoint as a worker saves it."""
    parsed = CheckpointPath.parse(path)
    assert trainer.worker.checkpoint_dir is not None
    folder = parsed.folder(trainer.worker.checkpoint_dir)
    about = {"created_at": datetime.now(UTC).isoformat(), "step": 3, "architecture": "Fake", **about}
    with whole_folder(folder, about=about, overwrite=True) as writer:
        for name, content in files.items():
            (writer.path / name).write_bytes(content)


def random_bytes(seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(BYTES)


BASE, CHANGED = random_bytes(1), random_bytes(1)[:-1000] + bytes(1000)
CONFIGS = {"config.json": b"{}", "tokenizer_config.json": b"{ }"}


def put_delta(trainer: FrontEnd, folder: Path, *, compressed: Callable[[bytes], bytes] = lambda one: one) -> None:
    """A delta from BASE to CHANGED, and its base; `compressed` may damage it."""
    put(trainer, BEFORE, {**CONFIGS, WEIGHTS: BASE})
    (folder / "base").write_bytes(BASE)
    (folder / "changed").write_bytes(CHANGED)
    chunks = BytesIO()
    sizes, base_sha256, sha256 = delta.write_chunks(folder / "base", folder / "changed", chunks)
    description = {
        "base": {"path": BEFORE, "files": {WEIGHTS: base_sha256}},
        "files": {WEIGHTS: {"size_bytes": BYTES, "sha256": sha256}},
    }
    files = {
        delta.DESCRIPTION: json.dumps(description).encode(),
        delta.TENSORS: delta.safetensors_header({WEIGHTS: sizes}) + compressed(chunks.getvalue()),
    }
    put(trainer, DELTA, {**CONFIGS, **files}, checkpoint_type="delta", base_path=BEFORE)


@pytest.fixture(scope="module")
def trainer() -> Iterator[FrontEnd]:
    with front_end_on_a_thread() as made:
        put(made, WHOLE, {**CONFIGS, "empty.txt": b"", WEIGHTS: BASE})
        yield made


@pytest.fixture
def proxy(trainer: FrontEnd) -> Iterator[CutProxy]:
    with cut_proxy(trainer.address) as made:
        yield made


def url(trainer: FrontEnd) -> str:
    return f"http://{trainer.address}"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def until_one_message_is_in(part: Path) -> None:
    wait_until(lambda: part.exists() and part.stat().st_size >= MESSAGE)


def test_ctrl_c_leaves_a_part_from_which_the_same_command_goes_on(proxy: CutProxy, tmp_path: Path):
    folder = tmp_path / "whole"
    part = folder / f".{WEIGHTS}.part"
    proxy.when_client_has = (HELD, proxy.hold)
    with command(proxy.base_url, "checkpoints", "download", WHOLE, folder, columns=80) as stopped:
        until_one_message_is_in(part)
        stopped.interrupt()
        code, stdout, stderr = stopped.wait()
    assert (code, stdout) == (130, "")
    # The bar's line is ended before anything else is said.
    assert stderr.endswith(f"{WEIGHTS}\r\n{STOPPED}\r\n")
    assert "Traceback" not in stderr
    assert names(folder) == {"config.json", "empty.txt", part.name}
    there = part.stat().st_size
    assert MESSAGE <= there < BYTES
    assert part.read_bytes() == BASE[:there]

    proxy.cut()
    proxy.flow()
    proxy.bytes_to_client = 0
    with command(proxy.base_url, "checkpoints", "download", WHOLE, folder, columns=80) as again:
        code, stdout, stderr = again.wait()
    assert code == 0, stderr
    assert BYTES - there < proxy.bytes_to_client < BYTES - there + 50_000
    assert hashlib.sha256((folder / WEIGHTS).read_bytes()).digest() == hashlib.sha256(BASE).digest()
    assert names(folder) == {*CONFIGS, "empty.txt", WEIGHTS}
    # On a terminal a bar moves from where it was; each file has one line in the end.
    drawn = [line.split("\r\x1b[K")[1:] for line in stderr.split("\r\n")]
    assert [len(line) for line in drawn[:2]] == [1, 1]
    assert drawn[0][0].split()[-3:] == ["here", "already", "config.json"]
    first, last = drawn[2][0], drawn[2][-1]
    assert f"{there * 100 // BYTES}%" in first
    assert "#" in first
    assert "100%  " in last
    assert all(WEIGHTS in shown and len(shown) < 80 for shown in drawn[2])
    assert stdout == f"{WHOLE} is in {folder} (2.9 MiB).\n"


def test_without_a_terminal_progress_is_lines_and_json_is_alone_on_standard_output(trainer: FrontEnd, tmp_path: Path):
    folder = tmp_path / "whole"
    folder.mkdir()
    (folder / f".{WEIGHTS}.part").write_bytes(BASE[:HELD])
    done = gradwire(url(trainer), "checkpoints", "download", WHOLE, folder, "--json")
    assert json.loads(done.stdout) == {"path": WHOLE, "folder": str(folder)}
    lines = done.stderr.splitlines()
    assert lines[:3] == [
        "config.json: 100%, 2 B",
        "empty.txt: 100%, 0 B",
        f"{WEIGHTS}: 50%, 1.4 of 2.9 MiB, goes on from there",
    ]
    assert lines[3].startswith(f"{WEIGHTS}: 100%, 2.9 MiB")
    assert lines[4:] == ["tokenizer_config.json: 100%, 3 B"]
    assert "\r" not in done.stderr
    assert "\x1b" not in done.stderr
    assert (folder / WEIGHTS).read_bytes() == BASE


def test_a_part_of_something_else_is_begun_anew(trainer: FrontEnd, tmp_path: Path):
    (tmp_path / f".{WEIGHTS}.part").write_bytes(bytes(HELD))
    (tmp_path / WEIGHTS).write_bytes(bytes(BYTES))
    gradwire(url(trainer), "checkpoints", "download", WHOLE, tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == BASE
    assert names(tmp_path) == {*CONFIGS, "empty.txt", WEIGHTS}


def test_a_trainer_that_goes_away_is_a_sentence_and_so_is_how_to_go_on(
    proxy: CutProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("gradwire._client.downloads._MAX_TRIES", 1)

    def go_away() -> None:
        proxy.refusing = True
        proxy.cut()

    proxy.when_client_has = (HELD, go_away)
    said = gradwire(proxy.base_url, "checkpoints", "download", WHOLE, tmp_path, code=1).stderr.splitlines()[-1]
    assert said.startswith(f"gradwire: DownloadCheckpoint: no Gradwire server answers at {proxy.base_url}")
    assert said.endswith(" The same command goes on from here.")
    proxy.refusing = False
    gradwire(proxy.base_url, "checkpoints", "download", WHOLE, tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == BASE


def test_a_disk_that_cannot_be_written_is_a_sentence_that_names_the_file(trainer: FrontEnd, tmp_path: Path):
    def download(folder: Path) -> str:
        return gradwire(url(trainer), "checkpoints", "download", WHOLE, folder, code=1).stderr.splitlines()[-1]

    file = tmp_path / "file"
    file.touch()
    assert download(file) == f"gradwire: {file}: Not a directory."
    assert download(file / "below") == f"gradwire: {file / 'below'}: Not a directory."
    part = tmp_path / f".{WEIGHTS}.part"
    part.symlink_to("/dev/full")
    assert download(tmp_path) == f"gradwire: {part}: No space left on device."


def test_ctrl_c_in_the_export_of_a_delta_leaves_nothing_that_looks_whole(
    trainer: FrontEnd, proxy: CutProxy, tmp_path: Path
):
    put_delta(trainer, tmp_path)
    folder = tmp_path / "exported"
    proxy.when_client_has = (HELD, proxy.hold)
    with command(proxy.base_url, "export", DELTA, folder) as stopped:
        wait_until(lambda: any(part.stat().st_size >= MESSAGE for part in folder.rglob(f".{WEIGHTS}.part")))
        stopped.interrupt()
        code, stdout, stderr = stopped.wait()
    assert (code, stdout, stderr.splitlines()[-1]) == (130, "", STOPPED)
    assert names(folder) == {".gradwire-export"}
    proxy.cut()
    proxy.flow()
    proxy.bytes_to_client = 0
    done = gradwire(proxy.base_url, "export", DELTA, folder)
    assert "goes on from there" in done.stderr
    assert proxy.bytes_to_client < BYTES - MESSAGE + 50_000
    assert done.stdout == f"{DELTA} is in {folder}.\n"
    assert names(folder) == {*CONFIGS, WEIGHTS}
    assert (folder / WEIGHTS).read_bytes() == CHANGED


@pytest.mark.parametrize("when", ["expanding", "putting in place"])
def test_ctrl_c_while_a_delta_is_made_whole_leaves_nothing_that_looks_whole(
    when: str, trainer: FrontEnd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    put_delta(trainer, tmp_path)
    folder = tmp_path / "exported"
    replace = os.replace

    def stop(*_: object) -> bytes:
        raise KeyboardInterrupt

    def stop_at_the_last(source: Path, target: Path) -> None:
        if Path(target).parent == folder and len(list(source.parent.iterdir())) == 1:
            stop()
        replace(source, target)

    with monkeypatch.context() as patched:
        if when == "expanding":
            patched.setattr(delta, "expand", stop)
        else:
            patched.setattr(os, "replace", stop_at_the_last)
        assert gradwire(url(trainer), "export", DELTA, folder, code=130).stderr.endswith(f"{STOPPED}\n")
    assert "config.json" not in names(folder)
    assert ".gradwire-export" in names(folder)
    done = gradwire(url(trainer), "export", DELTA, folder)
    assert all("here already" in line for line in done.stderr.splitlines())
    assert names(folder) == {*CONFIGS, WEIGHTS}
    assert (folder / WEIGHTS).read_bytes() == CHANGED


def test_a_damaged_delta_and_a_folder_that_is_not_empty_are_refused(trainer: FrontEnd, tmp_path: Path):
    put_delta(trainer, tmp_path, compressed=lambda chunks: bytes(len(chunks)))
    folder = tmp_path / "exported"
    said = gradwire(url(trainer), "export", DELTA, folder, code=1).stderr.splitlines()[-1]
    assert f'The checkpoint "{DELTA}" is damaged' in said
    assert names(folder) == set()
    (folder / "mine").touch()
    assert "is not empty" in refusal(url(trainer), "export", DELTA, folder)
    assert names(folder) == {"mine"}
