"""The worker's processes on this machine: its ranks, which start together and end together.

Ranks of one machine need no rendezvous server. Each is told its place in its environment; two and more meet through a
file in the worker's private folder (torch.distributed's FileStore), and talk over loopback. Nothing of this listens on
a network, and a store that other processes can reach is never read.
"""

import asyncio
import os
import secrets
import socket
import sys
from asyncio.subprocess import STDOUT, Process
from collections.abc import Mapping, Sequence

from trainer_service.fleet.output import WorkerOutput
from trainer_service.processes import start_child, stop_child
from trainer_service.worker_config import RANK_STORE_VARIABLE


class RankProcesses:
    """Ranks that run. Made by `start`.

    Args:
        processes: By rank.
        outputs: What each of them prints.
    """

    def __init__(self, processes: Sequence[Process], outputs: Sequence[WorkerOutput]) -> None:
        self._processes = processes
        self._outputs = outputs
        self._ended: list[int] = []  # Ranks, in the order of their ends.
        self._waiting = [asyncio.create_task(self._wait(rank)) for rank in range(len(processes))]

    @classmethod
    async def start(
        cls, command: Sequence[str], *, env: Mapping[str, str], folder: str, local_world_size: int
    ) -> "RankProcesses":
        """Starts every rank.

        Args:
            command: The command line, the same for all.
            env: What they share of their environment.
            folder: A private folder; two ranks and more meet in a file there.
            local_world_size: How many.

        Raises:
            OSError: One could not be started; the others were ended again.
        """
        processes: list[Process] = []
        outputs: list[WorkerOutput] = []
        store = f"{folder}/ranks-{secrets.token_hex(4)}"
        try:
            for rank in range(local_world_size):
                its_env = {**env, **rank_environment(rank, local_world_size, store)}
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

    async def one_ended(self) -> None:
        """Returns once any of them has ended."""
        await asyncio.wait(self._waiting, return_when=asyncio.FIRST_COMPLETED)

    async def explain(self, *, how: str = "lost its connection") -> str:
        """Why the worker died, in a sentence.

        Args:
            how: What happened to it, if all ranks live.
        """
        # The others end because the first one did, so its output has the reason.
        rank = self._ended[0] if self._ended else 0
        if self._ended:
            await self._outputs[rank].drain()
        return self._outputs[rank].explain(self._processes[rank].returncode, how=how)

    async def stop(self, *, grace_s: float) -> None:
        """Ends all of them, and everything below them.

        Args:
            grace_s: From SIGTERM to SIGKILL.
        """
        await asyncio.gather(*(stop_child(process, grace_s=grace_s) for process in self._processes))
        await asyncio.gather(*self._waiting, *(output.close() for output in self._outputs))

    async def _wait(self, rank: int) -> None:
        await self._processes[rank].wait()
        self._ended.append(rank)


def rank_environment(rank: int, world_size: int, store: str) -> dict[str, str]:
    """The variables that tell a rank its place, under torch.distributed's names.

    Args:
        rank: From 0; on one machine also the local rank.
        world_size: Ranks in all.
        store: Path of a file that is not there yet, where the ranks meet.
    """
    loopback = _loopback_interface()
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    return {
        **{name: str(value) for name, value in place.items()},
        RANK_STORE_VARIABLE: store,
        # A process group's libraries listen on the first network interface they find unless told another.
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
        # NCCL's service for its own diagnosis, which would listen too.
        "NCCL_RAS_ENABLE": "0",
    }


def _loopback_interface() -> str:
    """Its name: "lo" on Linux, "lo0" on macOS."""
    if sys.platform.startswith("linux"):
        return "lo"
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo0")
