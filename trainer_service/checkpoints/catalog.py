"""What checkpoints there are, whose, until when.

Nothing is remembered that is not on disk: a restarted trainer sees what the one before saw. Blocking: for threads, but
for `find` without a store, which reads one small file.
"""

import contextlib
import io
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from gradwire.errors import GradwireError, error, invalid_field

from trainer_service.access import current_caller
from trainer_service.checkpoint_path import SAMPLER_WEIGHTS, STATE, CheckpointPath
from trainer_service.checkpoints.storage import OWNER, Storage, read_owner, write_owner
from trainer_service.folders import MANIFEST, Manifest, alone, whole_folder

logger = logging.getLogger(__name__)

_PIECE_BYTES = 4 << 20
_INCOMING = ".incoming"
_TRASH = ".trash"
_STORED = ".stored"
"""Marks a local checkpoint that is in the store too."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint.

    Attributes:
        path: Where it is.
        manifest: What it holds.
        owner: Whose it is, see access.Caller; None if nothing says so, and then only admins see it.
    """

    path: CheckpointPath
    manifest: Manifest
    owner: str | None

    @property
    def created_at(self) -> datetime:
        """When it was saved."""
        return _time(self.manifest.about.get("created_at")) or datetime.fromtimestamp(0, UTC)

    @property
    def expires_at(self) -> datetime | None:
        """When it is deleted; None for never."""
        return _time(self.manifest.about.get("expires_at"))

    @property
    def base_path(self) -> str:
        """Of a delta: the base it builds on; "" for anything else."""
        return str(self.manifest.about.get("base_path") or "")


