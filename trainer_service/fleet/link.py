"""The WorkerService: one worker's connection, and the commands under way on it."""

import asyncio
import contextlib
import hmac
import logging
from collections.abc import Callable

import grpc
import grpc.aio
from gradwire._wire.protocol_version import __version__
from gradwire._wire.wire_format import embed, fields
from gradwire.errors import GradwireError, error
from gradwire.v1 import worker_service_pb2
from gradwire.v1.worker_service_pb2 import WorkerCommand, WorkerEvent, WorkerReady

from trainer_service.fleet.worker import Deliver, Died, Reply

logger = logging.getLogger(__name__)

SERVICE = worker_service_pb2.DESCRIPTOR.services_by_name["WorkerService"].full_name
_REQUEST = WorkerCommand.DESCRIPTOR.fields_by_name["request"].number
_RESPONSE = WorkerEvent.DESCRIPTOR.fields_by_name["response"].number


class Link:
    """Commands to one worker process and its answers, matched by command_id.

    Args:
        token: The secret by which the process proves to be the worker.
        status_message: The status until the worker reports one.
    """

    def __init__(self, token: str, status_message: str) -> None:
        self.token = token
        self.ready: WorkerReady | None = None
        self.status_message = status_message
        self.failure: GradwireError | None = None
        """Why this worker can never work, if that is known."""
        self.counters: dict[str, float] = {}
        self.attached = False
        self.spoke = asyncio.Event()
        """Set whenever the worker has sent something other than a heartbeat."""
        self.heard = asyncio.Event()
        """Set whenever the worker has sent anything, heartbeats included."""
        self.responding = True
        """Whether something came a short while ago; kept once the worker is ready, see silence.py."""
        self.silent_s = 0.0
        """How long nothing has come, to the second."""
        self.closed = asyncio.Event()
        """Set once the worker's stream has ended."""
        self.dismissed = asyncio.Event()
        """Set to end the worker's stream, which ends the worker too."""
        self.outgoing: asyncio.Queue[bytes] = asyncio.Queue()
        """Encoded commands."""
        self._pending: dict[int, Deliver] = {}
        self._last_command_id = 0

    def submit(self, command: WorkerCommand, deliver: Deliver, *, request: bytes = b"") -> None:
        """Queues a command for the worker; see Worker.submit."""
        self._last_command_id += 1
        command.command_id = self._last_command_id
        self._pending[command.command_id] = deliver
        encoded = command.SerializeToString()
        self.outgoing.put_nowait(b"".join((encoded, *embed(_REQUEST, request))) if request else encoded)

    def answer(self, reply: Reply) -> None:
        """Hands an answer to whoever waits for it."""
        command_id = reply.event.command_id
        last = reply.event.WhichOneof("event") != "sampled"
        deliver = self._pending.pop(command_id, None) if last else self._pending.get(command_id)
        if deliver is None:
            logger.error("The worker answered a command that nobody sent.", extra={"fields": {"id": command_id}})
            return
        deliver(reply)

    def fail_pending(self, exc: GradwireError, *, executing: int = 0, because: GradwireError | None = None) -> None:
        """Tells all callers that wait that no answer will come.

        Args:
            exc: Why.
            executing: The command_id that the worker was executing; 0 for none.
            because: Why that command cannot be executed, where the worker has left that.
        """
        pending, self._pending = self._pending, {}
        for command_id, deliver in pending.items():
            died_of_it = command_id == executing
            deliver(Died(exc, executing=died_of_it, because=because if died_of_it else None))


def worker_service_handler(servicer: "WorkerServicer") -> grpc.GenericRpcHandler:
    """The WorkerService over encoded messages."""
    attach = grpc.stream_stream_rpc_method_handler(
        servicer.Attach, request_deserializer=_parse_event, response_serializer=_as_it_is
    )
    return grpc.method_handlers_generic_handler(SERVICE, {"Attach": attach})


def _parse_event(encoded: bytes) -> Reply:
    event = WorkerEvent.FromString(encoded)
    response = memoryview(b"")
    if event.HasField("response"):
        response = next(inner for number, _, inner in fields(memoryview(encoded)) if number == _RESPONSE)
    return Reply(event, response)


def _as_it_is(encoded: bytes) -> bytes:
    return encoded


class WorkerServicer:
    """Serves the worker that the supervisor started last.

    Args:
        current: Gives the link that a worker may take, or None.
        on_ready: Called when a worker has loaded its model.
    """

    def __init__(self, current: Callable[[], Link | None], on_ready: Callable[[], object]) -> None:
        self._current = current
        self._on_ready = on_ready

    async def Attach(self, request_iterator: object, context: grpc.aio.ServicerContext) -> None:
        """One worker, from its hello to its end."""
        first = await context.read()
        hello = first.event.hello if isinstance(first, Reply) else None
        link = self._current()
        if hello is None or link is None or link.attached or not _same(hello.token, link.token):
            logger.warning("Refused a caller on the worker's socket.")
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "Not a worker this trainer started.")
            return
        if hello.software_version != __version__:
            text = (
                f"The worker is gradwire {hello.software_version}, but the trainer is {__version__}; install the same "
                "version of both."
            )
            link.failure = error("TRAINER_JOB_FAILED", text)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)
            return
        link.attached = True
        link.counters |= {
            f"gradwire_worker_{field.name}": float(getattr(hello.mesh, field.name))
            for field in hello.mesh.DESCRIPTOR.fields
        }
        link.spoke.set()
        logger.info("Worker attached.", extra={"fields": {"pid": hello.pid, "ranks": hello.mesh.world_size}})
        tasks = [
            asyncio.create_task(self._read(link, context)),
            asyncio.create_task(self._write(link, context)),
            asyncio.create_task(link.dismissed.wait()),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            link.closed.set()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, link: Link, context: grpc.aio.ServicerContext) -> None:
        # grpc raises when the stream breaks; all that matters is that it ended.
        with contextlib.suppress(grpc.RpcError, grpc.aio.BaseError):
            while isinstance(reply := await context.read(), Reply):
                self._receive(link, reply)

    async def _write(self, link: Link, context: grpc.aio.ServicerContext) -> None:
        with contextlib.suppress(grpc.RpcError, grpc.aio.BaseError):
            while True:
                await context.write(await link.outgoing.get())

    def _receive(self, link: Link, reply: Reply) -> None:
        event = reply.event
        link.heard.set()
        if event.HasField("heartbeat"):
            return
        link.spoke.set()
        if event.counters:
            link.counters.update(event.counters)
        match event.WhichOneof("event"):
            case "response" | "done" | "sampled":
                link.answer(reply)
            case "loading":
                link.status_message = event.loading
            case "failed":
                link.failure = error("TRAINER_JOB_FAILED", event.failed.message)
            case "ready":
                link.ready = event.ready
                link.status_message = "ready"
                self._on_ready()
            case other:
                logger.error("The worker sent an event out of place.", extra={"fields": {"event": other}})


def _same(got: str, wanted: str) -> bool:
    return hmac.compare_digest(got.encode(), wanted.encode())
