"""Manifests of the checkpoints in the local folder."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from gradwire.errors import DataLossError, GradwireError

from trainer_service.atomic_folders import MANIFEST, MAX_MANIFEST_BYTES, Manifest
from trainer_service.checkpoints import manifests
from trainer_service.paths import SAMPLER_WEIGHTS, STATE, CheckpointPath

logger = logging.getLogger(__name__)


class LocalManifests:
    """Manifests below a folder; each is read again only if it changed.

    Args:
        root: The folder; checkpoints are at `<run_id>/<kind>/<name>`.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[Path, tuple[object, Manifest | DataLossError]] = {}

    def paths(self) -> Iterator[CheckpointPath]:
        """All checkpoints, except those being written, whose names begin with a dot."""
        for kind in (STATE, SAMPLER_WEIGHTS):
            for file in self._root.glob(f"*/{kind}/*/{MANIFEST}"):
                run_id, _, name, _ = file.relative_to(self._root).parts
                with contextlib.suppress(GradwireError):
                    yield CheckpointPath.parse(str(CheckpointPath(run_id, kind, name)))

    def find(self, path: CheckpointPath) -> Manifest | None:
        """The manifest of the checkpoint at a path; None if there is none, or it is damaged."""
        with contextlib.suppress(DataLossError):
            return self.read(path)
        return None

    def read(self, path: CheckpointPath) -> Manifest | None:
        """The manifest of the checkpoint at a path; None if there is none.

        Raises:
            DataLossError: CHECKPOINT_DAMAGED.
        """
        file = path.folder(self._root) / MANIFEST
        try:
            stat = file.stat()
            stamp = stat.st_mtime_ns, stat.st_size, stat.st_ino
            known = self._known.get(file)
            if known is None or known[0] != stamp:
                known = self._known[file] = stamp, _read(path, file)
        except (FileNotFoundError, NotADirectoryError):
            self.forget(path)
            return None
        except OSError as exc:
            logger.warning("A manifest cannot be read.", extra={"fields": {"file": str(file), "error": str(exc)}})
            return None
        if isinstance(known[1], DataLossError):
            raise known[1]
        return known[1]

    def forget(self, path: CheckpointPath) -> None:
        """Forgets the manifest of a checkpoint that was removed."""
        self._known.pop(path.folder(self._root) / MANIFEST, None)


def _read(path: CheckpointPath, file: Path) -> Manifest | DataLossError:
    try:
        with file.open("rb") as opened:
            return manifests.read(path, opened.read(MAX_MANIFEST_BYTES + 1))
    except DataLossError as exc:
        # Logged once: it is read again only when it changes.
        logger.warning("A manifest is damaged.", extra={"fields": {"file": str(file), "error": str(exc)}})
        return exc
