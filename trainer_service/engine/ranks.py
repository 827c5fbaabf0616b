"""This process's place among the worker's ranks, from its environment."""

import os
from dataclasses import dataclass
from typing import TypeVar

from gradwire.errors import error

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's place; a single process is rank 0 of 1."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls) -> "Ranks":
        """From RANK, LOCAL_RANK and WORLD_SIZE; a single process if they are not set.

        Raises:
            UnimplementedError: More than one rank.
        """
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size != 1:
            raise error(
                "NOT_IMPLEMENTED",
                f"The worker was started with {world_size} ranks; this version trains with one.",
            )
        return cls(
            rank=int(os.environ.get("RANK", "0")),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            world_size=world_size,
        )

    def broadcast(self, command: T) -> T:
        """Broadcasts rank 0's command to every rank, which executes it; for a single process, the command itself."""
        assert self.world_size == 1
        return command
