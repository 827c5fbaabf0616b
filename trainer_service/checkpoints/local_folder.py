"""The local folder of checkpoints: those saved here, and copies of those in the store.

Blocking: for threads.
"""

import contextlib
import io
import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from gradwire._wire.untrusted import parse_json

from trainer_service.atomic_folders import MANIFEST, Manifest, alone, whole_folder
from trainer_service.checkpoints import manifests
from trainer_service.checkpoints.checkpoint import Checkpoint
from trainer_service.checkpoints.files import open_at, opened, read_at, replace
from trainer_service.checkpoints.local_manifests import LocalManifests
from trainer_service.checkpoints.manifests import UPLOAD
from trainer_service.checkpoints.object_store import OWNER, Storage, read_owner, write_owner
from trainer_service.paths import CheckpointPath

_INCOMING = ".incoming"
_TRASH = ".trash"
_STORED = ".stored"
"""Marks a folder as a copy of what is in the store, and names the upload. A folder without it was saved here and is not
stored yet."""


class LocalFolder:
    """Checkpoints on this machine.

    Args:
        root: The folder, shared with the worker, which writes below `<run_id>/<kind>/`. This class only adds and
            removes whole checkpoints.
        storage: The store that copies come from; None if there is none.
    """

    def __init__(self, root: Path, storage: Storage | None) -> None:
        self.root = root
        self._storage = storage
        self._manifests = LocalManifests(root)
        self._owners: dict[str, str | None] = {}
        self._claimed: set[tuple[str, str]] = set()
        # Remove what killed trainers left, but not what another trainer is fetching into the same folder.
        shutil.rmtree(root / _TRASH, ignore_errors=True)
        for folder in (root / _INCOMING).glob("*/"):
            with contextlib.suppress(OSError), alone(folder, wait=False):
                shutil.rmtree(folder, ignore_errors=True)

    # ── what is there ─────────────────────────────────────────────────────────────────────────────────────────────

    def paths(self) -> Iterator[CheckpointPath]:
        """All checkpoints here, copies included."""
        return self._manifests.paths()

    def find(self, path: CheckpointPath) -> Manifest | None:
        """The manifest of the checkpoint at a path; None if there is none, or it is damaged."""
        return self._manifests.find(path)

    def read(self, path: CheckpointPath) -> Manifest | None:
        """The manifest of the checkpoint at a path; None if there is none.

        Raises:
            DataLossError: CHECKPOINT_DAMAGED.
        """
        return self._manifests.read(path)

    def not_stored(self) -> dict[CheckpointPath, Manifest]:
        """What was saved here and is not stored yet."""
        return {
            path: manifest
            for path in self.paths()
            if (manifest := self.find(path)) is not None and not self.is_copy(path)
        }

    def is_copy(self, path: CheckpointPath) -> bool:
        """Whether the checkpoint at a path is a copy of one in the store."""
        return self._upload_of(path) is not None

    def holds(self, found: Checkpoint) -> bool:
        """Whether a checkpoint is here, or one that was saved here in its place since it was found."""
        local = self.find(found.path)
        upload = self._upload_of(found.path)
        return local is not None and (upload in (None, found.manifest.about.get(UPLOAD)) or local == found.manifest)

    def open(self, path: CheckpointPath, name: str) -> tuple[io.FileIO | None, Manifest]:
        """(a file of the checkpoint at a path, the manifest of the same folder); None for a file that is not there.

        Raises:
            FileNotFoundError: There is no checkpoint.
            DataLossError: CHECKPOINT_DAMAGED.
        """
        with opened(path.folder(self.root)) as folder:
            manifest = manifests.read(path, read_at(folder, MANIFEST))
            file: io.FileIO | None = None
            if name in manifest.files:
                with contextlib.suppress(FileNotFoundError):
                    file = open_at(folder, name, of=path.name)
            return file, manifest

    def _upload_of(self, path: CheckpointPath) -> str | None:
        """The upload that the checkpoint at a path is a copy of; None if it is not a copy."""
        try:
            mark = parse_json((path.folder(self.root) / _STORED).read_bytes())
        except (OSError, ValueError):
            return None
        ours = self._storage is not None and isinstance(mark, dict) and mark.get("url") == self._storage.url
        return mark.get(UPLOAD) if ours else None

    # ── owners ────────────────────────────────────────────────────────────────────────────────────────────────────

    def claim(self, run_id: str, owner: str) -> None:
        """Records the owner of a run's checkpoints, before it saves one."""
        if (run_id, owner) in self._claimed:
            return
        folder = self.root / run_id
        folder.mkdir(parents=True, exist_ok=True)
        with opened(folder) as handle:
            replace(handle, OWNER, write_owner(owner))
        self._owners[run_id] = owner
        self._claimed.add((run_id, owner))

    def owner(self, run_id: str) -> str | None:
        """The owner of a run's checkpoints, as recorded here or else in the store; None if in neither."""
        if self._owners.get(run_id) is None:
            try:
                self._owners[run_id] = read_owner((self.root / run_id / OWNER).read_bytes())
            except OSError:
                self._owners[run_id] = self._storage.owner(run_id) if self._storage else None
        return self._owners[run_id]

    # ── changing what is there ────────────────────────────────────────────────────────────────────────────────────

    def change_manifest(self, path: CheckpointPath, change: Callable[[Manifest], Manifest]) -> None:
        """Rewrites the manifest of the checkpoint at a path, if there is one."""
        with contextlib.suppress(FileNotFoundError), opened(path.folder(self.root)) as folder:
            # Read from the folder it is written to, which may have been replaced since it was found.
            local = change(manifests.read(path, read_at(folder, MANIFEST)))
            replace(folder, MANIFEST, local.to_json().encode())

    def discard(self, path: CheckpointPath) -> None:
        """Removes the checkpoint at a path: renamed away first, so that it is gone at once, then deleted."""
        trash = self.root / _TRASH / uuid.uuid4().hex
        trash.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            path.folder(self.root).rename(trash)
        self._manifests.forget(path)
        shutil.rmtree(trash, ignore_errors=True)

    def upload(self, path: CheckpointPath, storage: Storage) -> bool:
        """Copies the checkpoint at a path to the store, unless it is a copy itself. Returns whether it did.

        Raises:
            FailedPreconditionError: STORAGE_FAILED.
        """
        folder = path.folder(self.root)
        # Locked across trainers: one upload of a folder at a time, and deletion waits for it.
        with alone(folder):
            manifest = self.find(path)
            if manifest is None or self.is_copy(path):
                return False
            upload = storage.upload(path, folder, manifest, self.owner(path.run_id) or "")
            # Only the folder that was uploaded gets the mark; it may have been replaced meanwhile.
            with contextlib.suppress(OSError), opened(folder) as handle:
                if read_at(handle, MANIFEST) == manifest.to_json().encode():
                    replace(handle, _STORED, _mark(storage, upload))
        return True

    def download(self, found: Checkpoint, storage: Storage) -> None:
        """Copies a checkpoint from the store, unless something newer was saved here meanwhile.

        Raises:
            DataLossError: CHECKPOINT_DAMAGED.
            FailedPreconditionError: STORAGE_FAILED.
            OSError: It cannot be written, for example because the disk is full.
        """
        aside = self.root / _INCOMING / uuid.uuid4().hex
        aside.mkdir(parents=True)
        try:
            with alone(aside):
                about, size_bytes = found.manifest.about, found.manifest.size_bytes
                whole = aside / "whole" / found.path.name
                with whole_folder(whole, about=about, overwrite=False, needed_bytes=size_bytes) as writer:
                    storage.download(found.path, found.manifest, writer)
                (whole / _STORED).write_bytes(_mark(storage, about.get(UPLOAD)))
                if found.owner is not None:
                    self.claim(found.path.run_id, found.owner)
                target = found.path.folder(self.root)
                target.parent.mkdir(parents=True, exist_ok=True)
                with alone(target.parent):
                    # A checkpoint saved here meanwhile is newer.
                    if not target.exists() or self.is_copy(found.path):
                        self.discard(found.path)
                        whole.rename(target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _mark(storage: Storage, upload: object) -> bytes:
    return json.dumps({"url": storage.url, UPLOAD: upload}).encode()
