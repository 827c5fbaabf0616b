"""Checkpoints in an object store, or any file system that fsspec supports.

Below the URL's path:

    <run_id>/owner.json                        whose they are
    <run_id>/<kind>/<name>/manifest.json       written last; names the upload it belongs to
    <run_id>/<kind>/<name>/<upload>/<file>     one folder per upload, so that replacing one never mixes two

Files stream through a few MiB of memory. Blocking: for threads, not for an event loop.
"""

import contextlib
import json
import logging
import os
import posixpath
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from gradwire._wire.untrusted import parse_json
from gradwire.errors import DataLossError, GradwireError, error

from trainer_service.atomic_folders import MANIFEST, MAX_MANIFEST_BYTES, FolderWriter, Manifest, damaged
from trainer_service.checkpoints import manifests
from trainer_service.checkpoints.manifests import UPLOAD
from trainer_service.paths import SCHEME, CheckpointPath

logger = logging.getLogger(__name__)

OWNER = "owner.json"

_CHUNK_BYTES = 8 << 20
_MAX_OWNER_BYTES = 4096


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
        self._known: dict[str, tuple[object, Manifest | GradwireError]] = {}

    def manifests(self) -> dict[CheckpointPath, Manifest]:
        """All stored manifests. Those read before are read again only if they changed."""
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
            # Foreign files are skipped, and a damaged manifest hides only itself.
            with contextlib.suppress(GradwireError):
                path = CheckpointPath.parse(f"{SCHEME}{posixpath.dirname(inside)}")
                listed[path] = self._manifest(path, info)
        return listed

    def manifest(self, path: CheckpointPath) -> Manifest | None:
        """The manifest stored at a path; None if there is none.

        Raises:
            DataLossError: CHECKPOINT_DAMAGED.
        """
        with self._speaking("looked at"):
            self._fs.invalidate_cache()
            try:
                info = self._fs.info(self._at(path, MANIFEST))
            except FileNotFoundError:
                return None
        return self._manifest(path, info)

    def owner(self, run_id: str) -> str | None:
        """The owner of a run's checkpoints; None if none is recorded."""
        with self._speaking("read"):
            try:
                with self._fs.open(f"{self._root}/{run_id}/{OWNER}", "rb") as file:
                    content = file.read(_MAX_OWNER_BYTES)
            except FileNotFoundError:
                return None
        return read_owner(content)

    def upload(self, path: CheckpointPath, folder: Path, manifest: Manifest, owner: str) -> str:
        """Stores a folder, its manifest last, and then removes what was stored there before.

        Returns:
            The upload's name, which the stored manifest has under UPLOAD.
        """
        try:
            before = self.manifest(path)
        except DataLossError:
            # The folder that a damaged manifest names cannot be trusted to be its own.
            before = None
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
        """Changes the manifest of the same files."""
        with self._speaking("changed"):
            self._fs.pipe_file(self._at(path, MANIFEST), manifest.to_json().encode())

    def download(self, path: CheckpointPath, manifest: Manifest, writer: FolderWriter) -> None:
        """Downloads the files of a checkpoint and verifies their digests.

        Raises:
            DataLossError: CHECKPOINT_DAMAGED.
        """
        for name, entry in manifest.files.items():
            (writer.path / name).parent.mkdir(parents=True, exist_ok=True)
            with writer.create(name) as file:
                for chunk in self.read(path, manifest, name):
                    file.write(chunk)
            if file.digest != entry.sha256:
                raise damaged(path.name, name, f"has changed in {self.url} since it was stored")

    def read(self, path: CheckpointPath, manifest: Manifest, name: str, offset: int = 0) -> Generator[bytes]:
        """A file's bytes from an offset on, no more than its manifest says.

        Raises:
            DataLossError: CHECKPOINT_DAMAGED: it is missing, or a link out of the checkpoint's folder.
        """
        place = self._at(path, str(manifest.about.get(UPLOAD)), name)
        self._check_place(path, place, name)
        with self._speaking("read"):
            try:
                file = self._fs.open(place, "rb", block_size=_CHUNK_BYTES, cache_type="none")
            except FileNotFoundError:
                raise damaged(path.name, name, f"is missing in {self.url}") from None
        left = manifest.files[name].size_bytes - offset
        with file:
            file.seek(offset)
            while left > 0:
                with self._speaking("read"):
                    chunk = file.read(min(left, _CHUNK_BYTES))
                if not chunk:
                    return
                left -= len(chunk)
                yield chunk

    def delete(self, path: CheckpointPath) -> None:
        """Deletes a checkpoint, its manifest first.

        Raises:
            DataLossError: CHECKPOINT_DAMAGED: it is a link to somewhere else.
        """
        self._check_place(path, self._at(path, ""), "its folder")
        with self._speaking("deleted"):
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._at(path, MANIFEST))
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm(self._at(path), recursive=True)
        self._known.pop(path.key, None)

    def _manifest(self, path: CheckpointPath, info: dict[str, Any]) -> Manifest:
        stamp = _stamp(info)
        known = self._known.get(path.key)
        if known is None or stamp is None or known[0] != stamp:
            known = self._known[path.key] = stamp, self._read_manifest(path, info)
        if isinstance(known[1], GradwireError):
            raise known[1]
        return known[1]

    def _read_manifest(self, path: CheckpointPath, info: dict[str, Any]) -> Manifest | GradwireError:
        """A manifest, or what is wrong with it, which is remembered until the file changes."""
        try:
            if (info.get("size") or 0) > MAX_MANIFEST_BYTES:
                raise damaged(path.name, MANIFEST, f"has {info['size']} bytes")
            place = self._at(path, MANIFEST)
            self._check_place(path, place, MANIFEST)
            with self._speaking("read"):
                content = self._fs.cat_file(place)
            manifest = manifests.read(path, content)
            if UPLOAD not in manifest.about:
                raise damaged(path.name, MANIFEST, "does not say where its files are")
        except DataLossError as exc:
            logger.warning(
                "A manifest in the store is damaged.", extra={"fields": {"path": str(path), "error": str(exc)}}
            )
            return exc
        return manifest

    def _check_place(self, path: CheckpointPath, place: str, name: str) -> None:
        """Refuses links that lead out of a checkpoint's folder, and pipes, in a store that is a folder."""
        if not isinstance(self._fs, LocalFileSystem):
            return
        try:
            real = os.path.realpath(place, strict=False)
        except OSError as exc:
            raise damaged(path.name, name, f"cannot be read: {exc.strerror}") from None
        if not f"{real}/".startswith(os.path.realpath(self._root) + f"/{path.key}/"):
            raise damaged(path.name, name, "is a link that leads out of its folder")
        if os.path.exists(real) and not (os.path.isfile(real) or os.path.isdir(real)):
            # A pipe could be read for ever.
            raise damaged(path.name, name, "is no file")

    def _forget(self, path: CheckpointPath, upload: object) -> None:
        """Removes an upload that no manifest names. If that fails, it only costs room."""
        with contextlib.suppress(Exception):
            self._fs.rm(self._at(path, str(upload)), recursive=True)

    def _at(self, path: CheckpointPath, *inside: str) -> str:
        return "/".join((self._root, path.key, *inside))

    @contextlib.contextmanager
    def _speaking(self, what: str) -> Iterator[None]:
        """Translates the exceptions of the library behind the URL's scheme; each has its own."""
        try:
            yield
        except GradwireError:
            raise
        except Exception as exc:
            why = f"{type(exc).__name__}: {exc}"
            text = f"The store {self.url} could not be used (something was to be {what}): {why[:500]}"
            raise error("STORAGE_FAILED", text, url=self.url) from exc


def read_owner(content: bytes) -> str | None:
    """The owner that write_owner wrote; None for anything else."""
    try:
        owner = parse_json(content)["owner"]
    except (ValueError, TypeError, KeyError):
        return None
    return owner if isinstance(owner, str) else None


def write_owner(owner: str) -> bytes:
    """The content of an owner's file."""
    return json.dumps({"owner": owner}).encode() + b"\n"


def _stamp(info: dict[str, Any]) -> object:
    """Changes when a file does; None if the file system does not tell."""
    told = [info[key] for key in ("ETag", "etag", "LastModified", "mtime", "created", "updated") if info.get(key)]
    return (info.get("size"), *map(str, told)) if told else None
