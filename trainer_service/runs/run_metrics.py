"""A run's curves: one point per optimizer step, from what its journal says of every operation.

Journals are read on a thread, in chunks, each of them once; the points of the runs viewed last are kept in memory. A
chunk is some hundred rows of a few hundred bytes: requests and answers, which may be large, are not read.
"""

import asyncio
import bisect
import contextlib
import math
import sqlite3
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gradwire._wire.metrics import combine_metrics
from gradwire.errors import error
from gradwire.v1.operation_pb2 import OptimStepRequest
from gradwire.v1.trainer_service_pb2 import TrainRequest

from trainer_service.runs import journal, journal_metrics
from trainer_service.runs.journal_metrics import Measured
from trainer_service.runs.run import Run

MAX_NAMES = 256
"""Distinct metrics of one run; a custom loss may invent new names at every step."""
MAX_VALUES = 2_000_000
"""Values in one answer: 16 MB."""
_ROWS = 500
"""Rows in a chunk."""
_MAX_READERS = 2
"""Journals read at once: others need the threads too."""
_MAX_RUNS = 32
"""Runs whose points are kept in memory, those viewed last: 100,000 steps of 20 metrics take 16 MB."""
_RECENT = 60
"""Latest operations of a run that are kept individually."""
_DEFAULT_LEARNING_RATE = 1e-4
_TRAINING = ("forward", "forward_backward", "backward", "optim_step")
_CLEARING = ("zero_grad", "load_state")
EVALUATION = "forward/"
"""Prefix for the metrics of a forward with a loss."""


@dataclass(frozen=True)
class Points:
    """Some of a run's points; each list has one value per point."""

    seq_ids: list[int]
    steps: list[int]
    times_s: list[float]
    series: dict[str, list[float]]
    """By metric; NaN where a point lacks it."""
    more: bool
    """Whether more points follow."""
    names_left_out: int
    recent: list[Measured]
    """The run's last operations that were answered, in order."""


@dataclass
class RunCurves:
    """The points of one run, as far as its journal was read. For one thread at a time, see `lock`."""

    folder: Path
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    seq_ids: "array[int]" = field(default_factory=lambda: array("Q"))
    steps: "array[int]" = field(default_factory=lambda: array("Q"))
    times_s: "array[float]" = field(default_factory=lambda: array("d"))
    series: "dict[str, array[float]]" = field(default_factory=dict)
    names_left_out: set[str] = field(default_factory=set)
    recent: deque[Measured] = field(default_factory=lambda: deque(maxlen=_RECENT))
    _read_seq_id: int = 0
    _since_step: list[Measured] = field(default_factory=list)
    """Operations that count towards the next optim_step's point."""

    def read_on(self) -> None:
        """Reads what was answered since the last call.

        Raises:
            OSError, sqlite3.Error: The journal cannot be read.
        """
        with contextlib.closing(journal.connect(self.folder)) as db:
            while rows := journal_metrics.read(db, self._read_seq_id, limit=_ROWS):
                for row in rows:
                    self._add(row)
                self._read_seq_id = rows[-1].seq_id

    def select(self, names: Iterable[str], *, since_step: int, after_seq_id: int) -> Points:
        """The requested points; the first of them if there are too many."""
        wanted = set(names)
        series = {name: values for name, values in self.series.items() if not wanted or name in wanted}
        most = MAX_VALUES // (3 + len(series))
        # Bisected: a page asks every second for what follows the last of a hundred thousand points.
        first = bisect.bisect_right(self.seq_ids, after_seq_id)
        places: Sequence[int] = range(first, len(self.seq_ids))
        if since_step:
            places = [place for place in places if self.steps[place] >= since_step]
        more, places = len(places) > most, places[:most]
        return Points(
            seq_ids=[self.seq_ids[place] for place in places],
            steps=[self.steps[place] for place in places],
            times_s=[self.times_s[place] for place in places],
            series={name: [values[place] for place in places] for name, values in series.items()},
            more=more,
            names_left_out=len(self.names_left_out),
            recent=list(self.recent),
        )

    def _add(self, row: Measured) -> None:
        self.recent.append(row)
        if row.kind == "optim_step" and not row.reason:
            self._add_point(row, self._since_step)
        if row.kind in (*_CLEARING, "optim_step"):
            # A refused step cleared the gradients too, so the passes before it no longer count.
            if not row.reason or row.kind == "optim_step":
                self._since_step = []
        elif row.kind in _TRAINING and not row.reason:
            self._since_step.append(row)

    def _add_point(self, step: Measured, passes: list[Measured]) -> None:
        trained = [row.metrics for row in passes if not _evaluates(row)]
        evaluated = [row.metrics for row in passes if _evaluates(row)]
        # The step reports the same tokens again, as its divisor.
        counted_again = ("num_loss_tokens:sum", "num_sequences:sum")
        own = {name: value for name, value in step.metrics.items() if not trained or name not in counted_again}
        values = {
            **_combined(evaluated, prefix=EVALUATION),
            **_combined([*trained, own]),
            "learning_rate": _learning_rate(step.optim_step),
        }
        self.seq_ids.append(step.seq_id)
        self.steps.append(step.step)
        self.times_s.append(step.received_s)
        for name, value in values.items():
            if name not in self.series:
                if len(self.series) >= MAX_NAMES:
                    if len(self.names_left_out) < MAX_NAMES:
                        self.names_left_out.add(name)
                    continue
                self.series[name] = array("d", [math.nan]) * (len(self.seq_ids) - 1)
            self.series[name].append(value)
        for values_so_far in self.series.values():
            if len(values_so_far) < len(self.seq_ids):
                values_so_far.append(math.nan)


