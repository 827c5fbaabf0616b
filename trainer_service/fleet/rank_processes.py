"""The worker's processes on this machine: its ranks, which start together and end together.

Each is told its place in its environment. Ranks of one machine need no rendezvous server: they meet through a file in
the worker's private folder (torch.distributed's FileStore), and talk over loopback. Nothing of this listens on a
network, and a store that other processes can reach is never read. Ranks of several machines meet through the trainer
(rank_store.py), and listen on the one interface that their machines reach each other by.
"""

import asyncio
import os
import secrets
import signal
import socket
import sys
from asyncio.subprocess import STDOUT, Process
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from trainer_service import join_token
from trainer_service.fleet.output import WorkerOutput
from trainer_service.fleet.worker_socket import store_path
from trainer_service.processes import start_child, stop_child
from trainer_service.worker_config import RANK_STORE_VARIABLE, START_ID_VARIABLE

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Which interface a process group's libraries listen on: the first they find, unless told."""


class WorkerRanks(Protocol):
    """The processes of one worker, wherever they are."""

    @property
    def all_run(self) -> bool:
        """Whether none of them has ended."""
        ...

    def begin(self) -> None:
        """Tells ranks that wait on stdin to begin."""
        ...

    async def one_ended(self) -> None:
        """Returns once any of them has ended."""
        ...

    async def explain(self, *, how: str = ...) -> str:
        """Why the worker died, in a sentence.

        Args:
            how: What happened to it, if all ranks live.
        """
        ...

    async def stop(self, *, grace_s: float) -> None:
        """Ends all of them, and everything below them.

        Args:
            grace_s: From SIGTERM to SIGKILL.
        """
        ...


@dataclass(frozen=True)
class Place:
    """Which ranks, of how many, a machine has.

    Attributes:
        local_world_size: Ranks on each machine.
        node_rank: This one's place among the machines.
        nnodes: Machines.
        interface: By which it reaches the others; of one machine it is loopback.
        start_id: Of several machines' ranks, by which they ask their common store.
    """

    local_world_size: int
    node_rank: int = 0
    nnodes: int = 1
    interface: str = ""
    start_id: str = ""


class RankProcesses:
    """Ranks that run. Made by `start`.

    Args:
        processes: By local rank.
        outputs: What each of them prints.
    """

    def __init__(self, processes: Sequence[Process], outputs: Sequence[WorkerOutput]) -> None:
        self._processes = processes
        self._outputs = outputs
        self._ended: list[int] = []  # Local ranks, in the order of their ends.
        self._waiting = [asyncio.create_task(self._wait(rank)) for rank in range(len(processes))]

    @classmethod
    async def start(
        cls, command: Sequence[str], *, env: Mapping[str, str], folder: str, place: Place
    ) -> "RankProcesses":
        """Starts every rank of this machine.

        Args:
            command: The command line, the same for all.
            env: What they share of their environment.
            folder: A private folder. Ranks of one machine meet in a file there, others through the socket in it.
            place: Which ranks they are.

        Raises:
            OSError: One could not be started; the others were ended again.
        """
        processes: list[Process] = []
        outputs: list[WorkerOutput] = []
        store = store_path(folder) if place.start_id else f"{folder}/ranks-{secrets.token_hex(4)}"
        # With several machines an operator may know better, as with torchrun.
        told = {name: env[name] for name in INTERFACE_VARIABLES if place.nnodes > 1 and env.get(name)}
        try:
            for local_rank in range(place.local_world_size):
                its_env = {**env, **rank_environment(local_rank, place, store), **told}
                output, printed = await WorkerOutput.open()
                outputs.append(output)
                try:
                    processes.append(await start_child(*command, env=its_env, stdout=printed, stderr=STDOUT))
                finally:
                    os.close(printed)
        except BaseException:
            await asyncio.gather(*(stop_child(process, grace_s=0) for process in processes))
            await asyncio.gather(*(output.close() for output in outputs))
            raise
        return cls(processes, outputs)

    @property
    def all_run(self) -> bool:
        return not self._ended

    @property
    def killed(self) -> bool:
        """Whether a signal ended the first of those that have ended, other than an abort of its own."""
        code = self._processes[self._ended[0]].returncode if self._ended else None
        return code is not None and code < 0 and code != -signal.SIGABRT

    def begin(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(b"\n")

    async def one_ended(self) -> None:
        await asyncio.wait(self._waiting, return_when=asyncio.FIRST_COMPLETED)

    async def explain(self, *, how: str = "lost its connection") -> str:
        # The others end because the first one did, so its output has the reason.
        rank = self._ended[0] if self._ended else 0
        if self._ended:
            await self._outputs[rank].drain()
        return self._outputs[rank].explain(self._processes[rank].returncode, how=how)

    async def stop(self, *, grace_s: float) -> None:
        await asyncio.gather(*(stop_child(process, grace_s=grace_s) for process in self._processes))
        await asyncio.gather(*self._waiting, *(output.close() for output in self._outputs))

    async def _wait(self, rank: int) -> None:
        await self._processes[rank].wait()
        self._ended.append(rank)


def rank_environment(local_rank: int, place: Place, store: str) -> dict[str, str]:
    """The variables that tell a rank its place, under torch.distributed's names.

    Args:
        local_rank: From 0 on each machine.
        place: Of its machine.
        store: Path of a file that is not there yet, where the ranks of one machine meet; of the socket for several.
    """
    interface = place.interface or _loopback_interface()
    numbers = {
        "RANK": place.node_rank * place.local_world_size + local_rank,
        "LOCAL_RANK": local_rank,
        "WORLD_SIZE": place.nnodes * place.local_world_size,
        "LOCAL_WORLD_SIZE": place.local_world_size,
    }
    return {
        **{name: str(value) for name, value in numbers.items()},
        RANK_STORE_VARIABLE: store,
        START_ID_VARIABLE: place.start_id,
        **dict.fromkeys(INTERFACE_VARIABLES, interface),
        # NCCL's service for its own diagnosis, which would listen too.
        "NCCL_RAS_ENABLE": "0",
    }


def worker_environment(**variables: str) -> dict[str, str]:
    """What ranks get of this process's environment, and variables of their own."""
    env = {**os.environ, "PYTHONUNBUFFERED": "1", **variables}
    for secret in ("GRADWIRE_API_KEY", join_token.VARIABLE):
        # The worker needs none, and cannot leak what it does not have.
        env.pop(secret, None)
    # How threads of a parallel region wait for one another, unless the environment says so already. GNU's OpenMP spins
    # for some tens of microseconds, which the worker forbids while anything else wants the cores (engine/spinning.py);
    # longer gains nothing. Others, where the worker cannot, do not spin.
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & env.keys():
        env |= {"GOMP_SPINCOUNT": "20000", "KMP_BLOCKTIME": "0"}
    # glibc: memory in huge pages where the system has them for whoever asks (engine/freed_memory.py).
    env.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    return env


def _loopback_interface() -> str:
    """Its name: "lo" on Linux, "lo0" on macOS."""
    if sys.platform.startswith("linux"):
        return "lo"
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo0")
