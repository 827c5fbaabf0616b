"""One client's Train stream: operations up, answers down."""

import asyncio
import logging
from typing import Any

import grpc
import grpc.aio
from gradwire.errors import GradwireError, error
from gradwire.v1.trainer_service_pb2 import AttachResponse, TrainRequest, TrainResponse

from trainer_service.rpc.border import Malformed
from trainer_service.runs.run import Attachment, Run
from trainer_service.runs.sequence import error_response

logger = logging.getLogger(__name__)


class TrainStream:
    """Serves one stream that has attached to a run.

    Args:
        run: The run.
        context: The call.
        max_in_flight: Operations of the run that may wait for their answer; no more is read meanwhile.
        draining: Set when the trainer shuts down.
    """

    def __init__(
        self, run: Run, context: grpc.aio.ServicerContext, *, max_in_flight: int, draining: asyncio.Event
    ) -> None:
        self._run = run
        self._context = context
        self._max_in_flight = max_in_flight
        self._draining = draining
        self._outgoing: asyncio.Queue[TrainResponse] = asyncio.Queue()

    async def serve(self, client_id: str) -> None:
        """Until the client leaves, another takes the run, or the trainer drains.

        Raises:
            GradwireError: What the stream ends with, unless the client ended it.
        """
        attachment = self._run.attach(client_id)
        attached = AttachResponse(next_seq_id=self._run.next_seq_id, step=self._run.step)
        await self._context.write(TrainResponse(attached=attached))
        logger.info("Attached.", extra={"fields": {"run_id": self._run.run_id}})
        tasks = [
            asyncio.create_task(self._read()),
            asyncio.create_task(self._write()),
            asyncio.create_task(self._until_superseded(attachment)),
            asyncio.create_task(self._until_drained()),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._run.detach(attachment)
            logger.info("Detached.", extra={"fields": {"run_id": self._run.run_id}})

    async def _read(self) -> None:
        """Takes operations in, no faster than they are answered."""
        while True:
            request: Any = await self._context.read()
            if isinstance(request, Malformed):
                raise request.exc
            if not isinstance(request, TrainRequest):
                # The client sends no more; it may still be waiting for answers.
                await self._quiet()
                return
            self._receive(request)
            await self._run.room(self._max_in_flight)
            if self._draining.is_set():
                await asyncio.Event().wait()  # Reads no further; _until_drained ends the stream.

    def _receive(self, request: TrainRequest) -> None:
        kind = request.WhichOneof("operation")
        if kind is None:
            if request.seq_id:
                raise error("PROTOCOL_VIOLATION", f"The message with seq_id {request.seq_id} has no operation.")
            self._run.acknowledge(request.acked_seq_id)
            return
        if kind == "attach":
            raise error("PROTOCOL_VIOLATION", "attach came again; it is the first message of a stream, and only that.")
        if not request.seq_id:
            raise error("PROTOCOL_VIOLATION", f"The {kind} message has no seq_id; operations count from 1.")
        try:
            self._run.submit(request, self._outgoing.put_nowait)
        except GradwireError as exc:
            # The part fails, not the pipe.
            response = error_response(exc)
            response.seq_id = request.seq_id
            self._outgoing.put_nowait(response)

    async def _write(self) -> None:
        while True:
            await self._context.write(await self._outgoing.get())
            self._outgoing.task_done()

    async def _quiet(self) -> None:
        """Waits until everything received is answered and written."""
        await self._run.quiet()
        await self._outgoing.join()

    async def _until_superseded(self, attachment: Attachment) -> None:
        await attachment.superseded.wait()
        text = f"Another client attached to {self._run.run_id}, or it was deleted; this stream is over."
        raise error("ATTACH_SUPERSEDED", text, run_id=self._run.run_id)

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
    kind = first.WhichOneof("operation") if isinstance(first, TrainRequest) else None
    if kind != "attach":
        got = kind or "nothing"
        raise error("PROTOCOL_VIOLATION", f"The first message of a Train stream must be attach; got {got}.")
    return first
