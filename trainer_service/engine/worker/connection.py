"""The worker's end of the stream to its trainer. Light: no torch."""

import queue
import socket
import threading
from typing import Any

import grpc
from gradwire.v1.worker_service_pb2 import WorkerEvent
from gradwire.v1.worker_service_pb2_grpc import WorkerServiceStub


class TrainerConnection:
    """Sends events in order, receives commands, and notices at once when the stream ends.

    Args:
        socket_path: Path of the trainer's unix socket.
        max_message_bytes: The trainer's limit on one operation.

    Raises:
        OSError: Nobody listens there.
    """

    def __init__(self, socket_path: str, *, max_message_bytes: int) -> None:
        # Connected by hand first: gRPC does not tell a trainer that was never there from one that left.
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(socket_path)
        # Twice the limit of one message: an operation travels inside a command, which is a little larger.
        largest = 2 * max_message_bytes
        options = [
            ("grpc.max_receive_message_length", largest),
            ("grpc.max_send_message_length", largest),
            ("grpc.enable_http_proxy", 0),
        ]
        self._channel = grpc.insecure_channel(f"unix:{socket_path}", options=options)
        self._events: queue.SimpleQueue[WorkerEvent | None] = queue.SimpleQueue()
        # Typed as Any: gRPC's stubs do not say that a call is iterable, has a code and takes callbacks.
        self.commands: Any = WorkerServiceStub(self._channel).Attach(iter(self._events.get, None))
        """Iterates over the commands; raises grpc.RpcError when the stream breaks off."""
        self.ended = threading.Event()
        """Set as soon as the stream has ended, whatever this process is doing."""
        if not self.commands.add_callback(self.ended.set):
            self.ended.set()

    def send(self, event: WorkerEvent) -> None:
        """Queues an event; never blocks."""
        self._events.put(event)

    def finish(self) -> None:
        """Tells the trainer that no more events come."""
        self._events.put(None)

    def ended_cleanly(self) -> bool:
        """After the end: whether the trainer ended too, rather than refused this worker."""
        # How a trainer that leaves looks from here, for whatever reason.
        gone = (grpc.StatusCode.OK, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
        return self.commands.code() in gone

    def describe_end(self) -> str:
        """After the end: how the stream ended, in words."""
        return f"{self.commands.code().name} {self.commands.details()}".strip()
