"""One run's Train stream: sends operations in order, brings answers back, survives lost connections.

Everything here runs on the loop's thread.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio

from gradwire._client.loop import LOOP
from gradwire._client.order import Call, CallOrder, OutgoingOperation
from gradwire._client.retries import Backoff, is_broken_stream
from gradwire._client.transport import Connection
from gradwire.errors import (
    GradwireError,
    InternalError,
    OperationCancelledError,
    UnavailableError,
    error,
    from_status,
)
from gradwire.types.server_info import Limits
from gradwire.v1 import trainer_service_pb2
from gradwire.v1.operation_pb2 import CancelRequest
from gradwire.v1.trainer_service_pb2 import AttachRequest, TrainRequest, TrainResponse

logger = logging.getLogger("gradwire")

_ACK_DELAY_S = 0.2
"""An answer that no later operation acknowledges in passing is acknowledged by a message of its own after this."""
_WINDOW_BYTES = 64 * 1024 * 1024
"""Bytes sent and not answered; beyond it the SDK waits. Holds at least one message of the largest size."""
_TRAIN = f"/{trainer_service_pb2.DESCRIPTOR.services_by_name['TrainerService'].full_name}/Train"
_STATUS_TIMEOUT_S = 5.0
"""How long a broken stream's status may take to arrive."""


class _StreamLost(Exception):
    """The connection broke; the run and its operations live on."""

    def __init__(self, error: GradwireError) -> None:
        super().__init__(str(error))
        self.error = error


