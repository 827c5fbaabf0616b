"""Snapshots of a run: where they are, when one is due, which are kept. What is in them is the worker's business."""

import contextlib
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from trainer_service.config import SnapshotPolicy

KEPT = 2
"""The newest, and the one before in case the newest turns out damaged."""
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Snapshot:
    """A snapshot that was written whole."""

    seq_id: int
    """Last operation it contains; 0 for where a forked run begins."""
    folder: Path


class SnapshotClock:
    """Says when a run's next snapshot is due."""

    def __init__(self, policy: SnapshotPolicy) -> None:
        self._policy = policy
        self._steps = 0
        self._last_s = time.monotonic()
        self._overdue = False

    def operation(self, kind: str) -> bool:
        """An operation was sent to the worker. Whether a snapshot is due right behind it."""
        waited_s = time.monotonic() - self._last_s
        interval_s = self._policy.interval_s
        if kind != "optim_step":
            # After a step there are no gradients and no graphs to keep. Where steps are very far apart, never mind.
            return interval_s > 0 and waited_s >= 3 * interval_s
        if self._overdue:
            return True
        self._steps += 1
        by_steps = 0 < self._policy.every_steps <= self._steps
        return by_steps or (interval_s > 0 and waited_s >= interval_s)

    def taken(self) -> None:
        """One is being taken."""
        self._steps, self._last_s, self._overdue = 0, time.monotonic(), False

    def failed(self) -> None:
        """It was not: tried again behind the next step."""
        self._overdue = True


def snapshot_folder(run_folder: Path, seq_id: int) -> Path:
    """Where the snapshot behind an operation goes."""
    return run_folder / "snapshots" / f"{seq_id:012d}"


def list_snapshots(run_folder: Path) -> list[Snapshot]:
    """Those written whole, newest first. Their digests are checked when they are loaded."""
    found: list[Snapshot] = []
    with contextlib.suppress(FileNotFoundError):
        for folder in (run_folder / "snapshots").iterdir():
            if folder.name.isdigit() and (folder / _MANIFEST).exists():
                found.append(Snapshot(int(folder.name), folder))
    return sorted(found, key=lambda snapshot: snapshot.seq_id, reverse=True)


def prune_snapshots(run_folder: Path, *, verified_seq_id: int, keep_everything: bool) -> int:
    """Deletes what a newer snapshot replaces, and what was never finished.

    Args:
        run_folder: The run's.
        verified_seq_id: Of a snapshot that was just written and read back.
        keep_everything: Keep whole ones, however old.

    Returns:
        seq_id of the oldest one kept.
    """
    whole = [snapshot for snapshot in list_snapshots(run_folder) if snapshot.seq_id <= verified_seq_id]
    kept = whole if keep_everything else whole[:KEPT]
    names = {snapshot.folder.name for snapshot in kept}
    for folder in (run_folder / "snapshots").iterdir():
        # One with a higher number is being written now.
        number = folder.name.lstrip(".").partition(".")[0]
        if folder.name not in names and not (number.isdigit() and int(number) > verified_seq_id):
            shutil.rmtree(folder, ignore_errors=True)
    # With one alone there is nothing to fall back on but what was before it.
    return kept[-1].seq_id if len(kept) >= KEPT else 0
