"""Freed memory stays while the process works, and goes back once it is idle."""

import subprocess
import sys

import pytest

from trainer_service.engine import freed_memory
from trainer_service.engine.freed_memory import Idleness

INTERVALS = round(freed_memory._IDLE_S / 10)
"""Idle intervals that it takes."""
WORK = """
import ctypes, resource
from pathlib import Path
from trainer_service.engine import freed_memory

SIZE = 64 << 20
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def work():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(SIZE)
    ctypes.memset(block, 1, SIZE)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def held():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

freed_memory.keep_while_working()
first, second, kept = work(), work(), held()
freed_memory.give_back()
print(first, second, kept - held() >= SIZE * 0.9)
"""


def look(idleness: Idleness, *, cores: float, intervals: int) -> list[bool]:
    """Intervals of ten seconds in which so many cores' worth of work was done."""
    return [idleness.update(ran_s=10 * cores, elapsed_s=10) for _ in range(intervals)]


def test_memory_goes_back_once_after_a_while_without_work() -> None:
    idleness = Idleness()
    assert look(idleness, cores=1.5, intervals=3) == [False] * 3
    assert look(idleness, cores=0.001, intervals=INTERVALS) == [False] * (INTERVALS - 1) + [True]
    assert not any(look(idleness, cores=0.001, intervals=100))


def test_a_process_that_goes_on_working_keeps_it() -> None:
    idleness = Idleness()
    for _ in range(5):
        look(idleness, cores=1.0, intervals=1)
        assert not any(look(idleness, cores=0.0, intervals=INTERVALS - 1))


def test_a_process_that_has_never_worked_has_nothing_to_give_back() -> None:
    assert not any(look(Idleness(), cores=0.0, intervals=100))


@pytest.mark.skipif(freed_memory._glibc() is None, reason="glibc's settings")
def test_what_was_freed_is_taken_again_without_page_faults_and_can_be_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", WORK], capture_output=True, text=True, check=True)
    first, second, went_back = done.stdout.split()
    assert (int(second) < int(first) / 10, went_back) == (True, "True"), done.stdout
