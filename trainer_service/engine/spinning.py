"""Whether threads of torch's parallel regions spin while they wait for one another, decided by what the machine does.

A pass has thousands of parallel regions of a fraction of a millisecond. Threads that spin between them save a tenth to
a quarter of a step, as long as the cores are theirs. As soon as anything else runs there, a thread that spins keeps a
core from the very thread it waits for, and a step takes two to six times as long. So they spin only where this
process's threads are not kept waiting for a core, which Linux counts for each thread. Nothing else changes: how many
threads there are stays as it is, and with it every bit of a result.

GNU's OpenMP reads how long to spin once, when it is loaded, but spins hardly at all while a process has more OpenMP
threads than there are CPUs (its documentation of GOMP_SPINCOUNT). A team of threads that sleep makes them more.
"""

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from trainer_service.engine.device import num_available_cpus, num_usable_cpus

_INTERVAL_S = 0.1
"""How often it looks. Until it has looked, a busy machine slows a step down, at worst by this."""
_CONTENDED_ABOVE, _QUIET_BELOW = 0.15, 0.1
"""Part of their time that threads which want to run are kept waiting. On a quiet machine it is below 0.06, whether they
spin or sleep, and beside one other busy process on two cores 0.4 and more."""
_QUIET_S = 1.0
"""How long a machine must have been quiet before threads spin: what disturbed them may be back in a moment."""
_MIN_BUSY = 0.5
"""Cores' worth of work below which an interval says nothing."""


class Contention:
    """Tells from what threads have run and waited whether they share their cores. At first it says that they do."""

    def __init__(self) -> None:
        self.contended = True
        self._quiet_s = 0.0

    def update(self, *, ran_s: float, waited_s: float, elapsed_s: float) -> bool:
        """Takes in an interval, and returns whether the cores are contended.

        Args:
            ran_s: Seconds that the process's threads ran in it, all together.
            waited_s: Seconds that they were ready to run and had no core.
            elapsed_s: Its length.
        """
        if ran_s + waited_s < _MIN_BUSY * elapsed_s:
            return self.contended
        waited = waited_s / (ran_s + waited_s)
        self._quiet_s = self._quiet_s + elapsed_s if waited < _QUIET_BELOW else 0.0
        if waited > _CONTENDED_ABOVE:
            self.contended = True
        elif self._quiet_s >= _QUIET_S:
            self.contended = False
        return self.contended


class SleepingTeam:
    """A team of OpenMP threads, more than there are CPUs, that only sleeps. While there is one, no thread spins.

    Args:
        openmp: GNU's OpenMP, as torch uses it.
    """

    def __init__(self, openmp: Any) -> None:
        self._leave = threading.Event()
        there = threading.Event()

        def sleep() -> None:
            # The region's body can be any function of C: this one returns a number, and nobody looks.
            body = ctypes.cast(openmp.omp_get_num_threads, ctypes.c_void_p)
            openmp.GOMP_parallel(body, None, openmp.omp_get_num_procs() + 1, 0)
            there.set()
            self._leave.wait()

        self._leader = threading.Thread(target=sleep, name="sleeping-team", daemon=True)
        self._leader.start()
        there.wait()

    def dismiss(self) -> None:
        """Ends its threads."""
        self._leave.set()
        self._leader.join()


def spin_when_alone() -> None:
    """Has threads of parallel regions spin while nothing else wants their cores, from now on, on a thread of its own.

    Does nothing where OMP_WAIT_POLICY says how they wait, and where nothing can be told or done: without Linux's counts
    or GNU's OpenMP.
    """
    if "OMP_WAIT_POLICY" in os.environ or torch.get_num_threads() == 1 or not any(_threads()):
        return
    openmp = _gnu_openmp()
    if openmp is None:
        return
    team: SleepingTeam | None = SleepingTeam(openmp)
    if num_available_cpus() < num_usable_cpus():
        # Only part of the cores' time is granted, and a thread that spins uses up what another needs.
        return

    def watch() -> None:
        nonlocal team
        contention, before, before_s = Contention(), dict(_threads()), time.monotonic()
        while True:
            time.sleep(_INTERVAL_S)
            now, now_s = dict(_threads()), time.monotonic()
            since = [(one - other) / 1e9 for one, other in zip(_total(now, before), _total(before, now), strict=True)]
            contended = contention.update(ran_s=since[0], waited_s=since[1], elapsed_s=now_s - before_s)
            before, before_s = now, now_s
            if contended and team is None:
                team = SleepingTeam(openmp)
            elif not contended and team is not None:
                team.dismiss()
                team = None

    threading.Thread(target=watch, name="spinning", daemon=True).start()


def _threads() -> Iterator[tuple[str, tuple[int, int]]]:
    """(thread, nanoseconds it (ran, was ready to run and had no core)) of this process; nothing outside Linux."""
    with suppress(OSError):
        for thread in Path("/proc/self/task").iterdir():
            # A thread may end meanwhile.
            with suppress(OSError, ValueError):
                ran, waited, _ = (thread / "schedstat").read_text().split()
                yield thread.name, (int(ran), int(waited))


def _total(counts: dict[str, tuple[int, int]], of: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """The sums over threads that are in both."""
    both = [counts[thread] for thread in counts.keys() & of.keys()]
    return sum(ran for ran, _ in both), sum(waited for _, waited in both)


def _gnu_openmp() -> Any:
    """GNU's OpenMP, where that is what torch uses; None otherwise. Its functions are found through torch's library."""
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        # Intel's and LLVM's have GNU's entry points too, and this one of their own.
        if not hasattr(library, "kmp_set_blocktime") and library.GOMP_parallel and library.omp_get_num_procs:
            return library
    return None
