"""How the worker's ranks talk beside the model's own collectives, and who this process is among them.

Rank 0 leads. It alone talks to the trainer, and tells the others each command as it comes and whose turn it is
(worker/device_loop.py). All execute the same commands in the same order; whatever depends on time, memory, disk or
chance the leader decides and tells. One rank alone is the same code with nobody to talk to.

A channel is for one thread of each rank: ranks that say things in different orders would hear one for another.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from google.rpc.status_pb2 import Status
from gradwire.errors import GradwireError, error, from_status, invalid_field, to_status

from trainer_service.worker_config import RANK_STORE_VARIABLE, START_ID_VARIABLE

T = TypeVar("T")
_ENDLESS = timedelta(days=3650)
"""How long a rank without work waits to be told of some; one that has gone is noticed at once all the same."""


class RanksDisagreeError(Exception):
    """Ranks that must do the same did not."""


class LeaderGoneError(Exception):
    """Rank 0 has ended, and the others with it."""


class RankFailedError(Exception):
    """What this rank executes failed here, and perhaps only here, where the others wait for it: it has to end.

    Args:
        failure: What the operation shall be answered with.
    """

    def __init__(self, failure: GradwireError) -> None:
        super().__init__(failure.message)
        self.failure = failure


class Channel:
    """All ranks talking on one thread of each.

    Args:
        group: Their process group on the host; None where there is one rank.
        rank: This process's.
        world_size: How many there are.
    """

    def __init__(self, group: Any = None, *, rank: int = 0, world_size: int = 1) -> None:
        self._group = group
        self.rank = rank
        self.world_size = world_size

    def tell_bytes(self, message: bytes = b"") -> bytes:
        """The leader's message, on every rank; the others' is not looked at."""
        if self._group is None:
            return message
        from torch import distributed

        size = _int64(len(message))
        distributed.broadcast(size, 0, group=self._group)
        buffer = _bytes(message) if self.rank == 0 else _room(int(size))
        if len(buffer):
            distributed.broadcast(buffer, 0, group=self._group)
        return buffer.numpy().tobytes()

    def gather_bytes(self, message: bytes) -> list[bytes]:
        """Everybody's message, by rank, on every rank."""
        if self._group is None:
            return [message]
        from torch import distributed

        sizes = [_int64(0) for _ in range(self.world_size)]
        distributed.all_gather(sizes, _int64(len(message)), group=self._group)
        longest = max(map(int, sizes))
        if not longest:
            return [b""] * self.world_size
        buffers = [_room(longest) for _ in range(self.world_size)]
        distributed.all_gather(buffers, _bytes(message.ljust(longest, b"\0")), group=self._group)
        return [buffer[: int(size)].numpy().tobytes() for buffer, size in zip(buffers, sizes, strict=True)]

    def tell(self, value: Any = None) -> Any:
        """The leader's value, on every rank: what JSON has, and NaN and infinity."""
        return value if self._group is None else json.loads(self.tell_bytes(json.dumps(value).encode()))

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value, by rank, on every rank: what JSON has, and NaN and infinity."""
        if self._group is None:
            return [value]
        return [json.loads(message) for message in self.gather_bytes(json.dumps(value).encode())]

    @property
    def leads(self) -> bool:
        """Whether this is the leader's end."""
        return self.rank == 0

    def alike(self, work: Callable[[], T]) -> T:
        """Does something on every rank, none of which needs another for it; what one refuses, all refuse.

        Raises:
            GradwireError: What was raised on the first rank that raised one.
        """
        if self._group is None:
            return work()
        result: Any = None
        failure: GradwireError | None = None
        try:
            result = work()
        except GradwireError as exc:
            failure = exc
        statuses = self.gather_bytes(to_status(failure).SerializeToString() if failure else b"")
        for status in filter(None, statuses):
            raise from_status(Status.FromString(status)) from failure
        return result

    def put_together(self, values: npt.NDArray[np.float32]) -> None:
        """Puts together, in place and bit for bit, what at each place one rank has and all others have as zero bits."""
        if self._group is None:
            return
        import torch
        from torch import distributed

        distributed.all_reduce(torch.from_numpy(values.view(np.int32)), group=self._group)


ALONE = Channel()
"""Of a rank that has no others."""


