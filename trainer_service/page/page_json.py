"""What the page shows, as JSON. Numbers that JSON cannot express are null."""

import json
import math
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gradwire._wire.protocol_version import __version__
from gradwire.errors import GradwireError

from trainer_service.access import Caller
from trainer_service.checkpoints.checkpoint import Checkpoint
from trainer_service.fleet.worker import Worker
from trainer_service.processes import held_bytes
from trainer_service.runs.journal_metrics import Measured
from trainer_service.runs.run import Run
from trainer_service.runs.run_metrics import Points
from trainer_service.runs.sequence import Entry
from trainer_service.user_metadata import read_user_metadata

MAX_POINTS = 4000
"""The most points of one curve: more than a screen has columns. Of a longer curve, every n-th point is sent."""
_RATE_WINDOW_S = 30.0
_MAX_DEATHS = 20
_MAX_UNDER_WAY = 64


def encode(found: Any) -> bytes:
    """JSON in ASCII, without line breaks."""
    return json.dumps(found, separators=(",", ":"), allow_nan=False).encode()


@dataclass
class Rates:
    """Steps per second of every run over the last half minute, from periodic observations."""

    _seen: dict[str, deque[tuple[float, int]]] = field(default_factory=dict)

    def look(self, runs: Iterable[Run]) -> None:
        """Observes the runs' steps."""
        now = time.monotonic()
        seen: dict[str, deque[tuple[float, int]]] = {}
        for run in runs:
            points = seen[run.run_id] = self._seen.get(run.run_id, deque())
            points.append((now, run.step))
            while points[0][0] < now - _RATE_WINDOW_S:
                points.popleft()
        self._seen = seen

    def of(self, run_id: str) -> float | None:
        """The rate of one run; None if it was observed only once."""
        points = self._seen.get(run_id, ())
        if len(points) < 2 or points[-1][0] <= points[0][0]:
            return None
        (start_s, first), (end_s, last) = points[0], points[-1]
        return float(f"{max(0, last - first) / (end_s - start_s):.2g}")


def run_version(run: Run, rates: Rates) -> object:
    """Equal as long as the run's view is."""
    placement = run.placement
    return placement.lost, run.step, rates.of(run.run_id), run.unanswered, run.attachment is None, placement.on_worker


def run_view(run: Run, caller: Caller, rates: Rates) -> dict[str, Any]:
    """A run, for a list. Only admins see owners."""
    found: dict[str, Any] = {
        "run_id": run.run_id,
        "name": run.create_request.display_name,
        "state": "lost" if run.lost else "active",
        "step": run.step,
        "rate": rates.of(run.run_id),
        "unanswered": run.unanswered,
        "attached": run.attachment is not None,
        "on_worker": run.placement.on_worker,
        "lora_rank": run.create_request.lora_rank,
        "created_s": run.record.created_s,
        "forked_from": run.record.parent_run_id,
        "metadata": dict(run.create_request.user_metadata),
    }
    if run.placement.lost is not None:
        found["why"] = run.placement.lost.message
    return found | ({"owner": run.owner} if caller.admin else {})


def points_view(run_id: str, points: Points) -> dict[str, Any]:
    """A run's points, thinned out if there are very many; the last one is always included."""
    every = -(-len(points.steps) // MAX_POINTS) or 1

    def thin(values: Sequence[Any]) -> Sequence[Any]:
        return values if every == 1 else values[(len(values) - 1) % every :: every]

    return {
        "run_id": run_id,
        "every": every,
        "seq_ids": thin(points.seq_ids),
        "steps": thin(points.steps),
        "times_s": thin(points.times_s),
        "series": {name: [_number(value) for value in thin(values)] for name, values in points.series.items()},
        "names_left_out": points.names_left_out,
    }


def operations_view(run: Run, recent: list[Measured], *, executing: Entry | None) -> dict[str, Any]:
    """A run's operations: those under way, and how long each part of the last ones took. `executing` is the one that
    the worker executes, of whichever run."""
    now = time.perf_counter()
    return {
        "run_id": run.run_id,
        "under_way": [
            {
                "seq_id": entry.seq_id,
                "kind": entry.kind,
                "waited_ms": round((now - entry.received_s) * 1000),
                "executing": entry is executing,
            }
            for entry in run.under_way[:_MAX_UNDER_WAY]
        ],
        "recent": [
            {
                "seq_id": row.seq_id,
                "kind": row.kind,
                "received_s": row.received_s,
                "reason": row.reason,
                "step": row.step,
                **{part: _number(row.metrics.get(f"{part}_ms:sum", math.nan)) for part in _PARTS},
            }
            for row in reversed(recent)
        ],
    }


_PARTS = ("queue", "execute", "transfer")


def checkpoint_view(found: Checkpoint, caller: Caller) -> dict[str, Any]:
    """A checkpoint, for a list."""
    about, expires_at = found.manifest.about, found.expires_at
    return {
        "path": str(found.path),
        "run_id": found.path.run_id,
        "kind": found.path.kind,
        "name": found.path.name,
        "step": about.get("step"),
        "size_bytes": sum(file.size_bytes for file in found.manifest.files.values()),
        "created_s": found.created_at.timestamp(),
        "expires_s": None if expires_at is None else expires_at.timestamp(),
        "delta": bool(found.base_path),
        "metadata": dict(read_user_metadata(about.get("user_metadata"))),
    } | ({"owner": found.owner or ""} if caller.admin else {})


class Health:
    """State of worker and trainer, and why the worker was restarted.

    Args:
        worker: The worker.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._deaths: deque[dict[str, Any]] = deque(maxlen=_MAX_DEATHS)
        self._started_s = time.time()
        worker.on_death(self._died)

    def _died(self, reason: GradwireError) -> None:
        self._deaths.appendleft({"time_s": time.time(), "why": reason.message})

    def view(self, caller: Caller, **more: Any) -> dict[str, Any]:
        """State for the page. Why a worker died may reveal something about the host, so only admins see it."""
        worker, ready = self._worker, self._worker.ready
        model = ready.model if ready is not None else None
        deaths = [death if caller.admin else {**death, "why": ""} for death in self._deaths]
        return {
            "ready": ready is not None and worker.responding,
            "responding": worker.responding,
            "status": worker.status_message if caller.admin or ready is not None else "The worker is not ready.",
            "version": __version__,
            "started_s": self._started_s,
            "memory_bytes": held_bytes() >> 20 << 20,
            "model": None
            if model is None
            else {
                "base_model": model.base_model.rpartition("/")[2] or model.base_model,
                "architecture": model.architecture,
                "device": model.device,
                "dtype": model.dtype,
                "num_parameters": model.num_parameters,
                "max_context_length": model.max_context_length,
                "batching": model.batching,
                "sampling": model.sampling,
            },
            "counters": {
                name: float(f"{value:.6g}") for name, value in worker.counters.items() if math.isfinite(value)
            },
            "deaths": deaths,
            **more,
        }


def _number(value: float) -> float | None:
    return float(f"{value:.7g}") if math.isfinite(value) else None
