"""The other machines (nodes) of a worker, as the trainer sees them: who has joined, and who may.

The trainer is on node 0 and listens at --rdzv-endpoint. Each other node runs `gradwire worker --join` (joining.py),
which stays connected, comes back when a connection breaks, and starts and ends its ranks as it is told.
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc
import grpc.aio
from google.rpc.status_pb2 import Status
from gradwire.errors import GradwireError, from_status
from gradwire.v1.node_service_pb2 import (
    AccessRequest,
    AccessResponse,
    NodeAccepted,
    NodeCommand,
    NodeEnded,
    NodeEvent,
    NodeHello,
    NodeWelcome,
)
from gradwire.v1.node_service_pb2_grpc import NodeServiceServicer, add_NodeServiceServicer_to_server

from trainer_service import model_folder
from trainer_service.addresses import join_address, listens_on_loopback, split_address
from trainer_service.config import NodeSettings, ServerTls
from trainer_service.fleet.join_policy import JoinPolicy, RefusedError, unknown_caller
from trainer_service.fleet.rank_store import RankStores, rank_store_handler
from trainer_service.fleet.silence import silent_seconds
from trainer_service.join_token import shows_token
from trainer_service.network_interfaces import interface_of, own_address
from trainer_service.open_files import connection_options
from trainer_service.ports import open_port

logger = logging.getLogger(__name__)

KEEPALIVE: Sequence[tuple[str, int]] = (
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
)
"""A peer that has vanished without a word is noticed within ten seconds; shorter cuts TCP gets over by itself."""
_SILENT_S = 10.0
"""Silence after which a node counts as gone. It sends something every second, and keepalive alone, seen to fail once,
does not notice a process that is stopped."""
_MAX_CONNECTIONS = 256
_MARKER = ".shared-with-nodes"
"""File by which a node sees that a folder is the trainer's: it has a secret of the trainer's in it."""


class Share:
    """One node's ranks of one start. `ended` is set to why they are no more."""

    def __init__(self, node: "Node", start_id: str) -> None:
        self.node = node
        self.start_id = start_id
        self.ended: asyncio.Future[NodeEnded] = asyncio.get_running_loop().create_future()


class Node:
    """A node that has joined.

    Args:
        hello: What it said.
        peer: Where it called from.
    """

    def __init__(self, hello: NodeHello, peer: str) -> None:
        self.rank = hello.node_rank
        self.instance_id = hello.instance_id
        self.peer = peer
        self.outgoing: asyncio.Queue[NodeCommand | None] = asyncio.Queue()
        """Commands; None ends the connection."""
        self.heard = asyncio.Event()
        """Set whenever it says something."""
        self._shares: dict[str, Share] = {}

    def tell(self, **command: object) -> None:
        """Queues a command."""
        self.outgoing.put_nowait(NodeCommand(**command))  # pyright: ignore[reportArgumentType]

    def share(self, start_id: str) -> Share:
        """This node's part in a start."""
        share = self._shares[start_id] = Share(self, start_id)
        return share

    def hear(self, event: NodeEvent) -> None:
        """Takes what it says."""
        self.heard.set()
        share = self._shares.pop(event.ended.start_id, None)
        if share is not None and not share.ended.done():
            share.ended.set_result(event.ended)

    def gone(self) -> None:
        """It is connected no more: whatever it ran has ended, or will as soon as it notices."""
        for start_id in [*self._shares]:
            text = f"the connection from {self.peer} has ended, or was silent."
            self.hear(NodeEvent(ended=NodeEnded(start_id=start_id, reason=text)))


