"""Runs a measurement in a process like the worker's: how threads wait, what becomes of freed memory."""

import os
import sys

HUGE_PAGES = "glibc.malloc.hugetlb=1"


def as_the_worker() -> None:
    """Called before torch is imported. Both sides of a row that are in this process are treated alike.

    The C library reads its settings when a process starts, so this one starts anew. Where GLIBC_TUNABLES is set, be it
    to nothing, memory stays as it is for any other program.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    os.environ.pop("OMP_NUM_THREADS", None)
    if "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
        os.execv(sys.executable, sys.orig_argv)
    if os.environ["GLIBC_TUNABLES"] == HUGE_PAGES:
        from trainer_service.engine.freed_memory import keep_while_working

        keep_while_working()
