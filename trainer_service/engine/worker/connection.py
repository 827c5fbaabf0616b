"""The worker's end of its connection to the trainer. Light: no torch."""

import contextlib
import select
import socket
import threading
from collections import deque
from collections.abc import Iterator

from gradwire.errors import GradwireError, from_status
from gradwire.v1.worker_service_pb2 import WorkerCommand, WorkerEvent

from trainer_service.worker_frames import Frames, frame


class TrainerConnection:
    """Sends events in order, receives commands, and notices at once when the connection ends.

    Args:
        socket_path: Path of the trainer's unix socket.
        max_message_bytes: The trainer's limit on one operation.

    Raises:
        OSError: Nobody listens there.
    """

    def __init__(self, socket_path: str, *, max_message_bytes: int) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(socket_path)
        # Twice the limit of one message: an operation travels inside a command, which is a little larger.
        self._frames = Frames(2 * max_message_bytes)
        self._refusal: GradwireError | None = None
        self._reading = threading.Lock()  # Held by whoever reads first, who reads to the end.
        self._sending = threading.Condition()
        self._unsent: deque[memoryview] = deque()
        self._finished = False
        self.ended = threading.Event()
        """Set as soon as the connection has ended, whatever this process is doing."""
        threading.Thread(target=self._watch, name="connection-end", daemon=True).start()
        threading.Thread(target=self._send_rest, name="connection-rest", daemon=True).start()

    def commands(self) -> Iterator[WorkerCommand]:
        """The commands, as they come, until the connection ends; for one thread."""
        if not self._reading.acquire(blocking=False):
            return  # It has ended.
        with contextlib.suppress(OSError):
            while count := self._socket.recv_into(self._frames.room()):
                for message in self._frames.arrived(count):
                    command = WorkerCommand.FromString(message)  # pyright: ignore[reportArgumentType]  (bytes, it says)
                    if command.HasField("refused"):
                        self._refusal = from_status(command.refused)
                    else:
                        yield command

    def send(self, event: WorkerEvent) -> None:
        """Sends an event, from any thread; never blocks."""
        encoded = memoryview(frame(event.SerializeToString()))
        with self._sending:
            if not self._unsent:
                sent = 0  # What the socket does not take at once, another thread sends.
                try:
                    sent = self._socket.send(encoded, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    pass
                except OSError:
                    return  # The trainer is gone, which `ended` says.
                encoded = encoded[sent:]
            if encoded:
                self._unsent.append(encoded)
                self._sending.notify_all()

    def finish(self) -> None:
        """Tells the trainer that no more events come, once those before are sent."""
        with self._sending:
            self._finished = True
            self._sending.notify_all()

    def ended_cleanly(self) -> bool:
        """After the end: whether the trainer ended too, rather than refused this worker."""
        return self._refusal is None

    def describe_end(self) -> str:
        """After the end: how the connection ended, in words."""
        return "the connection is closed" if self._refusal is None else f"refused: {self._refusal.message}"

    def _send_rest(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                with self._sending:
                    self._sending.wait_for(lambda: self._unsent or self._finished)
                    if not self._unsent:
                        self._socket.shutdown(socket.SHUT_WR)
                        return
                    encoded = self._unsent[0]
                self._socket.sendall(encoded)
                with self._sending:
                    # Only now, so that nothing overtakes it.
                    self._unsent.popleft()

    def _watch(self) -> None:
        """Notices the end although nobody reads."""
        ends = select.poll()
        ends.register(self._socket, getattr(select, "POLLRDHUP", 0))
        ends.poll()
        # While it loads, this process reads no commands; the trainer may have said why it ends the connection.
        for _ in self.commands():
            pass
        self.ended.set()
