"""One client's Train stream: operations up, answers down."""

import asyncio
import logging
from typing import Any

import grpc
import grpc.aio
from gradwire.errors import GradwireError, error
from gradwire.v1.trainer_service_pb2 import AttachResponse, TrainRequest, TrainResponse

from trainer_service.config import Limits
from trainer_service.field_limits import find_excess
from trainer_service.rpc.bounded_messages import Malformed, Received
from trainer_service.rpc.checkpoint_gate import CheckpointGate
from trainer_service.runs.attachment import Attachment
from trainer_service.runs.operation import Operation
from trainer_service.runs.run import Run
from trainer_service.runs.sequence import error_response

logger = logging.getLogger(__name__)

MAX_UNWRITTEN_BYTES = 256 * 1024 * 1024
"""Bytes of answers held for a client that does not read them."""


class TrainStream:
    """Serves one stream that has attached to a run.

    It stops reading while the run has max_in_flight_operations unanswered, or too many bytes of them, or while the
    client has not yet read that many answers, or MAX_UNWRITTEN_BYTES of them. That slows the client down; nothing
    fails.

    Args:
        run: The run.
        context: The call.
        limits: The most a client may send, and max_in_flight_operations.
        draining: Set when the trainer shuts down.
        gate: The gate for saves and loads.
    """

    def __init__(
        self,
        run: Run,
        context: grpc.aio.ServicerContext,
        *,
        limits: Limits,
        draining: asyncio.Event,
        gate: CheckpointGate,
    ) -> None:
        self._gate = gate
        self._storing: set[asyncio.Task[None]] = set()
        self._run = run
        self._context = context
        self._limits = limits
        self._max_in_flight = limits.max_in_flight_operations
        self._draining = draining
        self._outgoing: asyncio.Queue[bytes] = asyncio.Queue()
        self._unwritten_bytes = 0
        self._written = asyncio.Event()

    async def serve(self, client_id: str) -> None:
        """Returns once the client leaves, another takes the run, or the trainer drains.

        Raises:
            GradwireError: What the stream ends with, unless the client ended it.
        """
        attachment = self._run.attach(client_id)
        attached = AttachResponse(next_seq_id=self._run.next_seq_id, step=self._run.step)
        logger.info("Attached.", extra={"fields": {"run_id": self._run.run_id, "client_id": client_id}})
        tasks: list[asyncio.Task[None]] = []
        try:
            await self._context.write(TrainResponse(attached=attached))
            tasks += [
                asyncio.create_task(self._read(attachment)),
                asyncio.create_task(self._write()),
                asyncio.create_task(self._until_taken(attachment)),
                asyncio.create_task(self._until_drained()),
            ]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self._run.detach(attachment)
            logger.info("Detached.", extra={"fields": {"run_id": self._run.run_id, "client_id": client_id}})
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, attachment: Attachment) -> None:
        """Receives operations, no faster than they are answered."""
        while True:
            received: Any = await self._context.read()
            if isinstance(received, Malformed):
                raise received.exc
            if not isinstance(received, Received):
                # The client sends no more, but may still wait for answers.
                await self._quiet()
                return
            if self._draining.is_set() or attachment.taken.done():
                # No longer ours to receive: the stream is about to end.
                await asyncio.Event().wait()
            operation = self._operation(received)
            await self._gate.before(self._run, operation)
            self._receive(operation)
            await self._run.room(self._max_in_flight)
            while self._outgoing.qsize() >= self._max_in_flight or self._unwritten_bytes >= MAX_UNWRITTEN_BYTES:
                self._written.clear()
                await self._written.wait()

    def _operation(self, received: Received) -> Operation:
        operation = Operation(received.outline, received.encoded, received.memory_bytes)
        if not operation.kind:
            return operation
        request = operation.request
        content = getattr(request, operation.kind)
        trace = TrainRequest(traceparent=request.traceparent, tracestate=request.tracestate)
        refusal = find_excess(content, self._limits) or find_excess(trace, self._limits)
        if refusal is None:
            return operation
        return Operation.refused(operation.kind, content, refusal, seq_id=operation.seq_id)

    def _receive(self, operation: Operation) -> None:
        request, kind = operation.request, operation.kind
        if not kind:
            if request.seq_id:
                raise error("PROTOCOL_VIOLATION", f"The message with seq_id {request.seq_id} has no operation.")
            self._run.acknowledge(request.acked_seq_id)
            return
        if kind == "attach":
            raise error("PROTOCOL_VIOLATION", "attach came again; only the first message of a stream is attach.")
        if not request.seq_id:
            raise error("PROTOCOL_VIOLATION", f"The {kind} message has no seq_id; operations count from 1.")
        try:
            self._run.submit(operation, self._put_when_stored if self._gate.stores(operation) else self._put)
        except GradwireError as exc:
            # The operation fails, not the stream.
            self._put(error_response(request.seq_id, exc).SerializeToString())

    def _put(self, answer: bytes) -> None:
        self._unwritten_bytes += len(answer)
        self._outgoing.put_nowait(answer)

    def _put_when_stored(self, answer: bytes) -> None:
        async def put() -> None:
            self._put(await self._gate.after(answer))

        task = asyncio.get_running_loop().create_task(put())
        self._storing.add(task)
        task.add_done_callback(self._storing.discard)

    async def _write(self) -> None:
        while True:
            answer = await self._outgoing.get()
            await self._context.write(answer)
            self._unwritten_bytes -= len(answer)
            self._outgoing.task_done()
            self._written.set()

    async def _quiet(self) -> None:
        """Waits until everything received is answered and written."""
        await self._run.quiet()
        await asyncio.gather(*self._storing)
        await self._outgoing.join()

    async def _until_taken(self, attachment: Attachment) -> None:
        raise await attachment.taken

    async def _until_drained(self) -> None:
        await self._draining.wait()
        await self._quiet()
        raise error("DRAINING", "The trainer is shutting down. Everything received was answered.", retry_after_s=5.0)


async def read_attach(context: grpc.aio.ServicerContext) -> TrainRequest:
    """The first message of a stream.

    Raises:
        GradwireError: PROTOCOL_VIOLATION: it is something else.
    """
    first: Any = await context.read()
    if isinstance(first, Malformed):
        raise first.exc
    request: Any = first.outline if isinstance(first, Received) else TrainRequest()
    if request.WhichOneof("operation") != "attach":
        got = request.WhichOneof("operation") or "nothing"
        raise error("PROTOCOL_VIOLATION", f"The first message of a Train stream must be attach; got {got}.")
    return request