class Catalog:
    """The checkpoints of a trainer.

    Args:
        root: Local folder, shared with the worker: it writes below `<run_id>/<kind>/`, we only remove and put in place.
        storage: Where they are kept beyond this machine; None keeps them here alone.
    """

    def __init__(self, root: Path, storage: Storage | None = None) -> None:
        self.storage = storage
        self.root = root
        self._lock = threading.RLock()
        self._manifests: dict[Path, tuple[object, Manifest]] = {}
        self._owners: dict[str, str | None] = {}
        # What a trainer left that was killed. Several may share the folder, so what one is fetching stays.
        shutil.rmtree(root / _TRASH, ignore_errors=True)
        for folder in (root / _INCOMING).glob("*/"):
            with contextlib.suppress(OSError), alone(folder, wait=False):
                shutil.rmtree(folder, ignore_errors=True)

    # ── finding ───────────────────────────────────────────────────────────────────────────────────────────────────

    def list(self, *, run_id: str = "", kind: str = "") -> list[Checkpoint]:
        """Those the current caller may see, newest first; of one run and kind, if given.

        Raises:
            FailedPreconditionError: STORAGE_FAILED: the store cannot be read.
        """
        found = [
            checkpoint
            for checkpoint in self._all()
            if (not run_id or checkpoint.path.run_id == run_id)
            and (not kind or checkpoint.path.kind == kind)
            and _may_see(checkpoint)
            and not _expired(checkpoint)
        ]
        return sorted(found, key=lambda checkpoint: (checkpoint.created_at, checkpoint.path), reverse=True)

    def find(self, path: str, *, field: str = "path") -> Checkpoint:
        """The checkpoint at a path, for the current caller; `field` is what the caller calls the path.

        Raises:
            InvalidArgumentError: INVALID_FIELD: it is no path.
            NotFoundError: CHECKPOINT_NOT_FOUND, whether there is none, it has expired, or it is somebody else's.
        """
        parsed = CheckpointPath.parse(path, field=field)
        manifest = self._local(parsed) or (self.storage.manifest(parsed) if self.storage else None)
        if manifest is not None:
            checkpoint = Checkpoint(parsed, manifest, self._owner(parsed.run_id))
            if _may_see(checkpoint) and not _expired(checkpoint):
                return checkpoint
        raise error(
            "CHECKPOINT_NOT_FOUND",
            f"There is no checkpoint {path}; ListCheckpoints, or `gradwire checkpoints list`, lists those there are.",
            path=path,
        )

    # ── what runs do ──────────────────────────────────────────────────────────────────────────────────────────────

    def claim(self, run_id: str, owner: str) -> None:
        """Says whose the checkpoints of a run will be; before it saves one."""
        if self._owners.get(run_id) == owner:
            return
        folder = self.root / run_id
        folder.mkdir(parents=True, exist_ok=True)
        with _opened(folder) as handle:
            _replace(handle, OWNER, write_owner(owner))
        self._owners[run_id] = owner

    def store(self, path: str) -> None:
        """Uploads a checkpoint the worker saved; nothing where there is no store, or it is there already.

        Raises:
            FailedPreconditionError: STORAGE_FAILED: it stays here, and `sweep` tries again.
        """
        parsed = CheckpointPath.parse(path)
        folder = parsed.folder(self.root)
        if self.storage is None or (folder / _STORED).exists():
            return
        with self._lock:
            manifest = self._local(parsed)
            if manifest is None:
                return
            self.storage.upload(parsed, folder, manifest, self._owner(parsed.run_id) or "")
            # Into the folder uploaded, which may have been replaced meanwhile.
            with contextlib.suppress(OSError), _opened(folder) as handle:
                if _read_at(handle, MANIFEST) == manifest.to_json().encode():
                    os.close(os.open(_STORED, os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=handle))

    def fetch(self, path: str, *, field: str = "path") -> None:
        """Makes a checkpoint that is only in the store one the worker can read, with the base it builds on.

        Raises:
            As find and storage; FailedPreconditionError: STORAGE_FAILED: the disk is full.
        """
        found = self.find(path, field=field)
        if self.storage is None:
            return
        if found.base_path:
            self.fetch(found.base_path)
        target = found.path.folder(self.root)
        if self._local(found.path) is not None:
            return
        aside = self.root / _INCOMING / uuid.uuid4().hex
        aside.mkdir(parents=True)
        try:
            with alone(aside):
                about, size_bytes = found.manifest.about, found.manifest.size_bytes
                whole = aside / "whole" / found.path.name
                with whole_folder(whole, about=about, overwrite=False, needed_bytes=size_bytes) as writer:
                    self.storage.download(found.path, found.manifest, writer)
                (whole / _STORED).touch()
                if found.owner is not None:
                    self.claim(found.path.run_id, found.owner)
                target.parent.mkdir(parents=True, exist_ok=True)
                # Refused where another fetch, or a save, was faster.
                with contextlib.suppress(OSError):
                    whole.rename(target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    # ── what callers do ───────────────────────────────────────────────────────────────────────────────────────────

    def set_ttl(self, path: str, ttl_seconds: int | None) -> Checkpoint:
        """Keeps a checkpoint that long from now; None for ever.

        Raises:
            As find; FailedPreconditionError: STORAGE_FAILED.
        """
        with self._lock:
            found = self.find(path)
            expires_at = None
            if ttl_seconds is not None:
                expires_at = (datetime.now(UTC) + timedelta(seconds=ttl_seconds)).isoformat(timespec="milliseconds")

            def changed(manifest: Manifest) -> Manifest:
                return Manifest({**manifest.about, "expires_at": expires_at}, manifest.files)

            if self.storage is not None and (stored := self.storage.manifest(found.path)) is not None:
                self.storage.replace_manifest(found.path, changed(stored))
            with contextlib.suppress(FileNotFoundError), _opened(found.path.folder(self.root)) as folder:
                # Read from the folder it is written to, which may have been replaced since it was found.
                local = changed(Manifest.from_json(_read_at(folder, MANIFEST)))
                _replace(folder, MANIFEST, local.to_json().encode())
            return Checkpoint(found.path, changed(found.manifest), found.owner)

    def delete(self, path: str) -> None:
        """Deletes a checkpoint for good.

        Raises:
            As find; FailedPreconditionError: CHECKPOINT_IN_USE: deltas build on it; STORAGE_FAILED: nothing was done.
        """
        with self._lock:
            found = self.find(path)
            if deltas := [other for other in self._all() if other.base_path == path and not _expired(other)]:
                raise error(
                    "CHECKPOINT_IN_USE",
                    f"{path} is the base of {len(deltas)} deltas, {deltas[0].path} for one; delete them first.",
                    path=path,
                    delta=deltas[0].path,
                )
            self._remove(found.path)

    def open(self, found: Checkpoint, name: str, *, offset: int = 0, sha256: str = "") -> Generator[bytes]:
        """A file's bytes from an offset on, in pieces of some MiB.

        Raises:
            InvalidArgumentError: INVALID_FIELD: no such file, or an offset behind its end.
            AbortedError: CHECKPOINT_CHANGED: the file is not the one of that digest.
        """
        handle, manifest = None, found.manifest
        with contextlib.suppress(FileNotFoundError), _opened(found.path.folder(self.root)) as folder:
            # The manifest again, of the very folder the file is read from.
            manifest = Manifest.from_json(_read_at(folder, MANIFEST))
            if name in manifest.files:
                handle = io.FileIO(os.open(name, os.O_RDONLY, dir_fd=folder))
        try:
            _check_range(manifest, name, offset, sha256)
        except GradwireError:
            if handle is not None:
                handle.close()
            raise
        if handle is not None:
            return _pieces(handle, offset)
        assert self.storage is not None
        return self.storage.read(found.path, manifest, name, offset)

    # ── housekeeping ──────────────────────────────────────────────────────────────────────────────────────────────

    def sweep(self) -> None:
        """Deletes what has expired, and uploads what could not be uploaded before."""
        with self._lock:
            everything = list(self._all())
            kept = {other.base_path for other in everything if not _expired(other)}
            for checkpoint in everything:
                # A base stays as long as its deltas.
                if _expired(checkpoint) and str(checkpoint.path) not in kept:
                    self._remove(checkpoint.path)
                    logger.info("Expired.", extra={"fields": {"path": str(checkpoint.path)}})
        if self.storage is not None:
            for path in list(self._local_paths()):
                self.store(str(path))

    def _remove(self, path: CheckpointPath) -> None:
        if self.storage is not None:
            self.storage.delete(path)
        trash = self.root / _TRASH / uuid.uuid4().hex
        trash.parent.mkdir(parents=True, exist_ok=True)
        # Gone at once, in one piece; then its bytes.
        with contextlib.suppress(FileNotFoundError):
            path.folder(self.root).rename(trash)
        self._manifests.pop(path.folder(self.root) / MANIFEST, None)
        shutil.rmtree(trash, ignore_errors=True)

    def _all(self) -> Iterator[Checkpoint]:
        stored = self.storage.manifests() if self.storage else {}
        local = {path: manifest for path in self._local_paths() if (manifest := self._local(path)) is not None}
        for path, manifest in {**stored, **local}.items():
            yield Checkpoint(path, manifest, self._owner(path.run_id))

    def _local_paths(self) -> Iterator[CheckpointPath]:
        for kind in (STATE, SAMPLER_WEIGHTS):
            for file in self.root.glob(f"*/{kind}/*/{MANIFEST}"):
                run_id, _, name, _ = file.relative_to(self.root).parts
                # Not those being written, whose names begin with a dot.
                with contextlib.suppress(GradwireError):
                    yield CheckpointPath.parse(str(CheckpointPath(run_id, kind, name)))

    def _local(self, path: CheckpointPath) -> Manifest | None:
        file = path.folder(self.root) / MANIFEST
        try:
            stat = file.stat()
            stamp = stat.st_mtime_ns, stat.st_size, stat.st_ino
            known = self._manifests.get(file)
            if known is None or known[0] != stamp:
                known = self._manifests[file] = stamp, Manifest.from_json(file.read_bytes())
            return known[1]
        except (FileNotFoundError, NotADirectoryError):
            self._manifests.pop(file, None)
            return None
        except (OSError, ValueError) as exc:
            logger.warning("A manifest cannot be read.", extra={"fields": {"file": str(file), "error": str(exc)}})
            return None

    def _owner(self, run_id: str) -> str | None:
        if self._owners.get(run_id) is None:
            try:
                self._owners[run_id] = read_owner((self.root / run_id / OWNER).read_bytes())
            except OSError:
                self._owners[run_id] = self.storage.owner(run_id) if self.storage else None
        return self._owners[run_id]


def _may_see(checkpoint: Checkpoint) -> bool:
    caller = current_caller.get()
    return caller.admin if checkpoint.owner is None else caller.may_see(checkpoint.owner)


def _expired(checkpoint: Checkpoint) -> bool:
    return checkpoint.expires_at is not None and checkpoint.expires_at <= datetime.now(UTC)


def _time(text: object) -> datetime | None:
    try:
        time = datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)


