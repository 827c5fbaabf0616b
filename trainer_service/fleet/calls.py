"""A command to the worker, and its answer as a future. For answers that come in parts, see Worker.submit."""

import asyncio

from gradwire.errors import from_status
from gradwire.v1.worker_service_pb2 import WorkerCommand

from trainer_service.fleet.worker import Died, Reply, Worker


def send(worker: Worker, command: WorkerCommand, *, request: bytes = b"") -> "asyncio.Future[Reply | Died]":
    """Sends a command at once. The future never raises, so it may be dropped.

    Args:
        worker: The worker.
        command: What to do.
        request: For an operation, its encoded TrainRequest; see Worker.submit.
    """
    future: asyncio.Future[Reply | Died] = asyncio.get_running_loop().create_future()
    worker.submit(command, lambda outcome: None if future.done() else future.set_result(outcome), request=request)
    return future


def call(worker: Worker, command: WorkerCommand) -> "asyncio.Future[Reply]":
    """Sends a command that is not an operation, at once.

    Returns:
        A future that raises Died, or the GradwireError that the worker answers with.
    """
    future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()

    def deliver(outcome: Reply | Died) -> None:
        if future.done():
            return
        if isinstance(outcome, Died):
            future.set_exception(outcome)
        elif outcome.event.done.HasField("error"):
            future.set_exception(from_status(outcome.event.done.error))
        else:
            future.set_result(outcome)

    worker.submit(command, deliver)
    return future
