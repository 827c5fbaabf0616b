"""What checkpoints there are, whose, until when.

Nothing is remembered that is not on disk: a restarted trainer sees what the one before saw. Blocking: for threads, but
for `find` without a store, which reads one small file.
"""

import contextlib
import functools
import json
import logging
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from gradwire._wire.untrusted import parse_json
from gradwire.errors import DataLossError, GradwireError, error

from trainer_service.access import current_caller
from trainer_service.checkpoint_path import SAMPLER_WEIGHTS, CheckpointPath
from trainer_service.checkpoints import manifests
from trainer_service.checkpoints.files import check_range, open_at, opened, pieces, read_at, replace
from trainer_service.checkpoints.local import LocalManifests
from trainer_service.checkpoints.manifests import UPLOAD
from trainer_service.checkpoints.storage import OWNER, Storage, read_owner, write_owner
from trainer_service.folders import MANIFEST, Manifest, alone, damaged, whole_folder

logger = logging.getLogger(__name__)

_INCOMING = ".incoming"
_TRASH = ".trash"
_STORED = ".stored"
"""Marks a local folder that is a copy of what is in the store, and says of which upload: from then on the store says
what there is, until when. One without it was saved here and is still to be stored."""
_RECENT_S = 5.0
"""How long what the store said holds, for those who ask often or cannot wait for it."""
_MAX_LOOKED = 1024


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
        return manifests.time_of(self.manifest.about, "created_at") or datetime.fromtimestamp(0, UTC)

    @property
    def expires_at(self) -> datetime | None:
        """When it is deleted; None for never."""
        return manifests.time_of(self.manifest.about, "expires_at")

    @property
    def base_path(self) -> str:
        """Of a delta: the base it builds on; "" for anything else."""
        return str(self.manifest.about.get("base_path") or "")


