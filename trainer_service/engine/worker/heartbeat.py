"""Tells the trainer that this process runs, whatever it executes. Light: no torch."""

import threading
from collections.abc import Callable

from gradwire.v1.worker_service_pb2 import WorkerEvent, WorkerHeartbeat

from trainer_service.worker_config import HEARTBEAT_INTERVAL_S


def start_heartbeat(send: Callable[[WorkerEvent], object], ended: threading.Event) -> None:
    """Sends a heartbeat every second until `ended`, on a thread of its own.

    A long forward does not delay it, while in a stopped process no thread runs.

    Args:
        send: Queues an event; does not block.
        ended: Set once nobody listens.
    """

    def beat() -> None:
        while not ended.wait(HEARTBEAT_INTERVAL_S):
            send(WorkerEvent(heartbeat=WorkerHeartbeat()))

    threading.Thread(target=beat, name="heartbeat", daemon=True).start()
