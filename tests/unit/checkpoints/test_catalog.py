"""The catalog of checkpoints: over a local folder alone, and with a store behind it."""

import errno
import io
import shutil
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import fsspec
import pytest
from gradwire.errors import GradwireError

from trainer_service.access import Caller, current_caller
from trainer_service.atomic_folders import MANIFEST, Manifest, read_manifest, verify, whole_folder
from trainer_service.checkpoints.catalog import Catalog
from trainer_service.checkpoints.files import pieces
from trainer_service.checkpoints.object_store import Storage
from trainer_service.paths import CheckpointPath

MakeCatalog = Callable[..., Catalog]
"""A catalog over a folder, by its name, and over the one store of the test."""


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """URL of an S3 bucket on a real server."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patched.setenv(name, "test")
        patched.setenv("AWS_DEFAULT_REGION", "us-east-1")
        # fsspec keeps what spoke to the server of an earlier setup, whose port was another.
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        # And the bucket of an earlier setup is still there.
        fsspec.filesystem("s3").makedirs("bucket", exist_ok=True)
        yield "s3://bucket"
    server.stop()


def empty_store(request: pytest.FixtureRequest) -> str:
    root = request.getfixturevalue("s3") if request.param == "s3" else "memory://checkpoints"
    return f"{root}/{uuid.uuid4().hex}"


@pytest.fixture(params=["memory", "s3"])
def url(request: pytest.FixtureRequest) -> str:
    """URL of an empty store."""
    return empty_store(request)


@pytest.fixture(params=["local", "memory", "s3"])
def make_catalog(request: pytest.FixtureRequest, tmp_path: Path) -> MakeCatalog:
    url = "" if request.param == "local" else empty_store(request)
    return lambda name="root": Catalog(tmp_path / name, Storage(url) if url else None)


@pytest.fixture
def stored(tmp_path: Path, url: str) -> Callable[[str], Catalog]:
    """As make_catalog, with a store."""
    return lambda name: Catalog(tmp_path / name, Storage(url))


def files_in(url: str) -> list[str]:
    """What is in a store."""
    fs, root = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    return fs.find(root)


def save(root: Path, path: str, content: bytes = b"content", **about: Any) -> str:
    """What the worker does."""
    about = {"created_at": datetime.now(UTC).isoformat(), "step": 1, **about}
    with whole_folder(CheckpointPath.parse(path).folder(root), about=about, overwrite=True) as writer:
        (writer.path / "a.safetensors").write_bytes(content)
        (writer.path / "state.json").write_text("{}")
    return path


def reason(call: Callable[[], object]) -> str:
    with pytest.raises(GradwireError) as caught:
        call()
    return caught.value.reason


def content(catalog: Catalog, path: str, **arguments: Any) -> bytes:
    return b"".join(catalog.open(catalog.find(path), "a.safetensors", **arguments))


def fetch(catalog: Catalog, path: str) -> Path:
    """The folder the worker reads."""
    catalog.fetch(catalog.find(path))
    return CheckpointPath.parse(path).folder(catalog.root)


A, B = "gradwire://run-1/state/a", "gradwire://run-1/sampler_weights/b"


def test_what_was_saved_is_listed_newest_first_and_by_a_catalog_made_later(
    make_catalog: MakeCatalog, tmp_path: Path
) -> None:
    catalog = make_catalog()
    for path in (A, B):
        save(tmp_path / "root", path)
        catalog.store(path)
    for seen in (catalog, make_catalog()):
        assert [str(found.path) for found in seen.list()] == [B, A]
        assert [str(found.path) for found in seen.list(kind="state")] == [A]
        assert seen.list(run_id="run-2") == []
        assert seen.find(A).manifest.files["state.json"].size_bytes == 2
        assert content(seen, A) == b"content"
        assert content(seen, A, offset=3) == b"tent"
        assert content(seen, A, offset=7) == b""


def test_a_deleted_checkpoint_is_gone_everywhere(make_catalog: MakeCatalog, tmp_path: Path) -> None:
    catalog = make_catalog()
    save(tmp_path / "root", A)
    catalog.store(A)
    catalog.delete(A)
    assert reason(lambda: catalog.delete(A)) == "CHECKPOINT_NOT_FOUND"
    assert make_catalog().list() == []
    assert not [file for file in (tmp_path / "root").rglob("*") if file.is_file()]


def test_an_expired_checkpoint_is_seen_no_more_and_swept(make_catalog: MakeCatalog, tmp_path: Path) -> None:
    catalog = make_catalog()
    past = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
    save(tmp_path / "root", A, expires_at=past)
    save(tmp_path / "root", B, expires_at=(datetime.now(UTC) + timedelta(hours=1)).isoformat())
    for path in (A, B):
        catalog.store(path)
    assert reason(lambda: catalog.find(A)) == "CHECKPOINT_NOT_FOUND"
    assert [str(found.path) for found in catalog.list()] == [B]
    assert (tmp_path / "root" / "run-1" / "state" / "a").exists()
    catalog.sweep()
    assert not (tmp_path / "root" / "run-1" / "state" / "a").exists()
    assert [str(found.path) for found in make_catalog().list()] == [B]


def test_a_time_to_live_is_set_anew_and_taken_away(make_catalog: MakeCatalog, tmp_path: Path) -> None:
    catalog = make_catalog()
    save(tmp_path / "root", A)
    catalog.store(A)
    expires_at = catalog.set_ttl(A, 3600).expires_at
    assert expires_at is not None
    assert timedelta(minutes=59) < expires_at - datetime.now(UTC) <= timedelta(hours=1)
    again = make_catalog()
    assert again.find(A).expires_at == expires_at
    assert again.set_ttl(A, None).expires_at is None
    assert make_catalog().find(A).expires_at is None
    assert content(again, A) == b"content"


def test_only_its_owner_and_admins_see_a_checkpoint_and_without_an_owner_only_admins(
    make_catalog: MakeCatalog, tmp_path: Path
) -> None:
    catalog = make_catalog()
    catalog.claim("run-1", "alice")
    nobodys = "gradwire://run-2/state/a"
    for path in (A, nobodys):
        save(tmp_path / "root", path)
        catalog.store(path)
    for owner, admin, sees in (("alice", False, [A]), ("bob", False, []), ("ops", True, [nobodys, A])):
        token = current_caller.set(Caller(owner, owner, admin))
        try:
            for seen in (catalog, make_catalog()):
                assert [str(found.path) for found in seen.list()] == sees
                for path in {A, nobodys} - set(sees):
                    for call in (seen.find, seen.delete, lambda path, seen=seen: seen.set_ttl(path, 1)):
                        assert reason(lambda call=call, path=path: call(path)) == "CHECKPOINT_NOT_FOUND"
        finally:
            current_caller.reset(token)


@pytest.mark.parametrize(
    "path", ["", "a", "gradwire://run-1/state", "gradwire://run-1/state/../../x", "gradwire:///state/a", f"{A}/b"]
)
def test_a_path_that_is_none_is_refused_everywhere(make_catalog: MakeCatalog, path: str) -> None:
    catalog = make_catalog()
    for call in (catalog.find, catalog.delete, catalog.store, lambda path: catalog.set_ttl(path, 1)):
        assert reason(lambda call=call: call(path)) == "INVALID_FIELD"


@pytest.mark.parametrize("read", [0, 1])
def test_a_download_that_is_given_up_closes_its_file(read: int, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    file = io.FileIO(tmp_path / "a")
    found = pieces(file, 3, 7)
    assert [next(found) for _ in range(read)] == [b"tent"][:read]
    found.close()
    assert file.closed


def test_a_file_that_is_none_an_offset_behind_its_end_and_another_digest_are_refused(
    make_catalog: MakeCatalog, tmp_path: Path
) -> None:
    catalog = make_catalog()
    save(tmp_path / "root", A)
    catalog.store(A)
    found = catalog.find(A)
    for name in ("../owner.json", "manifest.json", "/etc/passwd", ""):
        assert reason(lambda name=name: catalog.open(found, name)) == "INVALID_FIELD"
    assert reason(lambda: catalog.open(found, "a.safetensors", offset=8)) == "INVALID_FIELD"
    digest = found.manifest.files["a.safetensors"].sha256
    assert content(catalog, A, sha256=digest) == b"content"
    save(tmp_path / "root", A, b"changed")
    catalog.store(A)
    assert reason(lambda: catalog.open(found, "a.safetensors", sha256=digest)) == "CHECKPOINT_CHANGED"


def test_a_base_is_kept_while_deltas_build_on_it(make_catalog: MakeCatalog, tmp_path: Path) -> None:
    catalog = make_catalog()
    base, delta = "gradwire://run-1/sampler_weights/base", "gradwire://run-1/sampler_weights/delta"
    save(tmp_path / "root", base, expires_at=datetime.now(UTC).isoformat())
    save(tmp_path / "root", delta, base_path=base, checkpoint_type="delta")
    catalog.sweep()
    # Expired, but what builds on it could not be read without.
    assert {str(found.path) for found in catalog.list()} == {base, delta}
    assert content(catalog, base) == b"content"
    assert fetch(catalog, delta).is_dir()
    catalog.set_ttl(delta, None)
    save(tmp_path / "root", base)
    assert reason(lambda: catalog.delete(base)) == "CHECKPOINT_IN_USE"
    catalog.delete(delta)
    catalog.delete(base)


def test_another_machine_lists_and_fetches_what_was_stored(stored: Callable[[str], Catalog], tmp_path: Path) -> None:
    here = stored("here")
    here.claim("run-1", "alice")
    save(tmp_path / "here", A)
    here.store(A)
    there = stored("there")
    assert [str(found.path) for found in there.list()] == [A]
    assert there.find(A).owner == "alice"
    assert content(there, A, offset=2) == b"ntent"
    folder = fetch(there, A)
    verify(folder, read_manifest(folder))
    fetch(there, A)
    # Whose it is stays known without the store.
    assert Catalog(tmp_path / "there").find(A).owner == "alice"
    assert {path.name for path in (tmp_path / "there").iterdir()} == {"run-1", ".incoming"}
    assert list((tmp_path / "there" / ".incoming").iterdir()) == []


def test_what_is_replaced_is_replaced_whole(stored: Callable[[str], Catalog], tmp_path: Path, url: str) -> None:
    here = stored("here")
    for version in (b"one", b"two!"):
        save(tmp_path / "here", A, version)
        here.store(A)
    there = stored("there")
    assert content(there, A) == b"two!"
    assert sum(name.endswith("a.safetensors") for name in files_in(url)) == 1


def test_an_upload_cut_off_leaves_the_one_before_and_is_made_up_for(
    stored: Callable[[str], Catalog], tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = stored("here"), stored("there")
    save(tmp_path / "here", A, b"before")
    here.store(A)
    save(tmp_path / "here", A, b"after!")

    def cut(*_: object, **__: object) -> None:
        raise ConnectionResetError("cut off")

    assert here.storage is not None
    with monkeypatch.context() as patched:
        patched.setattr(here.storage._fs, "pipe_file", cut)
        assert reason(lambda: here.store(A)) == "STORAGE_FAILED"
    assert content(there, A) == b"before"
    here.sweep()
    assert content(there, A) == b"after!"
    assert sum(name.endswith("a.safetensors") for name in files_in(url)) == 1


def test_damage_in_the_store_is_seen_when_fetched(stored: Callable[[str], Catalog], tmp_path: Path, url: str) -> None:
    here, there = stored("here"), stored("there")
    save(tmp_path / "here", A)
    here.store(A)
    [file] = [name for name in files_in(url) if name.endswith("a.safetensors")]
    fsspec.core.url_to_fs(url)[0].pipe_file(file, b"CONTENT")
    assert reason(lambda: fetch(there, A)) == "CHECKPOINT_DAMAGED"
    assert not list((tmp_path / "there").rglob("a.safetensors"))


def soon(**ago: float) -> str:
    return (datetime.now(UTC) + timedelta(**ago)).isoformat()


def test_a_copy_here_follows_the_store(stored: Callable[[str], Catalog], tmp_path: Path) -> None:
    here, there = stored("here"), stored("there")
    for text in (b"first", b"again"):
        save(tmp_path / "here", B, text)
        here.store(B)
        assert (fetch(there, B) / "a.safetensors").read_bytes() == text
        assert content(there, B) == text
    assert there.find(B, recent=True).manifest == there.find(B).manifest
    here.delete(B)
    assert reason(lambda: there.find(B)) == "CHECKPOINT_NOT_FOUND"
    assert there.list() == []
    there.sweep()
    assert here.list() == []


def test_a_copy_here_does_what_it_can_while_the_store_is_out_of_reach(
    stored: Callable[[str], Catalog], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = stored("here"), stored("there")
    for path in (A, B):
        save(tmp_path / "here", path)
        here.store(path)
    fetch(there, A)

    def unreachable(*_: object) -> None:
        raise ConnectionRefusedError("nobody there")

    assert there.storage is not None
    with monkeypatch.context() as patched:
        patched.setattr(there.storage._fs, "info", unreachable)
        assert (fetch(there, A) / "a.safetensors").read_bytes() == b"content"
        assert reason(lambda: there.find(B)) == "STORAGE_FAILED"
        # Not asked again and again.
        patched.setattr(there.storage._fs, "info", lambda *_: pytest.fail("asked"))
        assert reason(lambda: there.find(B, recent=True)) == "STORAGE_FAILED"
    assert there.find(B).path.name == "b"


def test_what_somebody_keeps_for_longer_elsewhere_is_not_swept_here(
    stored: Callable[[str], Catalog], tmp_path: Path
) -> None:
    here, there = stored("here"), stored("there")
    save(tmp_path / "here", A, expires_at=soon(hours=1))
    here.store(A)
    copy = fetch(there, A)
    here.set_ttl(A, None)
    # An hour later, as the copy tells it.
    manifest = read_manifest(copy)
    (copy / MANIFEST).write_text(Manifest({**manifest.about, "expires_at": soon(seconds=-1)}, manifest.files).to_json())
    there.sweep()
    assert [catalog.find(A).expires_at for catalog in (here, there)] == [None, None]


def test_a_folder_copied_from_another_store_is_stored_in_this_one(tmp_path: Path) -> None:
    old, new = (Catalog(tmp_path / "root", Storage(f"memory://{uuid.uuid4().hex}")) for _ in range(2))
    save(tmp_path / "root", A)
    old.store(A)
    assert new.find(A).path.name == "a"
    new.sweep()
    assert new.storage is not None
    assert new.storage.manifest(CheckpointPath.parse(A)) is not None


def test_what_is_saved_anew_while_a_sweep_goes_on_stays(
    make_catalog: MakeCatalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = make_catalog()
    other = "gradwire://run-2/state/a"
    for path in (A, other):
        save(tmp_path / "root", path, expires_at=soon(seconds=-1))
        catalog.store(path)
    remove = catalog._remove
    saved: set[str] = set()

    def slow(path: CheckpointPath) -> None:
        if not saved:
            saved.add(save(tmp_path / "root", other if str(path) == A else A, b"anew"))
        remove(path)

    monkeypatch.setattr(catalog, "_remove", slow)
    catalog.sweep()
    assert {str(found.path) for found in catalog.list()} == saved


def test_an_expired_name_is_free_at_once(make_catalog: MakeCatalog, tmp_path: Path) -> None:
    catalog = make_catalog()
    for path, expires_at in ((A, soon(seconds=-1)), (B, soon(hours=1))):
        save(tmp_path / "root", path, expires_at=expires_at)
        catalog.store(path)
        catalog.make_way(path)
    assert not CheckpointPath.parse(A).folder(tmp_path / "root").exists()
    assert CheckpointPath.parse(B).folder(tmp_path / "root").exists()


def test_a_full_disk_is_said_of_a_fetch(
    stored: Callable[[str], Catalog], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = stored("here"), stored("there")
    save(tmp_path / "here", A)
    here.store(A)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", full)
        assert reason(lambda: fetch(there, A)) == "STORAGE_FAILED"
    assert fetch(there, A).is_dir()


def test_a_file_that_went_missing_is_damage(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "root")
    save(tmp_path / "root", A)
    (CheckpointPath.parse(A).folder(tmp_path / "root") / "a.safetensors").unlink()
    assert reason(lambda: content(catalog, A)) == "CHECKPOINT_DAMAGED"


def test_what_a_killed_trainer_left_is_cleared(make_catalog: MakeCatalog, tmp_path: Path) -> None:
    save(tmp_path / "root", A)
    for name in (".incoming", ".trash"):
        (tmp_path / "root" / name / "0123" / "whole" / "a").mkdir(parents=True)
    shutil.copytree(tmp_path / "root/run-1/state/a", tmp_path / "root/run-1/state/.partial-b-0123")
    assert [str(found.path) for found in make_catalog().list()] == [A]
    assert not list((tmp_path / "root" / ".incoming").iterdir())
    assert not (tmp_path / "root" / ".trash").exists()


def test_a_store_that_cannot_be_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="nonsense://x cannot be used as a store"):
        Storage("nonsense://x")
