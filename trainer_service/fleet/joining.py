"""A machine that takes part in a worker whose trainer is on another: `gradwire worker --join`.

It connects to the trainer, shows the join token, and starts and ends the ranks of this machine as it is told. When the
connection breaks, for whatever reason, it ends them, and joins again: a trainer that is started again finds it waiting.
"""

import asyncio
import logging
import secrets
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
from gradwire._wire.channels import parse_base_url
from gradwire._wire.protocol_version import __version__
from gradwire.errors import GradwireError, to_status
from gradwire.v1.node_service_pb2 import (
    AccessRequest,
    AccessResponse,
    NodeAlive,
    NodeCommand,
    NodeEnded,
    NodeEvent,
    NodeFacts,
    NodeHello,
    NodeStart,
    NodeWelcome,
)
from gradwire.v1.node_service_pb2_grpc import NodeServiceStub, RankStoreServiceStub

from trainer_service import model_folder
from trainer_service.addresses import split_address
from trainer_service.command_lines import SettingsError
from trainer_service.config import NodeConfig
from trainer_service.executing import take_reason
from trainer_service.fleet.gpus import count_gpus
from trainer_service.fleet.node_health import NodeHealth
from trainer_service.fleet.nodes import KEEPALIVE
from trainer_service.fleet.rank_processes import Place, RankProcesses, worker_environment
from trainer_service.fleet.rank_store import rank_store_handler
from trainer_service.fleet.worker_socket import WorkerSocket
from trainer_service.join_token import as_metadata
from trainer_service.network_interfaces import interface_of
from trainer_service.processes import told_to_stop
from trainer_service.worker_config import HEARTBEAT_INTERVAL_S, SPARE_VARIABLE

logger = logging.getLogger(__name__)

_CONNECT_S = 5.0
_PAUSES_S = (0.5, 1.0, 2.0, 3.0)
"""Between attempts to connect; the last one again and again."""
_REFUSALS = (
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.ALREADY_EXISTS,
)
"""How a trainer says that this node shall not come again as it is."""


class JoinRefusedError(Exception):
    """The trainer refuses this node; the message is for who started it."""