class Catalog:
    """The checkpoints of a trainer.

    Where there is a store, it says what there is, until when; the local folder is a cache, but for what was saved here
    and is still to be stored. What is in the store can be used from here too where the store cannot be reached.

    Args:
        root: Local folder, shared with the worker: it writes below `<run_id>/<kind>/`, we only remove and put in place.
        storage: Where they are kept beyond this machine; None keeps them here alone.
    """

    def __init__(self, root: Path, storage: Storage | None = None) -> None:
        self.storage = storage
        self.root = root
        self._lock = threading.RLock()
        self._local = LocalManifests(root)
        self._owners: dict[str, str | None] = {}
        self._claimed: set[tuple[str, str]] = set()
        self._looked: dict[CheckpointPath, tuple[float, Checkpoint | GradwireError | None]] = {}
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
        everything = list(self._all())
        kept = _bases(everything)
        found = [
            checkpoint
            for checkpoint in everything
            if (not run_id or checkpoint.path.run_id == run_id)
            and (not kind or checkpoint.path.kind == kind)
            and _may_see(checkpoint.owner)
            and (not _expired(checkpoint) or str(checkpoint.path) in kept)
        ]
        return sorted(found, key=lambda checkpoint: (checkpoint.created_at, checkpoint.path), reverse=True)

    def find(self, path: str, *, field: str = "path", recent: bool = False) -> Checkpoint:
        """The checkpoint at a path, for the current caller.

        Args:
            path: It.
            field: What the caller calls the path.
            recent: What the store said some seconds ago will do; the store is not asked then.

        Raises:
            InvalidArgumentError: INVALID_FIELD: it is no path.
            NotFoundError: CHECKPOINT_NOT_FOUND, whether there is none, it has expired, or it is somebody else's.
            DataLossError: CHECKPOINT_DAMAGED: its manifest is; it can only be deleted.
            FailedPreconditionError: STORAGE_FAILED: the store cannot be read, and there is no copy here.
        """
        parsed = CheckpointPath.parse(path, field=field)
        try:
            found = self._look(parsed, recent=recent)
        except DataLossError:
            if _may_see(self._owner(parsed.run_id)):
                raise
            found = None
        if found is not None and _may_see(found.owner) and (not _expired(found) or self._is_base(found)):
            return found
        raise error(
            "CHECKPOINT_NOT_FOUND",
            f"There is no checkpoint {path}; ListCheckpoints, or `gradwire checkpoints list`, lists those there are.",
            path=path,
        )

    # ── what runs do ──────────────────────────────────────────────────────────────────────────────────────────────

    def claim(self, run_id: str, owner: str) -> None:
        """Says whose the checkpoints of a run will be; before it saves one."""
        if (run_id, owner) in self._claimed:
            return
        folder = self.root / run_id
        folder.mkdir(parents=True, exist_ok=True)
        with opened(folder) as handle:
            replace(handle, OWNER, write_owner(owner))
        self._owners[run_id] = owner
        self._claimed.add((run_id, owner))

    def make_way(self, path: str) -> None:
        """Removes a checkpoint that has expired and was not swept yet, so that its name is free.

        Raises:
            As sweep.
        """
        found = self._look(CheckpointPath.parse(path))
        if found is not None and _expired(found) and not self._is_base(found):
            self._expire(found)

    def store(self, path: str) -> None:
        """Uploads a checkpoint the worker saved; nothing where there is no store, or it is there already.

        Raises:
            FailedPreconditionError: STORAGE_FAILED: it stays here, and `sweep` tries again.
        """
        parsed = CheckpointPath.parse(path)
        folder = parsed.folder(self.root)
        if self.storage is None or not folder.is_dir():
            return
        # One upload a folder, of whatever trainer; who deletes it waits.
        with alone(folder):
            manifest = self._local.find(parsed)
            if manifest is None or self._copy_of(parsed) is not None:
                return
            upload = self.storage.upload(parsed, folder, manifest, self._owner(parsed.run_id) or "")
            # Into the folder uploaded, which may have been replaced meanwhile.
            with contextlib.suppress(OSError), opened(folder) as handle:
                if read_at(handle, MANIFEST) == manifest.to_json().encode():
                    replace(handle, _STORED, self._mark(upload))
        self._looked.pop(parsed, None)

    def fetch(self, found: Checkpoint) -> None:
        """Makes a checkpoint one the worker can read, with the base it builds on; nothing where it is already.

        Raises:
            As find; DataLossError: CHECKPOINT_DAMAGED; FailedPreconditionError: STORAGE_FAILED: also a full disk.
        """
        if self.storage is None:
            return
        try:
            if found.base_path:
                base = self.find(found.base_path)
                if base.base_path:
                    raise damaged(found.path.name, MANIFEST, f"names a delta as its base: {base.path}")
                self.fetch(base)
            if not self._is_here(found):
                self._download(self.storage, found)
        except (GradwireError, OSError) as exc:
            text = f"{found.path} could not be fetched from {self.storage.url} to {self.root}: {exc}"
            failed = exc if isinstance(exc, GradwireError) else error("STORAGE_FAILED", text, path=str(found.path))
            # Whoever looks it up next is told, rather than that it is not here.
            self._remember(found.path, failed)
            raise failed from exc

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
            with contextlib.suppress(FileNotFoundError), opened(found.path.folder(self.root)) as folder:
                # Read from the folder it is written to, which may have been replaced since it was found.
                local = changed(manifests.read(found.path, read_at(folder, MANIFEST)))
                replace(folder, MANIFEST, local.to_json().encode())
            self._looked.pop(found.path, None)
            return Checkpoint(found.path, changed(found.manifest), found.owner)

    def delete(self, path: str) -> None:
        """Deletes a checkpoint for good.

        Raises:
            As find; FailedPreconditionError: CHECKPOINT_IN_USE: deltas build on it; STORAGE_FAILED: nothing was done.
        """
        parsed = CheckpointPath.parse(path)
        with contextlib.suppress(DataLossError):
            # What is damaged can be deleted by those who may see it.
            self.find(path)
        with contextlib.ExitStack() as stack:
            # Not while it is being stored, which would bring it back.
            with contextlib.suppress(FileNotFoundError):
                stack.enter_context(alone(parsed.folder(self.root)))
            stack.enter_context(self._lock)
            if deltas := [other for other in self._all() if other.base_path == path and not _expired(other)]:
                raise error(
                    "CHECKPOINT_IN_USE",
                    f"{path} is the base of {len(deltas)} deltas, {deltas[0].path} for one; delete them first.",
                    path=path,
                    delta=deltas[0].path,
                )
            self._remove(parsed)

    def open(self, found: Checkpoint, name: str, *, offset: int = 0, sha256: str = "") -> Generator[bytes]:
        """A file's bytes from an offset on, in pieces of some MiB.

        Raises:
            InvalidArgumentError: INVALID_FIELD: no such file, or an offset behind its end.
            AbortedError: CHECKPOINT_CHANGED: the file is not the one of that digest.
            DataLossError: CHECKPOINT_DAMAGED: it is not there.
        """
        if not self._is_here(found):
            # It may have been stored anew since it was found.
            found = self._look(found.path) or found
        handle, manifest = None, found.manifest
        if self._is_here(found):
            with contextlib.suppress(FileNotFoundError), opened(found.path.folder(self.root)) as folder:
                # The manifest again, of the very folder the file is read from.
                manifest = manifests.read(found.path, read_at(folder, MANIFEST))
                if name in manifest.files:
                    handle = open_at(folder, name, of=found.path.name)
        try:
            check_range(manifest, name, offset, sha256)
        except GradwireError:
            if handle is not None:
                handle.close()
            raise
        if handle is not None:
            return pieces(handle, offset, manifest.files[name].size_bytes)
        if self.storage is None:
            raise damaged(found.path.name, name, "is missing")
        return self.storage.read(found.path, manifest, name, offset)

    # ── housekeeping ──────────────────────────────────────────────────────────────────────────────────────────────

    def sweep(self) -> None:
        """Deletes what has expired, and uploads what could not be uploaded before.

        Raises:
            FailedPreconditionError: STORAGE_FAILED, of the first that failed; whatever else could be done is done.
        """
        everything = list(self._all())
        kept = _bases(everything)
        # A base stays as long as its deltas.
        expired = [one for one in everything if _expired(one) and str(one.path) not in kept]
        work: list[Callable[[], object]] = [functools.partial(self._expire, one) for one in expired]
        if self.storage is not None:
            work += [functools.partial(self.store, str(path)) for path in self._local.paths()]
        failures: list[Exception] = []
        for each in work:
            # One that cannot be deleted or stored is no reason to leave the others.
            try:
                each()
            except (GradwireError, OSError) as exc:
                failures.append(exc)
        if failures:
            raise failures[0]

    def _expire(self, checkpoint: Checkpoint) -> None:
        """Deletes a checkpoint unless it was kept for longer, or saved anew, since it was looked at."""
        path, folder = checkpoint.path, checkpoint.path.folder(self.root)
        with self._lock, contextlib.ExitStack() as stack:
            try:
                # The worker, another process, puts folders in place while it holds this.
                stack.enter_context(alone(folder.parent))
                stack.enter_context(alone(folder, wait=False))
            except FileNotFoundError:
                pass
            except BlockingIOError:
                return  # It is being stored; the next sweep comes.
            now = self._look(path)
            if now is not None and _expired(now):
                self._remove(path)
                logger.info("Expired.", extra={"fields": {"path": str(path)}})

    def _remove(self, path: CheckpointPath) -> None:
        if self.storage is not None:
            self.storage.delete(path)
        self._discard(path)
        self._looked.pop(path, None)

    def _discard(self, path: CheckpointPath) -> None:
        """Removes what is here: gone at once, in one piece; then its bytes."""
        trash = self.root / _TRASH / uuid.uuid4().hex
        trash.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            path.folder(self.root).rename(trash)
        self._local.forget(path)
        shutil.rmtree(trash, ignore_errors=True)

    # ── store and cache ───────────────────────────────────────────────────────────────────────────────────────────

    def _look(self, path: CheckpointPath, *, recent: bool = False) -> Checkpoint | None:
        """What is at a path, whosever it is.

        Raises:
            DataLossError: CHECKPOINT_DAMAGED.
            FailedPreconditionError: STORAGE_FAILED.
        """
        local = self._local.read(path) if self.storage is None else self._local.find(path)
        if self.storage is None or (local is not None and self._copy_of(path) is None):
            return None if local is None else Checkpoint(path, local, self._owner(path.run_id))
        looked_s, outcome = self._looked.get(path, (-_RECENT_S, None))
        if not recent or time.monotonic() - looked_s >= _RECENT_S:
            try:
                stored = self.storage.manifest(path)
                outcome = None if stored is None else Checkpoint(path, stored, self._owner(path.run_id))
            except GradwireError as exc:
                outcome = exc if local is None else Checkpoint(path, local, self._owner(path.run_id))
                fields = {"path": str(path), "copy_here": local is not None, "error": str(exc)}
                logger.warning("The store could not be asked.", extra={"fields": fields})
            self._remember(path, outcome)
        if isinstance(outcome, GradwireError):
            raise outcome
        return outcome

    def _remember(self, path: CheckpointPath, outcome: Checkpoint | GradwireError | None) -> None:
        if len(self._looked) >= _MAX_LOOKED:
            self._looked.clear()
        self._looked[path] = time.monotonic(), outcome

    def _is_base(self, checkpoint: Checkpoint) -> bool:
        """Whether something that has not expired builds on it."""
        return checkpoint.path.kind == SAMPLER_WEIGHTS and str(checkpoint.path) in _bases(self._all())

    def _copy_of(self, path: CheckpointPath) -> str | None:
        """The upload that the local folder is a copy of; None where it is none."""
        try:
            mark = parse_json((path.folder(self.root) / _STORED).read_bytes())
        except (OSError, ValueError):
            return None
        ours = self.storage is not None and isinstance(mark, dict) and mark.get("url") == self.storage.url
        return mark.get(UPLOAD) if ours else None

    def _mark(self, upload: object) -> bytes:
        assert self.storage is not None
        return json.dumps({"url": self.storage.url, UPLOAD: upload}).encode()

    def _is_here(self, found: Checkpoint) -> bool:
        """Whether the local folder has it, or what was saved here since."""
        local = self._local.find(found.path)
        copy = self._copy_of(found.path)
        return local is not None and (copy in (None, found.manifest.about.get(UPLOAD)) or local == found.manifest)

    def _download(self, storage: Storage, found: Checkpoint) -> None:
        aside = self.root / _INCOMING / uuid.uuid4().hex
        aside.mkdir(parents=True)
        try:
            with alone(aside):
                about, size_bytes = found.manifest.about, found.manifest.size_bytes
                whole = aside / "whole" / found.path.name
                with whole_folder(whole, about=about, overwrite=False, needed_bytes=size_bytes) as writer:
                    storage.download(found.path, found.manifest, writer)
                (whole / _STORED).write_bytes(self._mark(about.get(UPLOAD)))
                if found.owner is not None:
                    self.claim(found.path.run_id, found.owner)
                target = found.path.folder(self.root)
                target.parent.mkdir(parents=True, exist_ok=True)
                with alone(target.parent):
                    # A save may have been faster, and what it wrote is newer.
                    if not target.exists() or self._copy_of(found.path) is not None:
                        self._discard(found.path)
                        whole.rename(target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _all(self) -> Iterator[Checkpoint]:
        stored = self.storage.manifests() if self.storage else {}
        local = {
            path: manifest
            for path in self._local.paths()
            if (manifest := self._local.find(path)) is not None and self._copy_of(path) is None
        }
        for path, manifest in {**stored, **local}.items():
            yield Checkpoint(path, manifest, self._owner(path.run_id))

    def _owner(self, run_id: str) -> str | None:
        if self._owners.get(run_id) is None:
            try:
                self._owners[run_id] = read_owner((self.root / run_id / OWNER).read_bytes())
            except OSError:
                self._owners[run_id] = self.storage.owner(run_id) if self.storage else None
        return self._owners[run_id]


def _bases(checkpoints: Iterable[Checkpoint]) -> set[str]:
    """Paths that those of them which have not expired build on."""
    return {checkpoint.base_path for checkpoint in checkpoints if not _expired(checkpoint)}


def _may_see(owner: str | None) -> bool:
    caller = current_caller.get()
    return caller.admin if owner is None else caller.may_see(owner)


def _expired(checkpoint: Checkpoint) -> bool:
    return checkpoint.expires_at is not None and checkpoint.expires_at <= datetime.now(UTC)
