"""Checkpoints in an object store, or any file system fsspec knows by a URL.

Below the URL's path:

    <run_id>/owner.json                        whose they are
    <run_id>/<kind>/<name>/manifest.json       written last; names the upload it belongs to
    <run_id>/<kind>/<name>/<upload>/<file>     one folder an upload, so that replacing one never mixes two

Files stream through a few MiB of memory. Blocking: for threads, not for an event loop.
"""

import contextlib
import json
import posixpath
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import fsspec
from gradwire.errors import GradwireError, error

from trainer_service.checkpoint_path import CheckpointPath
from trainer_service.folders import MANIFEST, FolderWriter, Manifest, damaged

OWNER = "owner.json"
UPLOAD = "upload"
"""Key of a stored manifest: the folder its files are in."""

_CHUNK_BYTES = 8 << 20


class Storage:
    """A store.

    Args:
        url: Such as "s3://bucket/prefix" or "memory://checkpoints". Credentials and options come from the environment
            or configuration files, as the library behind the scheme documents.

    Raises:
        ValueError: No such scheme, or the package it needs is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self._fs, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as exc:
            raise ValueError(f"{url} cannot be used as a store: {exc}") from exc
        self._root = root.rstrip("/")
        self._known: dict[str, tuple[object, Manifest]] = {}

    def manifests(self) -> dict[CheckpointPath, Manifest]:
        """What is stored. Manifests seen before are read again only if they changed."""
        with self._speaking("listed"):
            self._fs.invalidate_cache()
            found: dict[str, Any] = (
                self._fs.find(self._root, withdirs=False, detail=True) if self._fs.exists(self._root) else {}
            )
        listed: dict[CheckpointPath, Manifest] = {}
        for full, info in found.items():
            inside = full.removeprefix(self._root).lstrip("/")
            if posixpath.basename(inside) != MANIFEST:
                continue
            # Something else may lie there, and a damaged manifest must not hide the others.
            with contextlib.suppress(GradwireError):
                path = CheckpointPath.parse(f"gradwire://{posixpath.dirname(inside)}")
                listed[path] = self._manifest(path, _stamp(info))
        return listed

    def manifest(self, path: CheckpointPath) -> Manifest | None:
        """What is stored at a path; None for nothing."""
        with self._speaking("looked at"):
            self._fs.invalidate_cache()
            try:
                info = self._fs.info(self._at(path, MANIFEST))
            except FileNotFoundError:
                return None
        return self._manifest(path, _stamp(info))

    def owner(self, run_id: str) -> str | None:
        """Whose a run's checkpoints are; None if nothing says so."""
        with self._speaking("read"):
            try:
                content = self._fs.cat_file(f"{self._root}/{run_id}/{OWNER}")
            except FileNotFoundError:
                return None
        return read_owner(content)

    def upload(self, path: CheckpointPath, folder: Path, manifest: Manifest, owner: str) -> str:
        """Stores a folder, its manifest last; what was stored there before goes after that.

        Returns:
            What the stored manifest says under UPLOAD.
        """
        before = self.manifest(path)
        upload = uuid.uuid4().hex[:12]
        with self._speaking("stored"):
            try:
                for name in manifest.files:
                    target = self._at(path, upload, name)
                    self._fs.makedirs(posixpath.dirname(target), exist_ok=True)
                    self._fs.put_file(str(folder / name), target)
                self._fs.pipe_file(f"{self._root}/{path.run_id}/{OWNER}", write_owner(owner))
                stored = Manifest({**manifest.about, UPLOAD: upload}, manifest.files)
                self._fs.pipe_file(self._at(path, MANIFEST), stored.to_json().encode())
            except BaseException:
                self._forget(path, upload)
                raise
        if before is not None:
            self._forget(path, before.about.get(UPLOAD))
        return upload

    def replace_manifest(self, path: CheckpointPath, manifest: Manifest) -> None:
        """Says something else about the same files."""
        with self._speaking("changed"):
            self._fs.pipe_file(self._at(path, MANIFEST), manifest.to_json().encode())

    def download(self, path: CheckpointPath, manifest: Manifest, writer: FolderWriter) -> None:
        """Writes the files of a checkpoint, comparing digests.

        Raises:
            DataLossError: CHECKPOINT_DAMAGED.
        """
        for name, entry in manifest.files.items():
            (writer.path / name).parent.mkdir(parents=True, exist_ok=True)
            with writer.create(name) as file:
                for chunk in self.read(path, manifest, name):
                    file.write(chunk)
            if file.digest != entry.sha256:
                raise damaged(path.name, name, f"has another content in {self.url} than was stored")

    def read(self, path: CheckpointPath, manifest: Manifest, name: str, offset: int = 0) -> Generator[bytes]:
        """A file's bytes from an offset on."""
        with self._speaking("read"):
            file = self._fs.open(
                self._at(path, str(manifest.about.get(UPLOAD)), name), "rb", block_size=_CHUNK_BYTES, cache_type="none"
            )
        with file:
            file.seek(offset)
            while True:
                with self._speaking("read"):
                    chunk = file.read(_CHUNK_BYTES)
                if not chunk:
                    return
                yield chunk

    def delete(self, path: CheckpointPath) -> None:
        """Deletes a checkpoint, its manifest first."""
        with self._speaking("deleted"):
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._at(path, MANIFEST))
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm(self._at(path), recursive=True)
        self._known.pop(path.key, None)

    def _manifest(self, path: CheckpointPath, stamp: object) -> Manifest:
        known = self._known.get(path.key)
        if known is not None and stamp is not None and known[0] == stamp:
            return known[1]
        with self._speaking("read"):
            content = self._fs.cat_file(self._at(path, MANIFEST))
        try:
            manifest = Manifest.from_json(content)
        except ValueError as exc:
            raise damaged(path.name, MANIFEST, f"cannot be read: {exc}") from exc
        self._known[path.key] = stamp, manifest
        return manifest

    def _forget(self, path: CheckpointPath, upload: object) -> None:
        """Removes an upload that nothing names; what stays costs room and harms nothing."""
        with contextlib.suppress(Exception):
            self._fs.rm(self._at(path, str(upload)), recursive=True)

    def _at(self, path: CheckpointPath, *inside: str) -> str:
        return "/".join((self._root, path.key, *inside))

    @contextlib.contextmanager
    def _speaking(self, what: str) -> Iterator[None]:
        """Translates whatever the library behind the scheme raises; each has its own exceptions."""
        try:
            yield
        except GradwireError:
            raise
        except Exception as exc:
            why = f"{type(exc).__name__}: {exc}"
            text = f"The store {self.url} could not be used (something was to be {what}): {why[:500]}"
            raise error("STORAGE_FAILED", text, url=self.url) from exc


def read_owner(content: bytes) -> str | None:
    """What write_owner wrote; None for something else."""
    try:
        owner = json.loads(content)["owner"]
    except (ValueError, TypeError, KeyError):
        return None
    return owner if isinstance(owner, str) else None


def write_owner(owner: str) -> bytes:
    """The content of an owner's file."""
    return json.dumps({"owner": owner}).encode() + b"\n"


def _stamp(info: dict[str, Any]) -> object:
    """Changes when a file does; None where the file system does not tell."""
    told = [info[key] for key in ("ETag", "etag", "LastModified", "mtime", "created", "updated") if info.get(key)]
    return (info.get("size"), *map(str, told)) if told else None