@dataclass(frozen=True)
class Ranks:
    """This process's place, and the channels of each of its threads.

    Attributes:
        rank: From 0, which leads.
        local_rank: From 0 on each machine.
        world_size: Ranks in all.
        local_world_size: Ranks on this machine.
        dp_replicate_size: Times that all parts of a model are there.
        tp_size: Ranks that compute each layer together: adjacent ones, which run the same packs.
        ep_size: Of the ranks that parameters are in parts on, those that divide experts among them.
        commands: For the thread that reads commands.
        turns: Says whose turn it is, however long that takes.
        execution: For the same thread, while something executes.
        files: For the thread that writes snapshots.
        timeout_s: How long ranks wait for one another while they execute something.
        meeting_place: Kept, since torch keeps only the C++ half of a store.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    dp_replicate_size: int = 1
    tp_size: int = 1
    ep_size: int = 1
    commands: Channel = field(default_factory=Channel)
    turns: Channel = field(default_factory=Channel)
    execution: Channel = field(default_factory=Channel)
    files: Channel = field(default_factory=Channel)
    timeout_s: float = 600.0
    meeting_place: Any = None

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def fsdp_size(self) -> int:
        """Ranks that parameters, or what a tensor parallel group's rank has of them, are in parts on."""
        return self.world_size // (self.dp_replicate_size * self.tp_size)

    @property
    def dp_size(self) -> int:
        """Shares of a batch: one of each tensor parallel group."""
        return self.world_size // self.tp_size

    @property
    def dp_rank(self) -> int:
        """Which of them this rank runs."""
        return self.rank // self.tp_size

    @property
    def answers(self) -> bool:
        """Whether this rank tells what its group has computed, which is the same on all of it."""
        return self.rank % self.tp_size == 0

    def alone_with(self, failure: GradwireError) -> Exception:
        """What to raise for a failure that other ranks may not share: with others, what ends this one."""
        return failure if self.world_size == 1 else RankFailedError(failure)

    def check_alike(self, outcome: str) -> None:
        """Has all ranks say what came of something.

        Raises:
            RanksDisagreeError: It is not the same for all; none of them is to be trusted any more.
        """
        outcomes = self.execution.gather(outcome)
        if len({*outcomes}) > 1:
            raise RanksDisagreeError(f"Ranks came to different ends: {outcomes}.")

    @classmethod
    def from_environment(
        cls, *, timeout_s: float = 600.0, dp_replicate_size: int = 1, tp_size: int = 1, ep_size: int = 1
    ) -> "Ranks":
        """As RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE say; alone where they are not set. Waits for the others.

        Args:
            timeout_s: How long ranks wait for one another while they execute something.
            dp_replicate_size: Times that all parts of a model are there.
            tp_size: Ranks that compute each layer together. The product of both divides the ranks.
            ep_size: Ranks that divide experts among them. It divides what is left.

        Raises:
            InvalidArgumentError: INVALID_FIELD: more ranks than GPUs, where there are GPUs.
            UnimplementedError: NOT_IMPLEMENTED: several ranks with a torch that lacks what they need.
        """
        place = _from_environment("RANK", 0), _from_environment("LOCAL_RANK", 0)
        world_size, local_world_size = _from_environment("WORLD_SIZE", 1), _from_environment("LOCAL_WORLD_SIZE", 1)
        assert world_size % (dp_replicate_size * tp_size * ep_size) == 0
        if world_size == 1:
            return cls(*place, world_size, local_world_size)
        import torch
        from torch import distributed
        from torch.distributed.fsdp import FSDPModule

        if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
            text = f"{world_size} ranks need torch 2.13 or newer, and this is {torch.__version__}; upgrade it."
            raise error("NOT_IMPLEMENTED", text)
        cuda = torch.cuda.is_available()
        if cuda and torch.cuda.device_count() < local_world_size:
            raise invalid_field(
                "nproc_per_node",
                f"is {local_world_size}, and this machine has {torch.cuda.device_count()} GPUs; each rank needs one.",
            )
        if cuda:
            torch.cuda.set_device(place[1])
        timeout = timedelta(seconds=timeout_s)
        meeting_place = _meeting_place(timeout_s)
        distributed.init_process_group(
            "nccl" if cuda else "gloo",
            rank=place[0],
            world_size=world_size,
            timeout=timeout,
            **meeting_place,
        )

        def channel(timeout: timedelta) -> Channel:
            group = distributed.new_group(backend="gloo", timeout=timeout)
            return Channel(group, rank=place[0], world_size=world_size)

        return cls(
            *place,
            world_size,
            local_world_size,
            dp_replicate_size,
            tp_size,
            ep_size,
            commands=channel(_ENDLESS),
            turns=channel(_ENDLESS),
            execution=channel(timeout),
            files=channel(timeout),
            timeout_s=timeout_s,
            meeting_place=meeting_place.get("store"),
        )


def _meeting_place(timeout_s: float) -> dict[str, Any]:
    """Where init_process_group finds the other ranks: in a file on one machine, through the trainer on several."""
    path, start_id = os.environ[RANK_STORE_VARIABLE], os.environ.get(START_ID_VARIABLE)
    if not start_id:
        return {"init_method": f"file://{path}"}
    from trainer_service.engine.rank_store_client import RankStore

    return {"store": RankStore(path, start_id, timeout_s=timeout_s)}


def _from_environment(name: str, default: int) -> int:
    return int(os.environ.get(name) or default)


def _int64(value: int) -> Any:
    import torch

    return torch.tensor([value], dtype=torch.int64)


def _room(size: int) -> Any:
    import torch

    return torch.empty(size, dtype=torch.uint8)


def _bytes(message: bytes) -> Any:
    import torch

    return torch.frombuffer(bytearray(message), dtype=torch.uint8) if message else _room(0)
