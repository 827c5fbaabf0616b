"""What the rows share: rounds that interleave the sides, ratios, and the table."""

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Sides = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Setting:
    """What the rows are measured with.

    Attributes:
        model: Folder of the real model.
        folder: For whatever a row writes.
        rounds: Times each side runs.
        quick: Tiny models and data, so that a test can run everything; the figures mean nothing.
        tinker: Folder that has the tinker package; None where it can be imported or is left out.
    """

    model: str
    folder: Path
    rounds: int
    quick: bool
    tinker: Path | None = None
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """Closed when all rows are done."""
    kept: list[Any] = field(default_factory=list)
    """The one trainer of a quick run."""

    def pick(self, full: int, quick: int) -> int:
        """One of two sizes: of a real row, or of a quick one."""
        return quick if self.quick else full


@dataclass(frozen=True)
class Row:
    """One line of the table: what, the measured values, their ratio, and the goal it is held against."""

    what: str
    measured: str
    ratio: str = ""
    goal: str = ""


def interleave(
    sides: Sides, *, rounds: int, warmup: int = 1, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds each side took in each round; within a round the sides take turns, and who starts alternates."""
    for _ in range(warmup):
        for run in sides.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        order = list(sides)[:: 1 if number % 2 == 0 else -1]
        for name in order:
            start = clock()
            sides[name]()
            times[name].append(clock() - start)
    return times


def ratio(over: list[float], under: list[float]) -> float:
    """Median over the rounds of one side's time over the other's."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def ms(seconds: list[float]) -> str:
    """The median, in milliseconds."""
    value = statistics.median(seconds) * 1000
    return f"{value:.0f} ms" if value >= 100 else f"{value:.2f} ms"


def print_table(header: tuple[str, ...], rows: list[Row]) -> None:
    """A Markdown table."""
    cells = [(row.what, row.measured, row.ratio, row.goal) for row in rows]
    widths = [max(len(row[column]) for row in [header, *cells]) for column in range(len(header))]
    for row in (header, tuple("-" * width for width in widths), *cells):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |", flush=True)
