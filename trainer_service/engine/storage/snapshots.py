"""Snapshots: a run's state copied between two operations and written while the next ones execute."""

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gradwire.errors import GradwireError, error

from trainer_service.engine.run_state import RunState
from trainer_service.engine.storage.state_files import State, capture, open_state, write_state
from trainer_service.folders import refuse_without_room

logger = logging.getLogger(__name__)

Written = Callable[[GradwireError | None], object]
"""Gets None once a snapshot is written and was read back, or why there is none."""


@dataclass(frozen=True)
class _Job:
    state: State
    folder: Path
    run_id: str
    written: Written


class SnapshotWriter:
    """Writes snapshots one after the other on a thread of its own, which starts with the first."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def take(self, run: RunState, folder: Path, written: Written) -> None:
        """Copies the run's state, with gradients accumulated, and returns; the rest goes on by itself.

        Args:
            run: Between two operations.
            folder: Where the snapshot goes; replaced if it is there.
            written: Called on the writing thread.

        Raises:
            OperationCancelledError: CANCELLED: the run holds graphs, which no snapshot can.
            FailedPreconditionError: STORAGE_FAILED: the disk has no room for it; nothing was copied.
        """
        if run.graphs:
            text = f"No snapshot was taken of {run.run_id}: {len(run.graphs)} custom losses are under way."
            raise error("CANCELLED", text)
        state = capture(run, gradients=True)
        refuse_without_room(folder, state.size_bytes)
        job = _Job(state.copied(), folder, run.run_id, written)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="snapshots", daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                write_state(job.state, job.folder, about={"run_id": job.run_id, "kind": "snapshot"}, overwrite=True)
                # Read back now, since what it makes superfluous is deleted next.
                open_state(job.folder)
            except GradwireError as exc:
                job.written(exc)
            except Exception as exc:
                logger.exception("Writing a snapshot failed.")
                text = f"The snapshot could not be written: {type(exc).__name__}: {exc}"
                job.written(error("STORAGE_FAILED", text))
            else:
                job.written(None)
            # Not until the next one comes: it is as large as the run.
            del job


def restore_snapshot(run: RunState, folder: Path) -> None:
    """Makes a run what it was when the snapshot was taken.

    Raises:
        GradwireError: The snapshot is damaged, or of another model.
    """
    open_state(folder).restore(run, optimizer=True, gradients=True)


def repeat_failure(run: RunState, *, seq_id: int, kind: str, reason: str, forward_seq_id: int) -> None:
    """Does to a run what an operation's failure did, or would have done.

    Args:
        run: It.
        seq_id: Of the operation.
        kind: Its kind.
        reason: What it failed with.
        forward_seq_id: Of a backward: whose graph it named.
    """
    if kind in ("forward_backward", "backward", "cancel"):
        run.taint(seq_id)
    if kind == "backward" and reason not in ("NO_HELD_GRAPH", "INVALID_FIELD", "LIMIT_EXCEEDED", "STORAGE_FAILED"):
        run.drop_graphs("was used by an earlier backward; one forward serves one backward", [forward_seq_id])
    if kind == "optim_step" and reason in ("PRIOR_OPERATION_FAILED", "NON_FINITE"):
        run.clear_gradients()
