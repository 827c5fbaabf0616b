"""Experts side by side on the CPU: each is one thread's, from its first product to its last.

Of one expert's rows there is too little for all cores: between its products, what Python and the start of a parallel
region take is a fifth of the time. Two experts at once hide it, since torch lets other threads run Python while it
computes. Each thread computes without help, so an expert's bits do not depend on how many there are.
"""

import functools
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

_MAX_THREADS = 8
"""More would wait for one another's Python."""


def side_by_side(rows_of_experts: Iterable[tuple[int, slice]], compute: Callable[[int, slice], None]) -> None:
    """Calls `compute` with each expert and its rows, without gradients, and returns when all are done.

    It must write only what is that expert's. The first of what is raised is raised here, once all threads are done.
    """
    left, lock = iter(rows_of_experts), threading.Lock()

    @torch.no_grad()
    def work() -> None:
        while True:
            with lock:
                expert = next(left, None)
            if expert is None:
                return
            compute(*expert)

    num_threads = min(torch.get_num_threads(), _MAX_THREADS)
    if num_threads == 1:
        work()
        return
    futures = [_pool(num_threads).submit(work) for _ in range(num_threads)]
    for exc in [future.exception() for future in futures]:
        if exc is not None:
            raise exc


@functools.cache
def _pool(num_threads: int) -> ThreadPoolExecutor:
    """Threads, all of them started, in each of which torch computes with that thread alone."""
    own = torch.get_num_threads()
    pool, all_there = ThreadPoolExecutor(num_threads, "experts"), threading.Barrier(num_threads)

    def start() -> None:
        torch.set_num_threads(1)
        all_there.wait()

    for future in [pool.submit(start) for _ in range(num_threads)]:
        future.result()
    # It is each thread's own number, and that of threads to come, which is as before again.
    torch.set_num_threads(own)
    return pool
