"""Which checkpoints there are, whose they are, and until when.

Everything is on disk: a restarted trainer sees what the one before saw. Blocking: for threads, except `find` without a
store, which reads one small file.
"""

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from gradwire.errors import DataLossError, GradwireError, error

from trainer_service.atomic_folders import MANIFEST, Manifest, alone, damaged
from trainer_service.checkpoints.checkpoint import Checkpoint, bases, may_see
from trainer_service.checkpoints.files import check_range, pieces
from trainer_service.checkpoints.local_folder import LocalFolder
from trainer_service.checkpoints.object_store import Storage
from trainer_service.paths import SAMPLER_WEIGHTS, CheckpointPath

logger = logging.getLogger(__name__)

_RECENT_S = 5.0
"""How long an answer of the store counts as recent, for callers that ask often or cannot wait."""
_MAX_LOOKED = 1024


class Catalog:
    """The checkpoints of a trainer.

    If there is a store, it decides what there is and until when; the local folder is a cache, except for what was saved
    here and is not stored yet. Copies in the cache can be used while the store cannot be reached.

    Args:
        root: The local folder; see LocalFolder.
        storage: Keeps them beyond this machine; None keeps them only here.
    """

    def __init__(self, root: Path, storage: Storage | None = None) -> None:
        self.storage = storage
        self.root = root
        self._lock = threading.RLock()
        self._local = LocalFolder(root, storage)
        self._looked: dict[CheckpointPath, tuple[float, Checkpoint | GradwireError | None]] = {}

    # ── finding ───────────────────────────────────────────────────────────────────────────────────────────────────

    def list(self, *, run_id: str = "", kind: str = "") -> list[Checkpoint]:
        """The checkpoints that the current caller may see, newest first; of one run and kind, if given.

        Raises:
            FailedPreconditionError: STORAGE_FAILED: the store cannot be read.
        """
        everything = list(self._all())
        kept = bases(everything)
        found = [
            checkpoint
            for checkpoint in everything
            if (not run_id or checkpoint.path.run_id == run_id)
            and (not kind or checkpoint.path.kind == kind)
            and may_see(checkpoint.owner)
            and (not checkpoint.expired or str(checkpoint.path) in kept)
        ]
        return sorted(found, key=lambda checkpoint: (checkpoint.created_at, checkpoint.path), reverse=True)

    def find(self, path: str, *, field: str = "path", recent: bool = False) -> Checkpoint:
        """The checkpoint at a path, for the current caller.

        Args:
            path: Such as "gradwire://<run_id>/state/<name>".
            field: The caller's name for the path, for errors.
            recent: Accept what the store said some seconds ago rather than ask it.

        Raises:
            InvalidArgumentError: INVALID_FIELD: it is not such a path.
            NotFoundError: CHECKPOINT_NOT_FOUND, whether there is none, it has expired, or it is somebody else's.
            DataLossError: CHECKPOINT_DAMAGED: its manifest is damaged; it can only be deleted.
            FailedPreconditionError: STORAGE_FAILED: the store cannot be read, and there is no copy here.
        """
        parsed = CheckpointPath.parse(path, field=field)
        try:
            found = self._look(parsed, recent=recent)
        except DataLossError:
            if may_see(self._local.owner(parsed.run_id)):
                raise
            found = None
        if found is not None and may_see(found.owner) and (not found.expired or self._is_base(found)):
            return found
        raise error(
            "CHECKPOINT_NOT_FOUND",
            f"There is no checkpoint {path}; ListCheckpoints, or `gradwire checkpoints list`, lists yours.",
            path=path,
        )

    # ── what runs do ──────────────────────────────────────────────────────────────────────────────────────────────

    def claim(self, run_id: str, owner: str) -> None:
        """Records the owner of a run's checkpoints, before it saves one."""
        self._local.claim(run_id, owner)

    def make_way(self, path: str) -> None:
        """Removes a checkpoint that has expired and was not swept yet, to free its name.

        Raises:
            As sweep.
        """
        found = self._look(CheckpointPath.parse(path))
        if found is not None and found.expired and not self._is_base(found):
            self._expire(found)

    def store(self, path: str) -> None:
        """Uploads a checkpoint that the worker saved, if there is a store and it is not there already.

        Raises:
            FailedPreconditionError: STORAGE_FAILED: the checkpoint stays here, and `sweep` tries again.
        """
        parsed = CheckpointPath.parse(path)
        if self.storage is None or not parsed.folder(self.root).is_dir():
            return
        if self._local.upload(parsed, self.storage):
            self._looked.pop(parsed, None)

    def fetch(self, found: Checkpoint) -> None:
        """Downloads a checkpoint for the worker, with the base it builds on, unless it is here already.

        Raises:
            As find; DataLossError: CHECKPOINT_DAMAGED; FailedPreconditionError: STORAGE_FAILED, also for a full disk.
        """
        if self.storage is None:
            return
        try:
            if found.base_path:
                base = self.find(found.base_path)
                if base.base_path:
                    raise damaged(found.path.name, MANIFEST, f"names a delta as its base: {base.path}")
                self.fetch(base)
            if not self._local.holds(found):
                self._local.download(found, self.storage)
        except (GradwireError, OSError) as exc:
            text = f"{found.path} could not be fetched from {self.storage.url} to {self.root}: {exc}"
            failed = exc if isinstance(exc, GradwireError) else error("STORAGE_FAILED", text, path=str(found.path))
            # So that whoever looks it up next gets this error, rather than that it is not here.
            self._remember(found.path, failed)
            raise failed from exc

    # ── what callers do ───────────────────────────────────────────────────────────────────────────────────────────

    def set_ttl(self, path: str, ttl_seconds: int | None) -> Checkpoint:
        """Keeps a checkpoint for so long from now; None for ever.

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
            self._local.change_manifest(found.path, changed)
            self._looked.pop(found.path, None)
            return Checkpoint(found.path, changed(found.manifest), found.owner)

    def delete(self, path: str) -> None:
        """Deletes a checkpoint for good.

        Raises:
            As find; FailedPreconditionError: CHECKPOINT_IN_USE: deltas build on it; STORAGE_FAILED: nothing changed.
        """
        parsed = CheckpointPath.parse(path)
        with contextlib.suppress(DataLossError):
            # A damaged checkpoint can be deleted by those who may see it.
            self.find(path)
        with contextlib.ExitStack() as stack:
            # Not during an upload, which would bring it back.
            with contextlib.suppress(FileNotFoundError):
                stack.enter_context(alone(parsed.folder(self.root)))
            stack.enter_context(self._lock)
            if deltas := [other for other in self._all() if other.base_path == path and not other.expired]:
                raise error(
                    "CHECKPOINT_IN_USE",
                    f"{path} is the base of {len(deltas)} deltas, such as {deltas[0].path}; delete them first.",
                    path=path,
                    delta=deltas[0].path,
                )
            self._remove(parsed)

    def open(self, found: Checkpoint, name: str, *, offset: int = 0, sha256: str = "") -> Generator[bytes]:
        """A file's bytes from an offset on, in pieces of some MiB.

        Raises:
            InvalidArgumentError: INVALID_FIELD: no such file, or an offset beyond its end.
            AbortedError: CHECKPOINT_CHANGED: the file has another digest.
            DataLossError: CHECKPOINT_DAMAGED: the file is missing.
        """
        if not self._local.holds(found):
            # It may have been replaced in the store since it was found.
            found = self._look(found.path) or found
        handle, manifest = None, found.manifest
        if self._local.holds(found):
            with contextlib.suppress(FileNotFoundError):
                handle, manifest = self._local.open(found.path, name)
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
            FailedPreconditionError: STORAGE_FAILED: the first failure; everything else is done all the same.
        """
        everything = list(self._all())
        kept = bases(everything)
        expired = [one for one in everything if one.expired and str(one.path) not in kept]
        work: list[Callable[[], object]] = [functools.partial(self._expire, one) for one in expired]
        if self.storage is not None:
            work += [functools.partial(self.store, str(path)) for path in self._local.paths()]
        failures: list[Exception] = []
        for each in work:
            # One failure must not keep the others from being deleted or stored.
            try:
                each()
            except (GradwireError, OSError) as exc:
                failures.append(exc)
        if failures:
            raise failures[0]

    def _expire(self, checkpoint: Checkpoint) -> None:
        """Deletes a checkpoint, unless its expiry was extended or it was saved anew meanwhile."""
        path, folder = checkpoint.path, checkpoint.path.folder(self.root)
        with self._lock, contextlib.ExitStack() as stack:
            try:
                # The worker, another process, moves folders into place while it holds this lock.
                stack.enter_context(alone(folder.parent))
                stack.enter_context(alone(folder, wait=False))
            except FileNotFoundError:
                pass
            except BlockingIOError:
                return  # It is being stored; the next sweep deletes it.
            now = self._look(path)
            if now is not None and now.expired:
                self._remove(path)
                logger.info("Deleted an expired checkpoint.", extra={"fields": {"path": str(path)}})

    def _remove(self, path: CheckpointPath) -> None:
        if self.storage is not None:
            self.storage.delete(path)
        self._local.discard(path)
        self._looked.pop(path, None)

    # ── store and cache ───────────────────────────────────────────────────────────────────────────────────────────

    def _look(self, path: CheckpointPath, *, recent: bool = False) -> Checkpoint | None:
        """What is at a path, whoever owns it.

        Raises:
            DataLossError: CHECKPOINT_DAMAGED.
            FailedPreconditionError: STORAGE_FAILED.
        """
        local = self._local.read(path) if self.storage is None else self._local.find(path)
        if self.storage is None or (local is not None and not self._local.is_copy(path)):
            return None if local is None else Checkpoint(path, local, self._local.owner(path.run_id))
        looked_s, outcome = self._looked.get(path, (-_RECENT_S, None))
        if not recent or time.monotonic() - looked_s >= _RECENT_S:
            try:
                stored = self.storage.manifest(path)
                outcome = None if stored is None else Checkpoint(path, stored, self._local.owner(path.run_id))
            except GradwireError as exc:
                outcome = exc if local is None else Checkpoint(path, local, self._local.owner(path.run_id))
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
        return checkpoint.path.kind == SAMPLER_WEIGHTS and str(checkpoint.path) in bases(self._all())

    def _all(self) -> Iterator[Checkpoint]:
        stored = self.storage.manifests() if self.storage else {}
        for path, manifest in {**stored, **self._local.not_stored()}.items():
            yield Checkpoint(path, manifest, self._local.owner(path.run_id))
