"""Commands sent one after the other, without a process or a socket."""

from typing import Any

from gradwire.errors import GradwireError, from_status
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.trainer_service_pb2 import TrainRequest, TrainResponse
from gradwire.v1.worker_service_pb2 import (
    WorkerCommand,
    WorkerEvent,
)

from tests.engines import RUN
from trainer_service.engine.worker.commands import Commands


def never(event: WorkerEvent) -> None:
    """Fails the test: no command here is answered later."""
    raise AssertionError(event)


class Driver:
    """Sends commands one after the other, and takes their answers."""

    def __init__(self, commands: Commands) -> None:
        self.commands = commands
        self.seq_id = 0

    def command(self, **fields: Any) -> WorkerCommand:
        self.seq_id += 1
        if "request" in fields:
            fields["request"].seq_id = self.seq_id
        return WorkerCommand(**{"command_id": 1000 + self.seq_id, "run_id": RUN, **fields})

    def send(self, **operation: Any) -> TrainResponse:
        """The answer to one operation."""
        event = self.execute(self.command(request=TrainRequest(**operation)))
        assert event.response.seq_id == self.seq_id
        return event.response

    def execute(self, command: WorkerCommand) -> WorkerEvent:
        event = self.commands.execute(self.commands.prepare(command))
        assert event is not None
        assert event.command_id == command.command_id
        return event

    def refused(self, **operation: Any) -> GradwireError:
        """Why an operation was refused."""
        response = self.send(**operation)
        assert response.WhichOneof("result") == "error"
        return from_status(response.error)

    def step(self) -> TrainResponse:
        return self.send(optim_step=ops.OptimStepRequest(learning_rate=1e-2))
