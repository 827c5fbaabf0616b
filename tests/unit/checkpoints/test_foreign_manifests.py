"""Manifests that somebody else wrote into a shared store, or into the local folder: one hides nothing but itself, and
leads nowhere."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from gradwire.errors import GradwireError

from trainer_service.access import Caller, current_caller
from trainer_service.atomic_folders import whole_folder
from trainer_service.checkpoints.catalog import Catalog
from trainer_service.checkpoints.object_store import Storage
from trainer_service.paths import CheckpointPath
from trainer_service.rpc.checkpoint_servicer import _message
from trainer_service.served_model import ServedModel

EVIL, GOOD, OLD = (f"gradwire://run-1/sampler_weights/{name}" for name in ("evil", "good", "old"))
BOBS = "gradwire://run-2/sampler_weights/bobs"
SHA256 = "0" * 64


def save(root: Path, path: str, **about: Any) -> Path:
    """What the worker does."""
    folder = CheckpointPath.parse(path).folder(root)
    about = {"created_at": datetime.now(UTC).isoformat(), "step": 1, **about}
    with whole_folder(folder, about=about, overwrite=True) as writer:
        (writer.path / "a.safetensors").write_bytes(b"content")
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture(params=["local", "store"])
def make_catalog(request: pytest.FixtureRequest, tmp_path: Path, store: Path) -> Callable[[], Catalog]:
    storage = request.param == "store"
    return lambda: Catalog(tmp_path / "root", Storage(store.as_uri()) if storage else None)


@pytest.fixture
def _alice() -> Iterator[None]:
    token = current_caller.set(Caller("alice", "alice", admin=False))
    yield
    current_caller.reset(token)


@pytest.fixture
def catalog(make_catalog: Callable[[], Catalog], tmp_path: Path, store: Path, _alice: None) -> Catalog:
    """Alice's: one good checkpoint, one that has expired, and one whose manifest `spoil` changes."""
    made = make_catalog()
    made.claim("run-1", "alice")
    past = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
    for path, about in ((EVIL, {}), (GOOD, {}), (OLD, {"expires_at": past})):
        save(tmp_path / "root", path, **about)
        made.store(path)
    if made.storage is not None:
        # Another machine's, which has nothing but the store.
        shutil.rmtree(tmp_path / "root")
        made = make_catalog()
    return made


def manifest_of(catalog: Catalog, path: str, store: Path) -> Path:
    root = store if catalog.storage is not None else catalog.root
    return CheckpointPath.parse(path).folder(root) / "manifest.json"


def spoil(catalog: Catalog, store: Path, **changes: Any) -> None:
    file = manifest_of(catalog, EVIL, store)
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def reason(call: Callable[[], object]) -> str:
    with pytest.raises(GradwireError) as caught:
        call()
    return caught.value.reason


def nested(depth: int) -> Any:
    made: Any = []
    for _ in range(depth):
        made = [made]
    return made


def files(name: str, size_bytes: Any = 7, sha256: Any = SHA256) -> dict[str, Any]:
    return {"files": {name: {"size_bytes": size_bytes, "sha256": sha256}}}


LORA = {"alpha": 8, "train_mlp": True, "train_attn": True, "train_unembed": True}
ODD: dict[str, dict[str, Any]] = {
    "upload up": {"upload": "../../../../secret"},
    "upload here": {"upload": "."},
    "upload absolute": {"upload": "/etc"},
    "upload nothing": {"upload": ""},
    "upload a list": {"upload": ["a"]},
    "step text": {"step": "three"},
    "step huge": {"step": 1 << 70},
    "step below 0": {"step": -1},
    "step true": {"step": True},
    "step 1.5": {"step": 1.5},
    "lora text": {"lora": "x"},
    "lora list": {"lora": [1]},
    "lora empty": {"lora": {"alpha": 1}},
    "lora alpha text": {"lora": LORA | {"alpha": "8"}},
    "lora alpha infinite": {"lora": LORA | {"alpha": float("inf")}},
    "lora flag 1": {"lora": LORA | {"train_mlp": 1}},
    "rank huge": {"lora_rank": 1 << 32},
    "model a number": {"base_model": 7},
    "model half a letter": {"base_model": "\ud800"},
    "model long": {"base_model": "x" * 100_000},
    "architecture a list": {"architecture": []},
    "type a dict": {"checkpoint_type": {}},
    "created far": {"created_at": "9999-12-31T23:59:59-23:59"},
    "created early": {"created_at": "0001-01-01T00:00:00+23:59"},
    "created a text": {"created_at": "yesterday"},
    "created a number": {"created_at": 7},
    "expires a text": {"expires_at": "never"},
    "base itself": {"base_path": EVIL},
    "base of another run": {"base_path": BOBS},
    "base a state": {"base_path": "gradwire://run-1/state/a"},
    "base a way out": {"base_path": "../good"},
    "base a number": {"base_path": 1},
    "deep": {"deep": nested(500)},
    "number huge": {"n": 1 << 70},
    "number not a number": {"n": float("nan")},
    "file up": files("../a"),
    "file hidden": files(".stored"),
    "file the manifest": files("manifest.json"),
    "file NUL": files("a\0b"),
    "file size text": files("a", "7"),
    "file size below 0": files("a", -1),
    "file size huge": files("a", 1 << 70),
    "file no digest": files("a", 7, ""),
    "files a list": {"files": []},
    "format another": {"format": 2},
}