class Nodes(NodeServiceServicer):
    """Who takes part. For one event loop.

    Args:
        settings: How many, and where they call.
        policy: What they must have.
        tls: The trainer's certificate, which it shows here too; None speaks plaintext.
    """

    def __init__(self, settings: NodeSettings, policy: JoinPolicy, *, tls: ServerTls | None) -> None:
        self.settings = settings
        self.policy = policy
        self.stores = RankStores()
        """Where ranks meet."""
        host, _ = split_address(settings.rdzv_endpoint)
        self.interface = interface_of(own_address(host, option="--rdzv-endpoint"))
        """By which nodes reach one another."""
        self.joined: dict[int, Node] = {}
        """By node rank."""
        self._tls = tls
        self._changed = asyncio.Event()
        self._server: grpc.aio.Server | None = None
        self._secret = secrets.token_hex(16)
        self._markers: list[Path] = []
        self._digest: asyncio.Task[str] | None = None

    @property
    def missing(self) -> list[int]:
        """Node ranks that have not joined."""
        return [rank for rank in range(1, self.settings.nnodes) if rank not in self.joined]

    async def open(self) -> None:
        """Listens.

        Raises:
            OSError: The address cannot be used, or a folder not be written.
        """
        self._markers = [folder / _MARKER for folder in self.policy.shared]
        for marker in self._markers:
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.write_text(self._secret)
        options = [*connection_options(_MAX_CONNECTIONS), *KEEPALIVE, ("grpc.so_reuseport", 0)]
        server = grpc.aio.server(options=options)
        add_NodeServiceServicer_to_server(self, server)
        server.add_generic_rpc_handlers((rank_store_handler(self._access),))
        host, port = split_address(self.settings.rdzv_endpoint)
        # Not the name, which may stand for more than this one.
        address = join_address(own_address(host, option="--rdzv-endpoint"), port)
        listens = open_port(server, address, self._tls)
        await server.start()
        self._server = server
        if self._tls is None and not listens_on_loopback(address):
            logger.warning("The join token crosses the network in plaintext; give --tls-cert-file.")
        logger.info("Waiting for nodes to join.", extra={"fields": {"address": listens, "interface": self.interface}})

    async def close(self) -> None:
        """Lets all go."""
        for node in self.joined.values():
            node.outgoing.put_nowait(None)
        if self._server is not None:
            await self._server.stop(grace=0.5)
        if self._digest is not None:
            self._digest.cancel()
            await asyncio.gather(self._digest, return_exceptions=True)
        for marker in self._markers:
            marker.unlink(missing_ok=True)

    async def complete(self, say: Callable[[str], object]) -> None:
        """Waits until all have joined.

        Args:
            say: Told who is waited for, in a sentence's part.

        Raises:
            GradwireError: INVALID_FIELD: the model is not to be had here.
        """
        say("looking for the model")
        await asyncio.shield(self._model_digest())
        while missing := self.missing:
            of = f"of {self.settings.nnodes} to join at {self.settings.rdzv_endpoint}"
            say(f"waiting for node {' and node '.join(map(str, missing))} {of}")
            await self._changed.wait()

    async def Join(self, request_iterator: object, context: grpc.aio.ServicerContext) -> None:
        """One node, from its hello to its end."""
        peer = context.peer() or ""
        try:
            node = await self._admit(peer, context)
        except RefusedError as refusal:
            fields = {"peer": peer, "why": str(refusal)}
            logger.warning("A node was refused.", extra={"fields": fields})
            await context.abort(refusal.code, str(refusal))
            return
        self._note()
        logger.info("A node joined.", extra={"fields": {"node_rank": node.rank, "peer": peer}})
        ends = (self._read(node, context), self._write(node, context), _silence(node))
        tasks = [asyncio.create_task(end) for end in ends]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._leave(node)

    def _check_free(self, hello: NodeHello) -> None:
        there = self.joined.get(hello.node_rank)
        if there is not None and there.instance_id != hello.instance_id:
            raise RefusedError(
                grpc.StatusCode.ALREADY_EXISTS,
                f"Node {hello.node_rank} has joined already, from {there.peer}; each node has a rank of its own.",
            )

    async def _admit(self, peer: str, context: grpc.aio.ServicerContext) -> Node:
        """A node that may take part and waits for commands.

        Raises:
            RefusedError: It may not, or has left.
        """
        if not self._known(context):
            raise unknown_caller()
        first = await context.read()
        hello = first.hello if isinstance(first, NodeEvent) else NodeHello()
        self.policy.check_hello(hello)
        self._check_free(hello)
        welcome = NodeWelcome(base_model=self.policy.base_model, shared_files=map(str, self._markers))
        await context.write(NodeCommand(welcome=welcome))
        second = await context.read()
        if not isinstance(second, NodeEvent):
            raise RefusedError(grpc.StatusCode.CANCELLED, f"Node {hello.node_rank} left before it had joined.")
        try:
            digest = await asyncio.shield(self._model_digest())
        except GradwireError as exc:
            raise RefusedError(grpc.StatusCode.UNAVAILABLE, exc.message) from exc
        self.policy.check_facts(hello.node_rank, second.facts, digest=digest, secret=self._secret)
        # Another may have come first meanwhile.
        self._check_free(hello)
        if (before := self.joined.get(hello.node_rank)) is not None:
            before.outgoing.put_nowait(None)
            before.gone()
        node = self.joined[hello.node_rank] = Node(hello, peer)
        node.tell(accepted=NodeAccepted())
        return node

    def _model_digest(self) -> "asyncio.Task[str]":
        if self._digest is None or (self._digest.done() and self._digest.exception() is not None):
            self._digest = asyncio.create_task(asyncio.to_thread(_digest_of, self.policy.base_model))
        return self._digest

    def _known(self, context: grpc.aio.ServicerContext) -> bool:
        return shows_token(context.invocation_metadata(), self.policy.token)

    async def _access(self, request: AccessRequest, context: grpc.aio.ServicerContext) -> AccessResponse:
        if not self._known(context):
            return await context.abort(grpc.StatusCode.UNAUTHENTICATED, "The join token is not the trainer's.")
        return await self.stores.access(request, context)

    async def _read(self, node: Node, context: grpc.aio.ServicerContext) -> None:
        # grpc raises when the stream breaks; all that matters is that it ended.
        with contextlib.suppress(grpc.RpcError, grpc.aio.BaseError):
            while isinstance(event := await context.read(), NodeEvent):
                node.hear(event)

    async def _write(self, node: Node, context: grpc.aio.ServicerContext) -> None:
        with contextlib.suppress(grpc.RpcError, grpc.aio.BaseError):
            while (command := await node.outgoing.get()) is not None:
                await context.write(command)

    def _leave(self, node: Node) -> None:
        if self.joined.get(node.rank) is node:
            del self.joined[node.rank]
        logger.warning("A node is gone.", extra={"fields": {"node_rank": node.rank, "peer": node.peer}})
        node.gone()
        self._note()

    def _note(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def because_of(ended: NodeEnded) -> GradwireError | None:
    """What a rank of a node left for the operation under way."""
    return from_status(Status.FromString(ended.because.SerializeToString())) if ended.HasField("because") else None


async def _silence(node: Node) -> None:
    """Returns once a node has said nothing for too long."""
    async for silent_s in silent_seconds(node.heard):
        if silent_s >= _SILENT_S:
            return


def _digest_of(base_model: str) -> str:
    return model_folder.digest(model_folder.fetch(base_model))
