"""From the trainer's commands to the engine's calls and back: protos on one side, arrays on the other.

`prepare` decodes and checks a command and may run ahead on another thread; `execute` runs on the device thread,
strictly in order. A command that was refused while being prepared still takes its turn: its failure is delivered, and
marks the run, when it would have executed.
"""

import logging
import time
from collections.abc import Callable, Mapping

from google.protobuf.message import Message
from gradwire.errors import GradwireError, error, to_status
from gradwire.v1.trainer_service_pb2 import TrainResponse
from gradwire.v1.worker_service_pb2 import WorkerCommand, WorkerDone, WorkerEvent

from trainer_service.engine.device import broken
from trainer_service.engine.engine import Engine
from trainer_service.engine.sampling.service import Sampling
from trainer_service.engine.worker import sampling_commands
from trainer_service.engine.worker.operations import RunOperations
from trainer_service.engine.worker.prepared import Prepared, Work
from trainer_service.engine.worker.run_life import RunLife
from trainer_service.executing import Executing

logger = logging.getLogger(__name__)

_QUICK_BYTES = 64 * 1024
_ANSWERED_LATER = ("snapshot_run", "sample")


def overtakes(command: WorkerCommand) -> bool:
    """Whether a command belongs to sampling, which does not wait for the operations before it."""
    return command.WhichOneof("command") in sampling_commands.KINDS


def quickly_prepared(command: WorkerCommand) -> bool:
    """Whether an operation is so small that it is prepared in about a millisecond."""
    return command.request.ByteSize() <= _QUICK_BYTES


class Commands:
    """Executes the trainer's commands on an engine.

    Args:
        engine: Holds the runs.
        send: Sends an answer that comes later, from another thread.
        sampling: Samples beside the runs; None refuses to sample.
        executing: Where the leader notes what it executes; None for another rank.
    """

    def __init__(
        self,
        engine: Engine,
        send: Callable[[WorkerEvent], object],
        sampling: Sampling | None = None,
        executing: Executing | None = None,
    ) -> None:
        self._engine = engine
        engine.counters.memory_limit_bytes = engine.device.total_bytes()
        self._sampling = sampling
        self._operations = RunOperations(engine, sampling)
        self._run_life = RunLife(engine, sampling, send, executing)

    def prepare(self, command: WorkerCommand) -> Prepared:
        """Decodes and checks a command. Never raises: an error is raised when the command's turn comes."""
        received_s = time.monotonic()
        kind = command.WhichOneof("command")
        seq_id = command.request.seq_id if kind == "request" else None
        what = (command.request.WhichOneof("operation") if kind == "request" else kind) or "nothing"
        try:
            work = self._dispatch(what, command)
        except Exception as exc:
            work = self._refused(command.run_id, seq_id, what, exc)
        later = what in _ANSWERED_LATER
        return Prepared(
            command.command_id, command.run_id, seq_id, what, work, received_s=received_s, answered_later=later
        )

    def execute(self, prepared: Prepared) -> WorkerEvent | None:
        """Executes a command on the device. Returns the answer; None if it is sent later.

        Raises:
            Exception: The device cannot be used any more; the process must end.
        """
        counters = self._engine.counters
        started_s = time.monotonic()
        answer: Message | None = None
        failure: GradwireError | None = None
        try:
            answer = prepared.work()
        except GradwireError as exc:
            failure = exc
            logger.info(f"Refused {prepared.what}.", extra={"fields": {"reason": exc.reason, "why": exc.message}})
        except Exception as exc:
            logger.exception(f"Failed in {prepared.what}.", extra={"fields": {"seq_id": prepared.seq_id}})
            # Other ranks may be waiting for this one in the middle of it.
            if broken(exc) or self._engine.ranks.world_size > 1:
                raise
            text = f"{prepared.what} failed because of a bug in Gradwire; the worker's log has the details."
            failure = error("INTERNAL", text)
        self._engine.ranks.check_alike(failure.reason if failure else "")
        execute_s = time.monotonic() - started_s
        counters.busy_seconds_total += execute_s
        counters.memory_bytes = self._engine.device.take_peak_bytes()
        event = WorkerEvent(command_id=prepared.command_id)
        if prepared.seq_id is None:
            event.done.CopyFrom(WorkerDone(error=to_status(failure) if failure else None))
        else:
            counters.operations_total += 1
            counters.failed_operations_total += failure is not None
            event.response.CopyFrom(
                TrainResponse(
                    seq_id=prepared.seq_id,
                    queue_ms=(started_s - prepared.received_s) * 1000,
                    execute_ms=execute_s * 1000,
                )
            )
            if failure is not None:
                event.response.error.CopyFrom(to_status(failure))
            else:
                getattr(event.response, prepared.what).CopyFrom(answer)
        event.counters.update(counters.as_metrics())
        return None if prepared.answered_later and failure is None else event

    def note_counters(self, rank: int, counters: Mapping[str, float]) -> None:
        """What another rank has counted so far, as it says itself; kept for the next answer."""
        if counters:
            self._engine.counters.others[rank] = counters

    def _dispatch(self, what: str, command: WorkerCommand) -> Work:
        if command.HasField("request"):
            return self._operations.prepare(command.run_id, command.request)
        if what in self._run_life.kinds:
            return self._run_life.prepare(what, command)
        if what in sampling_commands.KINDS and self._sampling is not None:
            return sampling_commands.prepare_sampling(what, command, self._sampling)
        raise error("PROTOCOL_VIOLATION", "The worker was sent an unknown command.")

    def _refused(self, run_id: str, seq_id: int | None, what: str, exc: Exception) -> Work:
        def work() -> None:
            if seq_id is not None:
                self._operations.refused(run_id, seq_id, what)
            raise exc

        return work