def _check_range(manifest: Manifest, name: str, offset: int, sha256: str) -> None:
    entry = manifest.files.get(name)
    if entry is None:
        raise invalid_field("file", f"is {name[:200]!r}; the checkpoint has {', '.join(sorted(manifest.files))}.")
    if sha256 and sha256 != entry.sha256:
        text = f"{name} was saved anew since its digest was asked for; ask for it again and begin at offset 0."
        raise error("CHECKPOINT_CHANGED", text, file=name, sha256=entry.sha256)
    if offset > entry.size_bytes:
        raise invalid_field("offset", f"is {offset}, but {name} has {entry.size_bytes} bytes.")


def _pieces(file: io.FileIO, offset: int) -> Generator[bytes]:
    with file:
        file.seek(offset)
        while piece := file.read(_PIECE_BYTES):
            yield piece


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    """A folder as it is now, even when another is put in its place meanwhile."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield handle
    finally:
        os.close(handle)


def _read_at(folder: int, name: str) -> bytes:
    with os.fdopen(os.open(name, os.O_RDONLY, dir_fd=folder), "rb") as file:
        return file.read()


def _replace(folder: int, name: str, content: bytes) -> None:
    """Writes a small file whole or not at all."""
    aside = f".{name}.{uuid.uuid4().hex[:8]}"
    with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=folder), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, name, src_dir_fd=folder, dst_dir_fd=folder)
    os.fsync(folder)