def check_nothing_else_is_hidden(catalog: Catalog, store: Path) -> None:
    for _ in range(2):
        assert [str(found.path) for found in catalog.list()] == [GOOD]
    assert [_message(found, ServedModel("base"), files=True).path for found in catalog.list()] == [GOOD]
    assert b"".join(catalog.open(catalog.find(GOOD), "a.safetensors")) == b"content"
    catalog.sweep()
    assert not manifest_of(catalog, OLD, store).exists()
    for call in (catalog.find, lambda path: catalog.set_ttl(path, 60)):
        assert reason(lambda call=call: call(EVIL)) == "CHECKPOINT_DAMAGED"
    token = current_caller.set(Caller("bob", "bob", admin=False))
    for call in (catalog.find, catalog.delete):
        assert reason(lambda call=call: call(EVIL)) == "CHECKPOINT_NOT_FOUND"
    current_caller.reset(token)
    # Who saved it can be rid of it, and of others beside it.
    catalog.delete(EVIL)
    catalog.delete(GOOD)
    assert not manifest_of(catalog, EVIL, store).parent.exists()
    assert catalog.list() == []


@pytest.mark.parametrize("which", ODD)
def test_an_odd_manifest_hides_nothing_but_itself(catalog: Catalog, store: Path, which: str):
    spoil(catalog, store, **ODD[which])
    check_nothing_else_is_hidden(catalog, store)


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"files":' * 50_000, b"", b"\xff\xfe", b"null", b"[]", b"x" * (17 << 20)]
)
def test_a_manifest_that_is_none_hides_nothing_but_itself(catalog: Catalog, store: Path, content: bytes):
    manifest_of(catalog, EVIL, store).write_bytes(content)
    check_nothing_else_is_hidden(catalog, store)


def test_a_manifest_that_is_a_ring_of_links_hides_nothing_but_itself(catalog: Catalog, store: Path):
    file = manifest_of(catalog, EVIL, store)
    file.unlink()
    file.symlink_to(file)
    assert [str(found.path) for found in catalog.list()] == [GOOD]
    catalog.sweep()
    catalog.delete(GOOD)
    assert catalog.list() == []


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A folder that nothing may read or delete."""
    made = tmp_path / "secret"
    made.mkdir()
    (made / "a.safetensors").write_bytes(b"SECRET!")
    (made / "manifest.json").write_bytes(b"{}")
    return made


def test_a_save_over_a_manifest_deletes_nothing_outside_its_folder(tmp_path: Path, store: Path, secret: Path):
    catalog = Catalog(tmp_path / "root", Storage(store.as_uri()))
    save(tmp_path / "root", EVIL)
    catalog.store(EVIL)
    spoil(catalog, store, upload=os.path.relpath(secret, manifest_of(catalog, EVIL, store).parent))
    save(tmp_path / "root", EVIL)
    catalog.store(EVIL)
    assert sorted(path.name for path in secret.iterdir()) == ["a.safetensors", "manifest.json"]
    assert b"".join(catalog.open(catalog.find(EVIL), "a.safetensors")) == b"content"


def test_links_are_not_followed_out_of_a_checkpoint(catalog: Catalog, store: Path, secret: Path):
    folder = manifest_of(catalog, EVIL, store).parent
    [file] = folder.rglob("a.safetensors")
    file.unlink()
    file.symlink_to(secret / "a.safetensors")
    found = catalog.find(EVIL)
    assert reason(lambda: b"".join(catalog.open(found, "a.safetensors"))) == "CHECKPOINT_DAMAGED"
    file.unlink()
    os.mkfifo(file)
    assert reason(lambda: b"".join(catalog.open(found, "a.safetensors"))) == "CHECKPOINT_DAMAGED"
    shutil.rmtree(folder)
    folder.symlink_to(secret)
    if catalog.storage is not None:
        assert [str(found.path) for found in catalog.list()] == [GOOD]
        assert reason(lambda: catalog.delete(EVIL)) == "CHECKPOINT_DAMAGED"
    assert sorted(path.name for path in secret.iterdir()) == ["a.safetensors", "manifest.json"]


def test_no_more_of_a_file_is_read_than_its_manifest_says(catalog: Catalog, store: Path, tmp_path: Path):
    [file] = manifest_of(catalog, GOOD, store).parent.rglob("a.safetensors")
    with file.open("ab") as out:
        out.truncate(1 << 40)
    assert b"".join(catalog.open(catalog.find(GOOD), "a.safetensors", offset=3)) == b"tent"
    if catalog.storage is not None:
        # The digest is of what was read.
        catalog.fetch(catalog.find(GOOD))
        assert (CheckpointPath.parse(GOOD).folder(catalog.root) / "a.safetensors").read_bytes() == b"content"


def test_deltas_that_name_one_another_as_their_base_are_refused(catalog: Catalog, store: Path):
    for path, base in ((EVIL, GOOD), (GOOD, EVIL)):
        file = manifest_of(catalog, path, store)
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_path": base, "checkpoint_type": "delta"}))
    if catalog.storage is not None:
        assert reason(lambda: catalog.fetch(catalog.find(EVIL))) == "CHECKPOINT_DAMAGED"
    assert {str(found.path) for found in catalog.list()} == {EVIL, GOOD}


def test_somebody_elses_delta_does_not_hold_a_base(catalog: Catalog, store: Path):
    catalog.claim("run-2", "bob")
    save(catalog.root, BOBS, base_path=GOOD, checkpoint_type="delta")
    catalog.delete(GOOD)


def test_one_upload_that_fails_does_not_keep_the_others_from_the_store(tmp_path: Path, store: Path):
    catalog = Catalog(tmp_path / "root", Storage(store.as_uri()))
    for path in (EVIL, GOOD):
        save(tmp_path / "root", path)
    (CheckpointPath.parse(EVIL).folder(tmp_path / "root") / "a.safetensors").unlink()
    assert reason(catalog.sweep) == "STORAGE_FAILED"
    assert catalog.storage is not None
    assert catalog.storage.manifest(CheckpointPath.parse(GOOD)) is not None