class JoiningNode:
    """This machine's part.

    Args:
        config: Its settings.
        token: The join token.
        health: Is told whether it has joined; None where nobody asks.
    """

    def __init__(self, config: NodeConfig, token: str, *, health: NodeHealth | None = None) -> None:
        self._config = config
        self._health = health
        self._metadata = as_metadata(token)
        try:
            self._target, self._encrypted = parse_base_url(config.join, what="--join")
        except ValueError as exc:
            raise SettingsError(str(exc)) from exc
        if not self._encrypted and config.tls is not None:
            raise SettingsError(f"--tls-… are for --join https://…, and --join is {config.join}.")
        self._instance_id = secrets.token_hex(16)
        self._socket = WorkerSocket(store=rank_store_handler(self._access))
        self._channel: grpc.aio.Channel | None = None
        self._events: asyncio.Queue[NodeEvent] = asyncio.Queue()
        self._joined = False
        self._model = ""
        self._starts: dict[str, asyncio.Task[None]] = {}
        """What becomes of each start, by its id."""
        self._told: dict[str, _Told] = {}

    async def run(self) -> None:
        """Takes part until it is cancelled.

        Raises:
            JoinRefusedError: The trainer refuses this node.
            OSError: No private folder can be made.
        """
        failures, said = 0, ""
        try:
            while True:
                await self._socket.open()
                try:
                    how = await self._take_part()
                    failures = 0
                except (OSError, grpc.RpcError) as exc:
                    how = str(exc)
                if how != said:
                    text = "Waiting for the trainer."
                    logger.warning(text, extra={"fields": {"join": self._config.join, "why": how}})
                said = how
                await asyncio.sleep(_PAUSES_S[min(failures, len(_PAUSES_S) - 1)])
                failures += 1
        finally:
            await self._socket.close()

    async def _take_part(self) -> str:
        """Joins, and does as told until the connection ends; returns how it did."""
        # Tells the interface by which the trainer is reached, and a machine that is not there from one that refuses.
        address = await asyncio.to_thread(_address_towards, self._target)
        interface = interface_of(address)
        self._events, self._joined = asyncio.Queue(), False
        async with self._open_channel() as self._channel:
            call = NodeServiceStub(self._channel).Join(self._outgoing(), metadata=self._metadata)
            try:
                hello = NodeHello(
                    node_rank=self._config.node_rank, software_version=__version__, instance_id=self._instance_id
                )
                self._events.put_nowait(NodeEvent(hello=hello))
                while isinstance(command := await call.read(), NodeCommand):
                    await self._do(command, interface)
                code, details = await call.code(), await call.details()
            except grpc.RpcError as exc:
                code, details = exc.code(), exc.details()  # pyright: ignore[reportAttributeAccessIssue]
            finally:
                call.cancel()
                await self._note_joined(False)
                await self._end_all()
        if code in _REFUSALS:
            raise JoinRefusedError(str(details))
        return "the trainer has gone" if code == grpc.StatusCode.OK else f"{code.name}: {details}"

    async def _outgoing(self) -> AsyncIterator[NodeEvent]:
        """Events as they come, and once joined a sign of life every second."""
        while True:
            try:
                yield await asyncio.wait_for(self._events.get(), HEARTBEAT_INTERVAL_S if self._joined else None)
            except TimeoutError:
                yield NodeEvent(alive=NodeAlive())

    def _open_channel(self) -> grpc.aio.Channel:
        options = [*KEEPALIVE, ("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
        if not self._encrypted:
            return grpc.aio.insecure_channel(self._target, options)
        tls = self._config.tls
        ca, key, cert = (
            (None, None, None) if tls is None else (_read(tls.ca_file), _read(tls.key_file), _read(tls.cert_file))
        )
        credentials = grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=cert)
        return grpc.aio.secure_channel(self._target, credentials, options)

    async def _do(self, command: NodeCommand, interface: str) -> None:
        match command.WhichOneof("command"):
            case "welcome":
                facts = await asyncio.to_thread(self._find, command.welcome)
                facts.num_gpus = await count_gpus()
                self._model = facts.base_model
                self._events.put_nowait(NodeEvent(facts=facts))
            case "accepted":
                await self._note_joined(True)
                # Wakes what waits for an event without an end.
                self._events.put_nowait(NodeEvent(alive=NodeAlive()))
                logger.info("Joined.", extra={"fields": {"join": self._config.join, "interface": interface}})
            case "start":
                start = command.start
                self._told[start.start_id] = told = _Told()
                self._starts[start.start_id] = asyncio.create_task(self._run_ranks(start, told, interface))
            case "begin":
                if (told := self._told.get(command.begin)) is not None:
                    told.begin.set()
            case "stop":
                if (told := self._told.get(command.stop.start_id)) is not None:
                    told.grace_s = command.stop.grace_ms / 1000
                    told.stop.set()
            case other:
                logger.error(
                    "The trainer sent a command that this node does not know.", extra={"fields": {"is": other}}
                )

    async def _note_joined(self, joined: bool) -> None:
        self._joined = joined
        if self._health is not None:
            await self._health.set_joined(joined)

    def _find(self, welcome: NodeWelcome) -> NodeFacts:
        """What the trainer wants to know of this machine."""
        model = self._config.base_model or welcome.base_model
        facts = NodeFacts(base_model=model, shared_contents=map(_content, welcome.shared_files))
        try:
            facts.model_digest = model_folder.digest(model_folder.fetch(model))
        except (GradwireError, OSError) as exc:
            facts.model_error = exc.message if isinstance(exc, GradwireError) else str(exc)
        return facts

    async def _run_ranks(self, start: NodeStart, told: "_Told", interface: str) -> None:
        """Ranks of one start, from their first to their last moment."""
        env = worker_environment(**({SPARE_VARIABLE: "1"} if start.spare else {}))
        options = [*start.options, f"--base-model={self._model}"]
        command = [sys.executable, "-m", "trainer_service.engine", f"--socket={self._socket.path}", *options]
        place = Place(start.local_world_size, self._config.node_rank, start.nnodes, interface, start.start_id)
        ended = NodeEnded(start_id=start.start_id)
        try:
            logger.info("Starting ranks.", extra={"fields": {"ranks": start.local_world_size, "spare": start.spare}})
            ranks = await RankProcesses.start(command, env=env, folder=self._socket.folder, place=place)
        except OSError as exc:
            ended.reason = f"The worker could not be started: {exc}."
        else:
            try:
                ended.reason = await self._until_ended(ranks, told)
                ended.killed = ranks.killed
                if (because := take_reason(self._socket.path)) is not None:
                    ended.because.ParseFromString(to_status(because).SerializeToString())
            finally:
                await ranks.stop(grace_s=told.grace_s)
        logger.info("Ranks have ended.", extra={"fields": {"why": ended.reason}})
        self._events.put_nowait(NodeEvent(ended=ended))
        self._told.pop(start.start_id, None)
        self._starts.pop(start.start_id, None)

    async def _until_ended(self, ranks: RankProcesses, told: "_Told") -> str:
        ends = [asyncio.create_task(each) for each in (ranks.one_ended(), told.stop.wait())]
        begin = asyncio.create_task(told.begin.wait())
        begin.add_done_callback(lambda task: None if task.cancelled() else ranks.begin())
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (*ends, begin):
                task.cancel()
        return await ranks.explain(how="was told to end")

    async def _end_all(self) -> None:
        """Ends what runs: nobody is left to talk to."""
        for told in self._told.values():
            told.grace_s = 0.0
            told.stop.set()
        await asyncio.gather(*self._starts.values(), return_exceptions=True)

    async def _access(self, request: AccessRequest, context: grpc.aio.ServicerContext) -> AccessResponse:
        """Passes on what a rank here asks the common store."""
        assert self._channel is not None
        try:
            access = RankStoreServiceStub(self._channel).Access
            return await access(request, metadata=self._metadata, timeout=context.time_remaining())
        except grpc.aio.AioRpcError as exc:
            return await context.abort(exc.code(), exc.details() or "")


class _Told:
    """What the trainer has told of one start."""

    def __init__(self) -> None:
        self.begin = asyncio.Event()
        self.stop = asyncio.Event()
        self.grace_s = 0.0


async def serve_node(config: NodeConfig, token: str) -> int:
    """Takes part until SIGTERM, SIGINT or (exit_with_parent) EOF on stdin.

    Returns:
        The process's exit code: the one that config says, or 1 if the trainer refuses this node.

    Raises:
        OSError: The health's address cannot be used, or no private folder be made.
    """
    told = asyncio.create_task(told_to_stop(exit_with_parent=config.exit_with_parent))
    health = None if config.health_listen is None else NodeHealth(config.health_listen)
    node = JoiningNode(config, token, health=health)
    if health is None:
        return await _until_told(node, told, config)
    await health.start()
    try:
        return await _until_told(node, told, config)
    finally:
        await health.stop()


async def _until_told(node: JoiningNode, told: "asyncio.Task[None]", config: NodeConfig) -> int:
    running = asyncio.create_task(node.run())
    try:
        await asyncio.wait([told, running], return_when=asyncio.FIRST_COMPLETED)
    finally:
        told.cancel()
        running.cancel()
        # Its server must have stopped before the event loop does, whoever ended this.
        await asyncio.wait([running])
    if running.cancelled():
        return config.stop_exit_code
    try:
        running.result()
    except JoinRefusedError as exc:
        print(f"gradwire: {exc}", file=sys.stderr)
    return 1


def _address_towards(target: str) -> str:
    """This machine's address as the other end of a connection sees it, or would without address translation."""
    with socket.create_connection(split_address(target), timeout=_CONNECT_S) as connection:
        return str(connection.getsockname()[0])


def _content(path: str) -> str:
    """What a small file says; "" if it is not there."""
    try:
        with Path(path).open() as file:
            return file.read(256)
    except (OSError, ValueError):
        return ""


def _read(file: Path | None) -> bytes | None:
    return None if file is None else file.read_bytes()
