"""One run: its sequence, the worker that executes it, and the client that holds it."""

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime

from gradwire.errors import GradwireError, error
from gradwire.v1.run_pb2 import RUN_STATE_ACTIVE, RUN_STATE_LOST
from gradwire.v1.run_pb2 import Run as RunMessage
from gradwire.v1.trainer_service_pb2 import TrainResponse
from gradwire.v1.worker_service_pb2 import WorkerCommand, WorkerDropGraphs

from trainer_service.fleet.worker import Reply, Worker
from trainer_service.runs.operation import Operation
from trainer_service.runs.sequence import Answered, Entry, Sequence, error_response

Observe = Callable[[str, TrainResponse], object]
"""Gets kind and answer of every operation, for metrics."""


class Attachment:
    """A client's hold on a run, until it leaves or loses it."""

    def __init__(self, client_id: str) -> None:
        self.client_id = client_id
        self.taken: asyncio.Future[GradwireError] = asyncio.get_running_loop().create_future()
        """Done, with the reason, when the client no longer holds the run."""

    def take(self, reason: GradwireError) -> None:
        """Ends the hold."""
        if not self.taken.done():
            self.taken.set_result(reason)


class Run:
    """Takes operations in order, sends them ahead to the worker, brings their answers back.

    Args:
        run_id: Identifier.
        base_model: What it started from.
        display_name: The user's name for it.
        worker: Executes its operations.
        observe: Told of every answer.
        detach_grace_s: How long graphs are kept after the client has gone.
        max_in_flight: Operations a client may have in flight; see Sequence.
        owner: Whose it is; see access.Caller.
        refuse: Says, by kind, why an operation may not run now; None when it may.
    """

    def __init__(
        self,
        run_id: str,
        *,
        base_model: str,
        display_name: str,
        worker: Worker,
        observe: Observe,
        detach_grace_s: float,
        max_in_flight: int,
        owner: str = "",
        refuse: Callable[[str], GradwireError | None] = lambda kind: None,
    ) -> None:
        self.owner = owner
        self._refuse = refuse
        self.run_id = run_id
        self.base_model = base_model
        self.display_name = display_name
        self.created_at = datetime.now(UTC)
        self.step = 0
        self.attachment: Attachment | None = None
        self._answered = asyncio.Event()  # Set at every answer; whoever waits for room clears it.
        self._worker = worker
        self._observe = observe
        self._detach_grace_s = detach_grace_s
        self._drop_timer: asyncio.TimerHandle | None = None
        self._sequence = Sequence(min_retained_answers=max_in_flight)
        self._lost: GradwireError | None = None

    @property
    def next_seq_id(self) -> int:
        """The number of the next new operation."""
        return self._sequence.next_seq_id

    @property
    def unanswered(self) -> int:
        """Operations received and not yet answered."""
        return self._sequence.unanswered

    @property
    def lost(self) -> bool:
        """Whether its state is gone."""
        return self._lost is not None

    def submit(self, operation: Operation, answered: Answered) -> None:
        """Takes an operation in and sends it to the worker.

        Raises:
            GradwireError: The operation has no place in the order; see Sequence.receive.
        """
        # Whoever sends an operation, again perhaps, has no answer to it, whatever the message says.
        self._sequence.acknowledge(min(operation.request.acked_seq_id, operation.seq_id - 1))
        entry = self._sequence.receive(operation, answered)
        if entry is None:
            return
        kind, received = operation.kind, time.perf_counter()

        def fail(exc: GradwireError) -> None:
            response = error_response(entry.seq_id, exc)
            self._answer(entry, kind, response, response.SerializeToString())

        def deliver(outcome: Reply | GradwireError) -> None:
            if isinstance(outcome, GradwireError):
                fail(outcome)
                return
            response = outcome.event.response
            total_ms = (time.perf_counter() - received) * 1000
            # What neither the wait in the worker nor the device took was the way there and back.
            response.transfer_ms = max(0.0, total_ms - response.queue_ms - response.execute_ms)
            # Of a field that comes twice the last counts, so what the trainer adds goes behind what the worker said.
            added = TrainResponse(seq_id=entry.seq_id, transfer_ms=response.transfer_ms)
            encoded = b"".join((outcome.encoded_response, added.SerializeToString()))
            self._answer(entry, kind, response, encoded)

        if self._lost is not None:
            fail(self._lost)
        elif (refusal := self._refuse(kind)) is not None:
            fail(refusal)
        else:
            self._worker.submit(WorkerCommand(run_id=self.run_id), deliver, request=operation.encoded)

    def acknowledge(self, acked_seq_id: int) -> None:
        """Lets go of answers the client has."""
        self._sequence.acknowledge(acked_seq_id)

    async def execute(self, operation: Operation) -> TrainResponse:
        """One operation and its answer. The operation goes on if the caller stops waiting.

        Raises:
            GradwireError: As submit.
        """
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.submit(operation, lambda answer: None if future.done() else future.set_result(answer))
        return TrainResponse.FromString(await future)

    async def room(self, limit: int) -> None:
        """Returns once fewer than `limit` operations wait for their answer."""
        while self._sequence.unanswered >= limit:
            self._answered.clear()
            await self._answered.wait()

    async def quiet(self) -> None:
        """Returns once no operation waits for its answer."""
        await self.room(1)

    def attach(self, client_id: str) -> Attachment:
        """Takes hold of the run; who held it before is told."""
        if self.attachment is not None:
            text = f"Another client attached to {self.run_id}; this stream is over."
            self.attachment.take(error("ATTACH_SUPERSEDED", text, run_id=self.run_id))
        if self._drop_timer is not None:
            self._drop_timer.cancel()
            self._drop_timer = None
        self.attachment = Attachment(client_id)
        return self.attachment

    def detach(self, attachment: Attachment) -> None:
        """The client's stream ended; if none comes back in time, what it alone could use goes."""
        if self.attachment is not attachment:
            return
        self.attachment = None
        self._drop_timer = asyncio.get_running_loop().call_later(self._detach_grace_s, self._drop_graphs)

    def lose(self, reason: GradwireError) -> None:
        """The worker died and took the run's state with it."""
        if self._lost is None:
            text = f"{self.run_id} is lost: {reason.message} Create a new run."
            self._lost = error("RUN_LOST", text, run_id=self.run_id)

    def close(self) -> None:
        """The run is deleted."""
        if self._drop_timer is not None:
            self._drop_timer.cancel()
        gone = error("RUN_NOT_FOUND", f"{self.run_id} was deleted.", run_id=self.run_id)
        if self.attachment is not None:
            self.attachment.take(gone)
        self.lose(gone)

    def describe(self) -> RunMessage:
        """The run as the protocol tells it."""
        message = RunMessage(
            run_id=self.run_id,
            base_model=self.base_model,
            state=RUN_STATE_LOST if self._lost is not None else RUN_STATE_ACTIVE,
            next_seq_id=self.next_seq_id,
            step=self.step,
            display_name=self.display_name,
            attached=self.attachment is not None,
        )
        message.created_at.FromDatetime(self.created_at)
        return message

    def _drop_graphs(self) -> None:
        self._drop_timer = None
        if self._lost is None:
            command = WorkerCommand(run_id=self.run_id, drop_graphs=WorkerDropGraphs())
            self._worker.submit(command, lambda _: None)

    def _answer(self, entry: Entry, kind: str, response: TrainResponse, encoded: bytes) -> None:
        if (result := response.WhichOneof("result")) in ("optim_step", "load_state"):
            self.step = getattr(response, result).step
        self._observe(kind, response)
        self._sequence.answer(entry, encoded)
        self._answered.set()
