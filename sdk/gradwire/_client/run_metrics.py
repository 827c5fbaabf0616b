"""A run's curves: what its operations measured, step by step, as the trainer's journal has it."""

import csv
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

from gradwire._client.transport import Connection
from gradwire.v1.run_metrics_pb2 import GetMetricsRequest, GetMetricsResponse
from gradwire.v1.trainer_service_pb2_grpc import TrainerServiceStub

METRICS_OF_INTEREST = ("loss:sum", "num_loss_tokens:sum", "grad_norm:mean", "learning_rate", "execute_ms:sum")
"""What a person wants to see first, of any run."""


@dataclass(frozen=True, eq=False)
class RunMetrics:
    """One point an optimizer step, N in all, in the order they were taken.

    `metrics["loss:sum"]` is float64 [N], NaN where a step does not have it. A run that loaded a state may come to a
    step again: the points behind are those that count.
    """

    run_id: str
    """The run."""
    step: npt.NDArray[np.int64]
    """[N], optimizer steps applied."""
    time_s: npt.NDArray[np.float64]
    """[N], when the trainer received each optim_step, seconds since 1970."""
    seq_id: npt.NDArray[np.int64]
    """[N], of each optim_step."""
    values: Mapping[str, npt.NDArray[np.float64]]
    """By metric, float64 [N]."""

    def __getitem__(self, name: str) -> npt.NDArray[np.float64]:
        if name not in self.values:
            raise KeyError(f"{self.run_id} has no metric {name!r}; it has {', '.join(sorted(self.values)) or 'none'}.")
        return self.values[name]

    def __len__(self) -> int:
        return len(self.step)

    def rows(self) -> Iterator[dict[str, float]]:
        """Each point as a dict: step, seq_id, time_s, and the metrics it has."""
        for place in range(len(self)):
            row: dict[str, float] = {"step": int(self.step[place]), "seq_id": int(self.seq_id[place])}
            row["time_s"] = float(self.time_s[place])
            found = ((name, float(values[place])) for name, values in self.values.items())
            yield row | {name: value for name, value in found if not math.isnan(value)}


def fetch_metrics(
    connection: Connection, run_id: str, names: Iterable[str] = (), *, since_step: int = 0, timeout_s: float
) -> RunMetrics:
    """A run's metrics, see ServiceClient.metrics."""
    answers: list[GetMetricsResponse] = []
    request = GetMetricsRequest(run_id=run_id, names=list(names), since_step=since_step)
    while not answers or answers[-1].more:
        if answers:
            request.after_seq_id = answers[-1].seq_ids[-1]
        answers.append(connection.call(TrainerServiceStub, "GetMetrics", request, timeout_s=timeout_s))
    found = [{series.name: series.values for series in answer.series} for answer in answers]
    all_names = dict.fromkeys(name for series in found for name in series)
    missing = [np.full(len(answer.seq_ids), np.nan) for answer in answers]
    return RunMetrics(
        run_id=run_id,
        step=_joined([answer.steps for answer in answers], np.int64),
        time_s=_joined([answer.times_s for answer in answers], np.float64),
        seq_id=_joined([answer.seq_ids for answer in answers], np.int64),
        values={
            name: _joined([series.get(name, none) for series, none in zip(found, missing, strict=True)], np.float64)
            for name in sorted(all_names)
        },
    )


def write_csv(metrics: RunMetrics, out: TextIO) -> None:
    """A line a point under a line of names; what a point does not have is empty. Names that a spreadsheet would take
    for a formula get a ' before them."""
    writer = csv.writer(out, lineterminator="\n")
    names = list(metrics.values)
    writer.writerow(["step", "seq_id", "time_s", *map(_no_formula, names)])
    for row in metrics.rows():
        writer.writerow([row["step"], row["seq_id"], f"{row['time_s']:.3f}", *(row.get(name, "") for name in names)])


def _no_formula(name: str) -> str:
    return f"'{name}" if name.startswith(("=", "+", "-", "@", "\t", "\r")) else name


def _joined(parts: list[Any], dtype: Any) -> npt.NDArray[Any]:
    return np.concatenate([np.asarray(part, dtype=dtype) for part in parts])
