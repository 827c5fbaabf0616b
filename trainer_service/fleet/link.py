"""One worker's connection, and the commands under way on it."""

import asyncio
import hmac
import logging
from collections import deque
from collections.abc import Callable

from google.protobuf.message import DecodeError
from gradwire._wire.protocol_version import __version__
from gradwire._wire.wire_format import embed, fields
from gradwire.errors import GradwireError, error, to_status
from gradwire.v1.worker_service_pb2 import WorkerCommand, WorkerEvent, WorkerHello, WorkerReady

from trainer_service.fleet.worker import Deliver, Died, Reply
from trainer_service.worker_frames import Frames, OversizedFrameError, frame

logger = logging.getLogger(__name__)

_HELLO_TIMEOUT_S = 30.0
"""A worker says hello as soon as it is connected."""
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
        self._line: WorkerLine | None = None
        self._dismissed = False
        self._pending: dict[int, Deliver] = {}
        self._last_command_id = 0

    def attach(self, line: "WorkerLine") -> None:
        """The worker is there."""
        self.attached, self._line = True, line
        if self._dismissed:
            line.close()

    def dismiss(self) -> None:
        """Ends the worker's stream, which ends the worker too."""
        self._dismissed = True
        if self._line is not None:
            self._line.close()

    def submit(self, command: WorkerCommand, deliver: Deliver, *, request: bytes = b"") -> None:
        """Sends the worker a command; see Worker.submit."""
        self._last_command_id += 1
        command.command_id = self._last_command_id
        self._pending[command.command_id] = deliver
        if self._line is not None:
            parts = embed(_REQUEST, request) if request else []
            self._line.send(command.SerializeToString(), *parts)

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


class WorkerLine(asyncio.BufferedProtocol):
    """The trainer's end of a connection that a worker made, from its hello to its end.

    Args:
        current: Gives the link that a worker may take, or None.
        on_ready: Called when a worker has loaded its model.
        max_message_bytes: The largest event it accepts.
    """

    def __init__(
        self, current: Callable[[], Link | None], on_ready: Callable[[], object], *, max_message_bytes: int
    ) -> None:
        self._current = current
        self._on_ready = on_ready
        self._frames = Frames(max_message_bytes)
        self._link: Link | None = None
        self._transport: asyncio.Transport | None = None
        self._no_hello: asyncio.TimerHandle | None = None  # Until it has come.
        self._paused = False
        self._unsent: deque[bytes] = deque()  # While the worker reads too slowly: the transport would copy it.

    def send(self, *parts: bytes | memoryview) -> None:
        """Sends a command, encoded in parts."""
        self._unsent.append(frame(*parts))
        self._flush()

    def close(self) -> None:
        """Ends the connection."""
        if self._transport is not None:
            self._transport.abort()

    # ── called by the event loop ──────────────────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._no_hello = asyncio.get_running_loop().call_later(_HELLO_TIMEOUT_S, self.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._stop_waiting_for_hello()
        self._unsent.clear()
        if self._link is not None:
            self._link.closed.set()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._flush()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._frames.room()

    def buffer_updated(self, nbytes: int) -> None:
        try:
            for message in self._frames.arrived(nbytes):
                if self._transport is None or self._transport.is_closing():
                    return
                self._received(message)
        except (OversizedFrameError, DecodeError) as exc:
            logger.error("What came over the worker's socket cannot be read.", extra={"fields": {"why": exc}})
            self.close()

    # ── inside ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _flush(self) -> None:
        while self._unsent and not self._paused and self._transport is not None:
            self._transport.write(self._unsent.popleft())

    def _received(self, message: bytes | bytearray) -> None:
        event = WorkerEvent.FromString(message)  # pyright: ignore[reportArgumentType]  (its stubs know only bytes)
        if self._link is None:
            self._greet(event.hello)
            return
        response = memoryview(b"")
        if event.HasField("response"):
            response = next(inner for number, _, inner in fields(memoryview(message)) if number == _RESPONSE)
        self._receive(self._link, Reply(event, response))

    def _greet(self, hello: WorkerHello) -> None:
        self._stop_waiting_for_hello()
        link = self._current()
        if link is None or link.attached or not _same(hello.token, link.token):
            logger.warning("Refused a caller on the worker's socket.")
            self._refuse(error("TRAINER_JOB_FAILED", "Not a worker this trainer started."))
            return
        if hello.software_version != __version__:
            text = (
                f"The worker is gradwire {hello.software_version}, but the trainer is {__version__}; install the same "
                "version of both."
            )
            link.failure = error("TRAINER_JOB_FAILED", text)
            self._refuse(link.failure)
            return
        self._link = link
        link.counters |= {
            f"gradwire_worker_{field.name}": float(getattr(hello.mesh, field.name))
            for field in hello.mesh.DESCRIPTOR.fields
        }
        link.attach(self)
        link.spoke.set()
        logger.info("Worker attached.", extra={"fields": {"pid": hello.pid, "ranks": hello.mesh.world_size}})

    def _stop_waiting_for_hello(self) -> None:
        if self._no_hello is not None:
            self._no_hello.cancel()
            self._no_hello = None

    def _refuse(self, why: GradwireError) -> None:
        self.send(WorkerCommand(refused=to_status(why)).SerializeToString())
        if self._transport is not None:
            # Once that is written.
            self._transport.close()

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
