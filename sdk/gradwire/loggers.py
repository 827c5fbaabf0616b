"""Takes a loop's metrics to where people look at them: TensorBoard, Weights & Biases, MLflow, a CSV file, the terminal.

    with gradwire.loggers.TensorBoardLogger("runs/first") as log:
        for batch in batches:
            output = client.forward_backward(batch)
            step = client.optim_step(gradwire.AdamParams(learning_rate=1e-4)).result()
            log(output.result().metrics | step.metrics, step=step.step)

`log_run(service.metrics(run_id), log)` takes what a trainer's journal has of a run, whole from its first step. A logger
of your own is a subclass of Logger with a `write`.

Each package is imported only when its logger is made: `pip install 'gradwire[tensorboard]'`, `gradwire[wandb]` or
`gradwire[mlflow]`; CSV and terminal need none.
"""

import abc
import csv
import importlib
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from gradwire._client.run_metrics import METRICS_OF_INTEREST, RunMetrics
from gradwire._client.terminal import say
from gradwire._wire.untrusted import printable

__all__ = [
    "CsvLogger",
    "Logger",
    "MlflowLogger",
    "TensorBoardLogger",
    "TerminalLogger",
    "WandbLogger",
    "log_run",
]


class Logger(abc.ABC):
    """Takes metrics by step. Call it once a step, and close it, or use it as a context manager."""

    def __call__(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Logs one step's metrics.

        Args:
            metrics: Numbers by name, such as an output's `.metrics`.
            step: Optimizer steps applied.

        Raises:
            TypeError: A metric is no number.
        """
        self.write({name: _number(name, value) for name, value in metrics.items()}, step)

    @abc.abstractmethod
    def write(self, metrics: dict[str, float], step: int) -> None:
        """Takes one step's metrics to where they go."""

    def close(self) -> None:  # noqa: B027  (one that keeps nothing has nothing to close)
        """Writes what is left to write; nothing is logged behind it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def log_run(metrics: RunMetrics, logger: Logger) -> None:
    """Logs all of a run's points, as ServiceClient.metrics answers them."""
    for row in metrics.rows():
        step = int(row.pop("step"))
        del row["seq_id"], row["time_s"]
        logger(row, step=step)


class TensorBoardLogger(Logger):
    """Writes an event file for TensorBoard (`tensorboard --logdir folder`).

    Args:
        folder: Where to; made if it is not there.

    Raises:
        ImportError: tensorboardX is not installed; names the extra.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._writer = _package("tensorboardX", "tensorboard").SummaryWriter(logdir=os.fspath(folder))

    def write(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbLogger(Logger):
    """Logs to Weights & Biases.

    Args:
        **settings: As wandb.init takes them: project, name, config and others.

    Attributes:
        run: What wandb.init made.

    Raises:
        ImportError: wandb is not installed; names the extra.
    """

    def __init__(self, **settings: Any) -> None:
        self.run: Any = _package("wandb", "wandb").init(**settings)

    def write(self, metrics: dict[str, float], step: int) -> None:
        self.run.log(metrics, step=step)

    def close(self) -> None:
        self.run.finish()


class MlflowLogger(Logger):
    """Logs a run of MLflow. Characters of a name that MLflow does not take become "_": "loss:sum" is "loss_sum" there.

    Args:
        experiment: Name of the experiment; it is made if it is not there.
        run_name: Name of the run; None lets MLflow choose one.
        tracking_uri: Of the server; None takes MLflow's own, MLFLOW_TRACKING_URI.

    Attributes:
        run_id: The run's, at MLflow.

    Raises:
        ImportError: mlflow is not installed; names the extra.
    """

    def __init__(self, experiment: str, *, run_name: str | None = None, tracking_uri: str | None = None) -> None:
        mlflow = _package("mlflow", "mlflow")
        self._metric = mlflow.entities.Metric
        self._client = mlflow.MlflowClient(tracking_uri=tracking_uri)
        found = self._client.get_experiment_by_name(experiment)
        experiment_id = self._client.create_experiment(experiment) if found is None else found.experiment_id
        self.run_id: str = self._client.create_run(experiment_id, run_name=run_name).info.run_id
        self._failed = False

    def write(self, metrics: dict[str, float], step: int) -> None:
        # One request a step, not one a metric.
        now_ms = round(time.time() * 1000)
        made = [self._metric(re.sub(r"[^\w\-./ ]", "_", name), value, now_ms, step) for name, value in metrics.items()]
        self._client.log_batch(self.run_id, metrics=made)

    def close(self) -> None:
        self._client.set_terminated(self.run_id, status="FAILED" if self._failed else "FINISHED")

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._failed = kind is not None
        self.close()


class CsvLogger(Logger):
    """Writes a line a step, under a line of names. A metric that comes for the first time gets a column then, and the
    lines before it stay empty there. A file that is there is replaced.

    Args:
        path: Of the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._names: list[str] = []
        self._file = self._path.open("w", newline="", encoding="utf-8")

    def write(self, metrics: dict[str, float], step: int) -> None:
        new = [name for name in metrics if name not in self._names]
        if new or self._file.tell() == 0:
            self._names += new
            self._rewrite()
        self._writer().writerow({"step": step, **metrics})
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _writer(self) -> "csv.DictWriter[str]":
        return csv.DictWriter(self._file, ["step", *self._names], lineterminator="\n")

    def _rewrite(self) -> None:
        """The file with all the columns there are now. It is there whole at every moment."""
        self._file.close()
        aside = self._path.with_name(f"{self._path.name}.new")
        with self._path.open(newline="", encoding="utf-8") as old:
            self._file = aside.open("w", newline="", encoding="utf-8")
            writer = self._writer()
            writer.writeheader()
            writer.writerows(csv.DictReader(old))
        self._file.flush()
        aside.replace(self._path)


class TerminalLogger(Logger):
    """A table with a line a step, and below it, on a terminal, how far the loop is.

    Args:
        num_steps: Steps there will be; None draws no bar.
        names: Columns; none given takes the first step's, those of most interest first, as many as fit.
        out: Where to; None is standard output.
        clock: Seconds.
    """

    def __init__(
        self,
        num_steps: int | None = None,
        *,
        names: tuple[str, ...] = (),
        out: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._num_steps = num_steps
        self._names = list(names)
        self._out = sys.stdout if out is None else out
        self._clock = clock
        self._first: tuple[int, float] | None = None
        self._moving = self._out.isatty() and os.environ.get("TERM") != "dumb"

    def write(self, metrics: dict[str, float], step: int) -> None:
        if self._first is None:
            self._first = step, self._clock()
            self._names = self._names or self._choose(metrics)
            self._say(["step", *self._names])
        self._say([str(step), *(_short(metrics.get(name, math.nan)) for name in self._names)])
        if self._moving and self._num_steps:
            # No end of line: the next one is written over it.
            print(self._bar(step), end="", file=self._out, flush=True)

    def close(self) -> None:
        if self._moving and self._first is not None:
            print(file=self._out, flush=True)

    def _choose(self, metrics: dict[str, float]) -> list[str]:
        first = [name for name in METRICS_OF_INTEREST if name in metrics]
        names = first + [name for name in metrics if name not in first]
        room = shutil.get_terminal_size((80, 24)).columns - _STEP_COLUMNS
        chosen: list[str] = []
        for name in names:
            room -= max(_VALUE_COLUMNS, len(printable(name))) + 2
            if room < 0:
                break
            chosen.append(name)
        return chosen

    def _say(self, cells: list[str]) -> None:
        widths = [_STEP_COLUMNS, *(max(_VALUE_COLUMNS, len(printable(name))) for name in self._names)]
        line = "  ".join(printable(cell).rjust(width) for cell, width in zip(cells, widths, strict=True))
        if self._moving:
            print("\r\x1b[K", end="", file=self._out)
        say(line, out=self._out)

    def _bar(self, step: int) -> str:
        assert self._first is not None
        assert self._num_steps
        done = min(1.0, step / self._num_steps)
        first, start_s = self._first
        left = (
            "" if step <= first else f"  {_time((self._clock() - start_s) / (step - first) * (self._num_steps - step))}"
        )
        return f"[{'#' * int(30 * done):<30}] {100 * done:3.0f}%{left}"


_STEP_COLUMNS = 6
_VALUE_COLUMNS = 9


def _time(seconds: float) -> str:
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02} left"


def _short(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4g}"


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        text = (
            f"metrics[{name!r}] is {type(value).__name__}, but a metric must be a number; leave it out or convert it."
        )
        raise TypeError(text) from None


def _package(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as exc:
        raise ImportError(
            f"This logger needs the package {name}, which cannot be imported ({exc}). Install it with "
            f"`pip install 'gradwire[{extra}]'`.",
            name=name,
        ) from exc