class RunMetrics:
    """The curves of all runs."""

    def __init__(self) -> None:
        self._curves: OrderedDict[str, RunCurves] = OrderedDict()
        self._reading = asyncio.Semaphore(_MAX_READERS)

    async def points(
        self, run: Run, *, names: Iterable[str] = (), since_step: int = 0, after_seq_id: int = 0
    ) -> Points:
        """A run's points, up to its last answered operation.

        Args:
            run: One that the caller may see.
            names: Only these metrics; empty means all.
            since_step: Only points of this optimizer step and later ones.
            after_seq_id: Only points after this operation.

        Raises:
            GradwireError: STORAGE_FAILED: the journal cannot be read.
        """
        curves = self._curves.setdefault(run.run_id, RunCurves(run.folder))
        self._curves.move_to_end(run.run_id)
        while len(self._curves) > _MAX_RUNS:
            self._curves.popitem(last=False)
        names = list(names)

        def read() -> Points:
            curves.read_on()
            return curves.select(names, since_step=since_step, after_seq_id=after_seq_id)

        async def alone() -> Points:
            async with curves.lock, self._reading:
                return await asyncio.to_thread(read)

        try:
            # Shielded: if the caller leaves, nobody else may start reading before the thread is done.
            return await asyncio.shield(asyncio.create_task(alone()))
        except (OSError, sqlite3.Error) as exc:
            self._curves.pop(run.run_id, None)
            text = f"The journal of {run.run_id} cannot be read: {exc}."
            raise error("STORAGE_FAILED", text, run_id=run.run_id) from exc


def _evaluates(row: Measured) -> bool:
    """Whether it is a forward with a loss, which evaluates and does not train."""
    return row.kind == "forward" and "loss:sum" in row.metrics


def _combined(parts: Sequence[Mapping[str, float]], *, prefix: str = "") -> dict[str, float]:
    """As combine_metrics, but names without a reduction, which come from a custom loss, are averaged."""
    found = combine_metrics(parts)
    for name in found:
        if ":" not in name:
            values = [part[name] for part in parts if name in part]
            found[name] = sum(values) / len(values)
    return {prefix + name: value for name, value in found.items()}


def _learning_rate(encoded: bytes) -> float:
    settings: OptimStepRequest = TrainRequest.FromString(encoded).optim_step
    return settings.learning_rate if settings.HasField("learning_rate") else _DEFAULT_LEARNING_RATE
