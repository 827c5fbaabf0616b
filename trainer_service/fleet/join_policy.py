"""Which nodes may take part in a worker, and what one that may not is told."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
from gradwire._wire.protocol_version import __version__
from gradwire.v1.node_service_pb2 import NodeFacts, NodeHello


class RefusedError(Exception):
    """A node cannot take part.

    Args:
        code: gRPC's.
        text: Why, in a sentence.
    """

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(text)
        self.code = code


def unknown_caller() -> RefusedError:
    """What a caller without the join token is told."""
    return RefusedError(
        grpc.StatusCode.UNAUTHENTICATED,
        "The join token is missing or not the trainer's; GRADWIRE_JOIN_TOKEN or --join-token-file must be the same "
        "on all nodes.",
    )


@dataclass(frozen=True)
class JoinPolicy:
    """What a node must have to take part.

    Attributes:
        token: What it shows.
        nnodes: Machines, the trainer's among them.
        base_model: Hub id or folder of the model here.
        num_gpus: GPUs of this machine.
        local_world_size: Ranks on each machine.
        shared: Folders that all machines share.
    """

    token: str
    nnodes: int
    base_model: str
    num_gpus: int
    local_world_size: int
    shared: Sequence[Path]

    def check_hello(self, hello: NodeHello) -> None:
        """Refuses a node of another version, or one whose rank is not to be had.

        Raises:
            RefusedError: Says what it should be.
        """
        rank = hello.node_rank
        if hello.software_version != __version__:
            raise RefusedError(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"Node {rank} is gradwire {hello.software_version}, but the trainer is {__version__}; install the same "
                "version on all nodes.",
            )
        if rank == 0:
            raise RefusedError(
                grpc.StatusCode.INVALID_ARGUMENT, "Node rank 0 is the trainer's own machine; others begin at 1."
            )
        if rank >= self.nnodes:
            allowed = "only 1 is left" if self.nnodes == 2 else f"others are 1 to {self.nnodes - 1}"
            raise RefusedError(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"Node rank {rank} is one too many: --nnodes is {self.nnodes}, so {allowed}.",
            )

    def check_facts(self, rank: int, facts: NodeFacts, *, digest: str, secret: str) -> None:
        """Refuses a node without what it needs.

        Args:
            rank: The node's.
            facts: What it has.
            digest: Of the trainer's model.
            secret: What stands in each shared file.

        Raises:
            RefusedError: Says what it lacks.
        """
        if complaint := self._complaint(rank, facts, digest=digest, secret=secret):
            raise RefusedError(grpc.StatusCode.FAILED_PRECONDITION, complaint)

    def _complaint(self, rank: int, facts: NodeFacts, *, digest: str, secret: str) -> str:
        if facts.model_error:
            return f"Node {rank} has no model: {facts.model_error}"
        if facts.model_digest != digest:
            return (
                f"Node {rank} has another model in {facts.base_model} than the trainer in {self.base_model}: their "
                "config.json or safetensors files differ."
            )
        if bool(facts.num_gpus) != bool(self.num_gpus) or 0 < facts.num_gpus < self.local_world_size:
            return (
                f"Node {rank} has {facts.num_gpus} GPUs, and the trainer's machine {self.num_gpus}; each needs one for "
                f"each of its {self.local_world_size} ranks, or none has any."
            )
        contents = [*facts.shared_contents, *[""] * len(self.shared)]
        for folder, found in zip(self.shared, contents, strict=False):
            if found != secret:
                return (
                    f"Node {rank} does not share {folder} with the trainer: every rank writes and reads there, so it "
                    "must be on a file system that all nodes have, under this path."
                )
        return ""
