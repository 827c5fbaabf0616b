"""Ranks for tests: processes that have a process group, and run functions of tests.rank_tasks on demand."""

import contextlib
import functools
import gc
import os
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.forked_trainer import fork_server

TIMEOUT_S = 240.0
"""Bounds failure."""


class RankPool:
    """Ranks that are up.

    Args:
        connections: To each, by rank.
        arranged: Of Ranks: dp_replicate_size, tp_size, ep_size.
    """

    def __init__(self, connections: list[Connection], **arranged: int) -> None:
        self._connections = connections
        self._arranged = arranged

    def with_replicas(self, times: int) -> "RankPool":
        """The same processes, arranged so that all parts of a model are there so many times."""
        return RankPool(self._connections, dp_replicate_size=times)

    def cutting_layers(self, tp_size: int, *, replicas: int = 1) -> "RankPool":
        """The same processes, so many of which compute each layer together."""
        return RankPool(self._connections, tp_size=tp_size, dp_replicate_size=replicas)

    def dividing_experts(self, ep_size: int, *, replicas: int = 1) -> "RankPool":
        """The same processes, so many of which divide experts among them."""
        return RankPool(self._connections, ep_size=ep_size, dp_replicate_size=replicas)

    def uncut(self) -> "RankPool":
        """The same processes, each of which computes whole layers, and all experts."""
        return RankPool(self._connections)

    def run(self, task: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """What the task returns on each rank, which get the same arguments behind their Ranks."""
        for connection in self._connections:
            connection.send((task, self._arranged, args, kwargs))
        # All are read before any is looked at: the next task's are behind them.
        answers: list[tuple[Any, str]] = []
        for rank, connection in enumerate(self._connections):
            assert connection.poll(TIMEOUT_S), f"rank {rank} does not answer"
            answers.append(connection.recv())
        for rank, (_, failure) in enumerate(answers):
            assert not failure, f"rank {rank}: {failure}"
        return [result for result, _ in answers]


@contextlib.contextmanager
def rank_pool(world_size: int, folder: Path) -> Iterator[RankPool]:
    """That many ranks; they meet in a folder."""
    # Imports take seconds; the ranks are forked from one process that has done them.
    context = fork_server()
    connections: list[Connection] = []
    processes: list[Any] = []
    for rank in range(world_size):
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(rank, world_size, str(folder / "store"), theirs), daemon=True)
        process.start()
        theirs.close()
        connections.append(ours)
        processes.append(process)
    try:
        yield RankPool(connections)
    finally:
        for connection in connections:
            connection.close()
        for process in processes:
            process.join(5)
            process.kill()
            process.join()


_REAL = gc.unfreeze, gc.freeze


@contextlib.contextmanager
def garbage_among_all() -> Iterator[None]:
    """In here a search for garbage that thaws everything does so on ranks of a pool, too."""
    before = gc.unfreeze, gc.freeze
    gc.unfreeze, gc.freeze = _REAL
    try:
        yield
    finally:
        gc.unfreeze, gc.freeze = before


def _nothing() -> None:
    """Thaws nothing, and freezes nothing."""


def serve(rank: int, world_size: int, store: str, connection: Connection) -> None:
    """A rank: runs what comes until nobody is left to ask."""
    from trainer_service.fleet.rank_processes import Place, rank_environment
    from trainer_service.worker_config import RANK_STORE_VARIABLE

    os.environ |= rank_environment(rank, Place(world_size), store)
    assert os.environ[RANK_STORE_VARIABLE] == store
    import torch

    from trainer_service.engine.rank_channels import Ranks

    torch.set_num_threads(1)
    # What is frozen here was imported, and is no model, as a worker's first is: to look at all of it takes a fifth of a
    # second, for each model that is let go.
    gc.unfreeze = gc.freeze = _nothing
    # Every model that is loaded makes a mesh, whose groups stay with the process, each with a thread that wakes up a
    # hundred times a second. A worker loads one model; these ranks load hundreds.
    distributed: Any = torch.distributed
    distributed.init_device_mesh = functools.cache(distributed.init_device_mesh)
    ranks = Ranks.from_environment(timeout_s=60)
    with contextlib.suppress(EOFError):
        while True:
            task, arrangement, args, kwargs = connection.recv()
            arranged = replace(ranks, **arrangement)
            try:
                connection.send((task(arranged, *args, **kwargs), ""))
            except Exception:
                connection.send((None, traceback.format_exc()))
    # gloo may abort in the interpreter's own end.
    os._exit(0)
