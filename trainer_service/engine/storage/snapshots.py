"""Snapshots: a run's state copied between two operations and written while the next ones execute."""

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gradwire.errors import GradwireError, error

from trainer_service.atomic_folders import refuse_without_room
from trainer_service.engine.rank_channels import Channel, Ranks
from trainer_service.engine.run_state import RunState
from trainer_service.engine.storage.state_files import State, capture, open_state, write_state

logger = logging.getLogger(__name__)

Written = Callable[[GradwireError | None], object]
"""Called with None once a snapshot is written and read back, or with the reason why there is none."""


@dataclass(frozen=True)
class _UnwrittenSnapshot:
    state: State
    folder: Path
    run_id: str
    written: Written


class SnapshotWriter:
    """Writes snapshots one at a time, on a thread that starts with the first.


    Args:
        ranks: Which write each snapshot together.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._unwritten: queue.SimpleQueue[_UnwrittenSnapshot] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def take(self, run: RunState, folder: Path, written: Written) -> None:
        """Copies the run's state, accumulated gradients included, and returns; the rest happens in the background.

        Args:
            run: Between two operations.
            folder: Where the snapshot goes; replaced if it is there.
            written: Called on the writing thread.

        Raises:
            OperationCancelledError: CANCELLED: the run holds graphs, which a snapshot cannot hold.
            FailedPreconditionError: STORAGE_FAILED: the disk has no room for it; nothing was copied.
        """
        if run.graphs:
            text = f"No snapshot was taken of {run.run_id}: {len(run.graphs)} custom losses are under way."
            raise error("CANCELLED", text)
        channel = self._ranks.execution
        state = capture(run, gradients=True, channel=channel)
        needed_bytes = sum(channel.gather(state.size_bytes))
        channel.alike(lambda: refuse_without_room(folder, needed_bytes))
        snapshot = _UnwrittenSnapshot(state.copied(), folder, run.run_id, written)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="snapshots", daemon=True)
            self._thread.start()
        self._unwritten.put(snapshot)

    def _run(self) -> None:
        while True:
            snapshot = self._unwritten.get()
            try:
                write_state(
                    snapshot.state,
                    snapshot.folder,
                    about={"run_id": snapshot.run_id, "kind": "snapshot"},
                    channel=self._ranks.files,
                    overwrite=True,
                )
                # Read back now, since the snapshots it replaces are deleted next.
                open_state(snapshot.folder, self._ranks.files)
            except GradwireError as exc:
                snapshot.written(exc)
            except Exception as exc:
                logger.exception("Writing a snapshot failed.")
                text = f"The snapshot could not be written: {type(exc).__name__}: {exc}"
                snapshot.written(error("STORAGE_FAILED", text))
            else:
                snapshot.written(None)
            # It is as large as the run, and would otherwise stay in memory until the next one.
            del snapshot


def restore_snapshot(run: RunState, folder: Path, channel: Channel) -> None:
    """Restores a run to its state when the snapshot was taken. Every rank calls this.

    Raises:
        GradwireError: The snapshot is damaged, or of another model.
    """
    open_state(folder, channel).restore(run, optimizer=True, gradients=True)


def repeat_failure(run: RunState, *, seq_id: int, kind: str, reason: str, forward_seq_id: int) -> None:
    """Repeats the effect that an operation's failure had on a run, or would have had.

    Args:
        run: The run of the operation.
        seq_id: The operation that failed.
        kind: What kind of operation it is, such as "backward".
        reason: The reason of its error.
        forward_seq_id: For a backward: the forward whose graph it named.
    """
    if kind in ("forward_backward", "backward", "cancel"):
        run.taint(seq_id)
    if kind == "backward" and reason not in ("NO_HELD_GRAPH", "INVALID_FIELD", "LIMIT_EXCEEDED", "STORAGE_FAILED"):
        run.drop_graphs("was used by an earlier backward; one forward serves one backward", [forward_seq_id])
    if kind == "optim_step" and reason in ("PRIOR_OPERATION_FAILED", "NON_FINITE"):
        run.clear_gradients()