class RunStream:
    """The stream of one run.

    Args:
        connection: To the run's trainer.
        run_id: The run to attach to.
        limits: What the trainer announced.
        reconnect_timeout_s: How long a lost connection is tried again before every waiting operation fails.
    """

    def __init__(self, connection: Connection, run_id: str, limits: Limits, reconnect_timeout_s: float) -> None:
        self._connection = connection
        self.run_id = run_id
        self._limits = limits
        self._reconnect_timeout_s = reconnect_timeout_s
        self._client_id = uuid.uuid4().hex
        self._order = CallOrder()
        self._in_flight: dict[int, OutgoingOperation] = {}
        self._in_flight_bytes = 0
        self._next_seq_id = 1
        self._refused: dict[int, TrainRequest] = {}  # See _remember_refused.
        self._acked_sent = 0
        self._ack_timer: asyncio.TimerHandle | None = None
        self._ack_due = False
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._attached = False
        self._over: GradwireError | None = None
        self._left: Callable[[], object] | None = None

    def submit(self, call: Call) -> None:
        """Puts a call in the line; a call made after the stream is over fails at once with what ended it."""
        for operation in call.operations:
            if operation.size_bytes > self._limits.max_message_bytes:
                too_large = _too_large(operation.size_bytes, self._limits.max_message_bytes)
                for each in list(call.operations):
                    each.failed(too_large)
                return
        self._order.add(call)
        self._kick()

    def extend(self, call: Call, operation: OutgoingOperation, *, more: bool) -> None:
        """Adds the next operation to a call that was submitted with more to come."""
        if self._over is not None:
            operation.failed(self._over)
            return
        self._order.extend(call, operation, more=more)
        self._wake.set()

    def break_off(self, call: Call, sent: list[OutgoingOperation]) -> None:
        """The rest of a call will not come: gradients that lack it must not be applied."""
        self._order.break_off(call)
        seq_ids = [operation.request.seq_id for operation in sent if operation.request.seq_id]
        if seq_ids and self._over is None:
            cancel = TrainRequest(cancel=CancelRequest(forward_seq_ids=seq_ids, taint=True))
            self.overtake([OutgoingOperation(cancel, answered=lambda _: None, failed=lambda _: None)])

    def overtake(self, operations: list[OutgoingOperation]) -> None:
        """Sends operations of an open custom loss before everything that waits."""
        self._order.overtake(operations)
        self._kick()

    def close_call(self, call: Call) -> None:
        """The custom loss has handed over its last operation; what waited for it may go."""
        self._order.close(call)
        self._wake.set()
        self._leave_if_idle()

    def barrier_waits(self) -> bool:
        """Whether an optim_step or its like waits behind the open custom losses."""
        return self._order.barrier_waits()

    def leave(self, left: Callable[[], object]) -> None:
        """Leaves the run once everything that was called is answered, and calls `left()`. Nobody will call again."""
        self._left = left
        self._leave_if_idle()

    def close(self) -> None:
        """Leaves the run: whatever is not answered yet fails with OperationCancelledError."""
        if self._over is None:
            self._end(
                OperationCancelledError("The training client was closed before this was answered.", reason="CANCELLED")
            )
        if self._task is not None:
            self._task.cancel()

    def _leave_if_idle(self) -> None:
        if self._left is not None and not self._in_flight and self._order.idle():
            left, self._left = self._left, None
            self.close()
            left()

    def _kick(self) -> None:
        if self._over is not None:
            self._fail_waiting(self._over)
        elif self._task is None:
            self._connection.streams.add(self)
            self._task = LOOP.start(self._run_once(), name=f"gradwire-{self.run_id}")
        else:
            self._wake.set()

    async def _run_once(self) -> None:
        try:
            await self._run()
        finally:
            self._connection.streams.discard(self)

    async def _run(self) -> None:
        """Keeps a stream up until the run is over for this client."""
        lost_at: float | None = None
        backoff = Backoff()
        while True:
            try:
                await self._attach_and_serve()
            except _StreamLost as lost:
                if not self._in_flight and self._order.idle():
                    # Nobody waits for anything; the next call reattaches.
                    logger.debug("%s: connection lost while idle (%s).", self.run_id, lost.error)
                    self._task = None
                    return
                if self._attached:
                    lost_at = None
                    backoff.reset()
                now = time.monotonic()
                if lost_at is None:
                    lost_at = now
                    logger.warning(
                        "%s: connection lost (%s) Trying again for %g s.",
                        self.run_id,
                        lost.error,
                        self._reconnect_timeout_s,
                    )
                if now - lost_at > self._reconnect_timeout_s:
                    self._end(
                        UnavailableError(
                            f"{self.run_id}: gave up after {self._reconnect_timeout_s:g} s without a connection to "
                            f"{self._connection.base_url}. Last error: {lost.error}",
                            reason=lost.error.reason,
                            metadata=lost.error.metadata,
                        )
                    )
                    return
                await asyncio.sleep(backoff.next_s())
            except GradwireError as exc:
                self._end(exc)
                return

    async def _attach_and_serve(self) -> None:
        """One connection's life. Raises _StreamLost when another one may go on, GradwireError when not."""
        self._attached = False
        call = self._train()(metadata=self._connection.metadata)
        tasks: list[asyncio.Task[None]] = []
        try:
            attach = AttachRequest(run_id=self.run_id, client_id=self._client_id)
            await call.write(TrainRequest(attach=attach).SerializeToString())
            first = await call.read()
            if not isinstance(first, TrainResponse):
                raise await self._ended(call)
            if first.WhichOneof("result") == "error":
                raise from_status(first.error)
            self._take_up(first)
            tasks = [asyncio.create_task(self._write(call)), asyncio.create_task(self._read(call))]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                exc = task.exception()
                # grpc raises these two from a read or write on a call that has ended; its status says why.
                if exc is not None and not isinstance(exc, grpc.aio.AioRpcError | asyncio.InvalidStateError):
                    logger.exception("%s: the client's stream failed.", self.run_id, exc_info=exc)
                    raise InternalError(f"{self.run_id}: the client's own stream failed: {exc!r}.", reason="INTERNAL")
            raise await self._ended(call)
        except grpc.aio.AioRpcError as exc:
            raise self._classify(self._connection.explain(exc, "Train")) from None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            call.cancel()

    def _train(self) -> Any:
        """The Train call over messages that are already encoded."""
        return self._connection.channel().stream_stream(_TRAIN, None, TrainResponse.FromString)

    def _take_up(self, first: TrainResponse) -> None:
        """Agrees with the trainer on the next number."""
        expected = first.attached.next_seq_id
        answered = [seq_id for seq_id in range(expected, self._next_seq_id) if seq_id not in self._in_flight]
        if lost := [seq_id for seq_id in answered if seq_id not in self._refused]:
            raise error(
                "RUN_LOST",
                f"{self.run_id}: the trainer expects operation {expected}, but answered up to {max(lost)} before: "
                "it lost part of the run. Create a new run.",
                expected=expected,
            )
        for seq_id in answered:
            again = OutgoingOperation(self._refused[seq_id], answered=lambda _: None, failed=lambda _: None)
            self._in_flight[seq_id] = again
            self._in_flight_bytes += again.size_bytes
        self._in_flight = dict(sorted(self._in_flight.items()))
        # Beyond ours: another client used the run since; its numbers are taken.
        self._next_seq_id = max(self._next_seq_id, expected)
        self._attached = True
        self._acked_sent = 0

    async def _ended(self, call: grpc.aio.StreamStreamCall) -> Exception:
        """What the end of a stream means."""
        try:
            code = await asyncio.wait_for(call.code(), _STATUS_TIMEOUT_S)
        except TimeoutError:
            return _StreamLost(UnavailableError("the stream broke without a status."))
        details = await call.details()
        if code is grpc.StatusCode.OK or code is grpc.StatusCode.CANCELLED:
            return _StreamLost(UnavailableError(f"the trainer ended the stream: {details or code.name}."))
        exc = grpc.aio.AioRpcError(code, await call.initial_metadata(), await call.trailing_metadata(), details, None)
        return self._classify(self._connection.explain(exc, "Train"))

    def _classify(self, exc: GradwireError) -> Exception:
        """Whether another connection may go on where this one broke."""
        return _StreamLost(exc) if is_broken_stream(exc) else exc

    async def _write(self, call: grpc.aio.StreamStreamCall) -> None:
        for operation in list(self._in_flight.values()):
            await call.write(operation.encode())
        while True:
            operation = self._order.next() if self._window_open() else None
            if operation is not None:
                seq_id, self._next_seq_id = self._next_seq_id, self._next_seq_id + 1
                operation.request.seq_id = seq_id
                # In flight first: an operation must not acknowledge its own answer.
                self._in_flight[seq_id] = operation
                operation.request.acked_seq_id = self._acked_sent = self._acked()
                self._in_flight_bytes += operation.size_bytes
                await call.write(operation.encode())
            elif self._ack_due:
                self._ack_due = False
                self._acked_sent = self._acked()
                await call.write(TrainRequest(acked_seq_id=self._acked_sent).SerializeToString())
            else:
                self._wake.clear()
                await self._wake.wait()

    async def _read(self, call: grpc.aio.StreamStreamCall) -> None:
        while True:
            response = await call.read()
            if not isinstance(response, TrainResponse):
                return  # grpc's end of stream.
            operation = self._in_flight.pop(response.seq_id, None)
            if operation is None:
                continue  # Answered before the connection broke, and again after.
            self._in_flight_bytes -= operation.size_bytes
            if not self._order.idle():
                self._wake.set()
            if self._ack_timer is None:
                self._ack_timer = asyncio.get_running_loop().call_later(_ACK_DELAY_S, self._acknowledge)
            self._remember_refused(operation, response)
            operation.answered(response)
            self._leave_if_idle()

    def _remember_refused(self, operation: OutgoingOperation, response: TrainResponse) -> None:
        """A trainer whose disk is so full that not even a refusal can be written down has forgotten it when it is
        killed, and the number is free again: what then takes its place leaves on the run the mark of the refusal."""
        if response.WhichOneof("result") != "error" or from_status(response.error).reason != "STORAGE_FAILED":
            # Written down, and with it what was refused before.
            if self._refused:
                self._refused = {n: kept for n, kept in self._refused.items() if n > response.seq_id}
            return
        request = TrainRequest.FromString(operation.encode())
        taint = request.WhichOneof("operation") in ("forward_backward", "backward") or request.cancel.taint
        cancel = CancelRequest(forward_seq_ids=[response.seq_id], taint=taint)
        self._refused[response.seq_id] = TrainRequest(seq_id=response.seq_id, cancel=cancel)

    def _acknowledge(self) -> None:
        self._ack_timer = None
        if self._acked() > self._acked_sent:
            self._ack_due = True
            self._wake.set()

    def _acked(self) -> int:
        return (min(self._in_flight) if self._in_flight else self._next_seq_id) - 1

    def _window_open(self) -> bool:
        return len(self._in_flight) < self._limits.max_in_flight_operations and (
            self._in_flight_bytes < _WINDOW_BYTES or not self._in_flight
        )

    def _end(self, exc: GradwireError) -> None:
        self._over = exc
        if self._ack_timer is not None:
            self._ack_timer.cancel()
        self._fail_waiting(exc)
        self._leave_if_idle()

    def _fail_waiting(self, exc: GradwireError) -> None:
        waiting = [*self._in_flight.values(), *self._order.drain()]
        self._in_flight.clear()
        for operation in waiting:
            operation.failed(exc)


def _too_large(size_bytes: int, limit: int) -> GradwireError:
    return error(
        "LIMIT_EXCEEDED",
        f"The call needs a message of {size_bytes} bytes, but the trainer takes messages of at most {limit} bytes. "
        "Send shorter sequences, names and settings.",
        limit=limit,
        got=size_bytes,
    )
