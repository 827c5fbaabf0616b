"""Loggers: what they write is what others read."""

import io
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradwire import loggers
from gradwire._client.run_metrics import RunMetrics


def test_tensorboard_reads_what_was_logged(tmp_path: Path):
    with loggers.TensorBoardLogger(tmp_path / "run") as log:
        log({"loss:sum": 2.0}, step=1)
        log({"loss:sum": 1.5, "reward": 3}, step=2)
    events = pytest.importorskip("tensorboardX").proto.event_pb2
    read = [events.Event.FromString(record) for record in records(next((tmp_path / "run").iterdir()))]
    found = [(event.step, value.tag, value.simple_value) for event in read for value in event.summary.value]
    assert [(step, value) for step, _, value in found] == [(1, 2.0), (2, 1.5), (2, 3.0)]


def records(file: Path) -> list[bytes]:
    """Of a TFRecord file: a length of eight bytes, its checksum of four, the record, its checksum of four."""
    data, found = file.read_bytes(), []
    while data:
        length = int.from_bytes(data[:8], "little")
        found.append(data[12 : 12 + length])
        data = data[16 + length :]
    return found


def test_a_csv_file_gets_a_column_for_every_metric_that_comes(tmp_path: Path):
    path = tmp_path / "run.csv"
    with loggers.CsvLogger(path) as log:
        log({"loss": 2.0}, step=1)
        log({"loss": 1.0, 'a "name", odd': 0.5}, step=2)
        # Readable while the loop runs.
        assert path.read_text() == 'step,loss,"a ""name"", odd"\n1,2.0,\n2,1.0,0.5\n'
        log({}, step=3)
    assert path.read_text().splitlines()[-1] == "3,,"
    assert list(tmp_path.iterdir()) == [path]


def test_the_terminal_shows_a_table_and_how_far_the_loop_is():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out, now = Terminal(), iter(range(0, 1000, 10))
    with loggers.TerminalLogger(4, out=out, clock=lambda: next(now)) as log:
        for step in (1, 2):
            log({"reward": 0.25, "loss:sum": 1234.567 / step, "\x1b[2Jname": 1.0}, step=step)
    lines = [line.rpartition("\x1b[K")[2] for line in out.getvalue().split("\n")]
    assert lines[0].split() == ["step", "loss:sum", "reward", "\\x1b[2Jname"]
    assert [line.split()[:2] for line in lines[1:3]] == [["1", "1235"], ["2", "617.3"]]
    assert "[###############               ]  50%  0:00:20 left" in lines[3]


def test_a_file_gets_the_table_alone():
    out = io.StringIO()
    with loggers.TerminalLogger(2, out=out) as log:
        log({"loss": 1.0}, step=1)
    assert out.getvalue() == "  step       loss\n     1          1\n"


class Wandb(types.ModuleType):
    """Remembers what it is told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.told: list[Any] = []

    def init(self, **settings: Any) -> "Wandb":
        self.told.append(settings)
        return self

    def log(self, metrics: dict[str, float], *, step: int) -> None:
        self.told.append((metrics, step))

    def finish(self) -> None:
        self.told.append("finished")


def test_wandb_gets_metrics_by_step(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", wandb := Wandb())
    with loggers.WandbLogger(project="p") as log:
        loggers.log_run(
            RunMetrics("run-1", np.array([4, 5]), np.zeros(2), np.array([1, 2]), {"loss:sum": np.array([np.nan, 2.0])}),
            log,
        )
    assert wandb.told == [{"project": "p"}, ({}, 4), ({"loss:sum": 2.0}, 5), "finished"]


@pytest.mark.parametrize(
    ("make", "package", "extra"),
    [
        (lambda folder: loggers.TensorBoardLogger(folder), "tensorboardX", "gradwire[tensorboard]"),
        (lambda folder: loggers.WandbLogger(), "wandb", "gradwire[wandb]"),
        (lambda folder: loggers.MlflowLogger("e"), "mlflow", "gradwire[mlflow]"),
    ],
)
def test_a_package_that_is_missing_is_named_with_its_extra(
    make: Any, package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError) as caught:
        make(tmp_path)
    assert package in str(caught.value)
    assert extra in str(caught.value)


def test_what_is_no_number_is_refused_by_its_name(tmp_path: Path):
    with loggers.CsvLogger(tmp_path / "a.csv") as log, pytest.raises(TypeError, match=r"metrics\['logprobs'\] is list"):
        log({"logprobs": [1.0]}, step=1)  # pyright: ignore[reportArgumentType]
