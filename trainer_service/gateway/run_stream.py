"""One run's Train stream, from the gateway's side: operations up in order, answers down, through lost connections."""

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from gradwire.errors import GradwireError, error, from_rpc_error, from_status, to_status
from gradwire.v1.trainer_service_pb2 import AttachRequest, TrainRequest, TrainResponse

from trainer_service.gateway.retries import is_broken_stream
from trainer_service.gateway.trainers import Trainer, metadata

logger = logging.getLogger(__name__)

_MAX_BACKOFF_S = 2.0

Answered = Callable[[TrainResponse], object]
"""Gets an operation's answer, an error too."""


@dataclass
class _Sent:
    """An operation that is not answered."""

    request: TrainRequest
    answered: Answered
    size_bytes: int


class RunStream:
    """The stream of one run. It attaches at once, and again whenever it is cut.

    Args:
        trainer: Where the run is.
        run_id: The run.
        key: Gives the caller's key, which may be renewed meanwhile.
        room: Called whenever there may be room for more.
    """

    def __init__(self, trainer: Trainer, run_id: str, key: Callable[[], str], room: Callable[[], object]) -> None:
        self._room = room
        self._trainer = trainer
        self._run_id = run_id
        self._key = key
        self._client_id = uuid.uuid4().hex
        self._unanswered: dict[int, _Sent] = {}
        self._unanswered_bytes = 0
        self._outgoing: asyncio.Queue[Any] = asyncio.Queue()
        self._acked = 0
        self._over: GradwireError | None = None
        self._attached: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._next_seq_id = 0
        self.attaches = 0
        """How often it attached to the run; graphs kept under an earlier attachment may be gone."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"gateway-{run_id}")

    async def attached(self) -> int:
        """The number of the next operation, once attached.

        Raises:
            GradwireError: The run cannot be attached to.
        """
        return await asyncio.shield(self._attached)

    @property
    def next_seq_id(self) -> int:
        """The number that the next operation sent gets."""
        return self._next_seq_id

    def has_room(self, *, operations: int, size_bytes: int) -> bool:
        """Whether fewer operations than that are unanswered."""
        return len(self._unanswered) < operations and self._unanswered_bytes <= size_bytes

    def send(self, kind: str, content: Any, answered: Answered, *, trace: Mapping[str, str] | None = None) -> int:
        """Sends the next operation, and returns its number. `answered` is called once, whatever happens.

        Args:
            kind: Name of TrainRequest's arm.
            content: Its message.
            answered: Gets the answer.
            trace: The context of whoever asked for it, as headers.
        """
        seq_id = self._next_seq_id
        self._next_seq_id += 1
        fields: dict[str, Any] = {kind: content, **(trace or {})}
        request = TrainRequest(seq_id=seq_id, **fields)
        if self._over is not None:
            answered(_failed(seq_id, self._over))
            return seq_id
        sent = _Sent(request, answered, request.ByteSize())
        self._unanswered[seq_id] = sent
        self._unanswered_bytes += sent.size_bytes
        self._outgoing.put_nowait(seq_id)
        return seq_id

    async def close(self) -> None:
        """Leaves the run. What is not answered fails as cancelled; the run may do it all the same."""
        self._end(error("CANCELLED", "The session ended before this was answered."))
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        delay_s = 0.05
        while True:
            before = self.attaches
            try:
                await self._serve()
                failed = error("DRAINING", "The trainer ended the stream.")
            except GradwireError as exc:
                failed = exc
            except Exception:
                logger.exception("A run's stream failed.", extra={"fields": {"run_id": self._run_id}})
                failed = error("INTERNAL", "The gateway failed at this; its log says more.")
            if not is_broken_stream(failed):
                self._end(failed)
                return
            delay_s = 0.05 if self.attaches > before else min(_MAX_BACKOFF_S, delay_s * 2)
            fields = {"run_id": self._run_id, "error": failed.message}
            logger.info("A run's stream was cut; trying again.", extra={"fields": fields})
            await asyncio.sleep(delay_s)

    async def _serve(self) -> None:
        """One connection's life.

        Raises:
            GradwireError: What it ended with.
        """
        call = self._trainer.runs.Train(metadata=metadata(self._key()))
        writer: asyncio.Task[None] | None = None
        try:
            await call.write(TrainRequest(attach=AttachRequest(run_id=self._run_id, client_id=self._client_id)))
            first = await call.read()
            if not isinstance(first, TrainResponse):
                return
            if first.WhichOneof("result") == "error":
                raise from_status(first.error)
            self._take_up(first.attached.next_seq_id)
            writer = asyncio.get_running_loop().create_task(self._write(call))
            while isinstance(response := await call.read(), TrainResponse):
                self._answer(response)
            # Raises what the trainer ended it with.
            if await call.code() is not grpc.StatusCode.OK:
                raise from_rpc_error(await _rpc_error(call))
        except grpc.aio.AioRpcError as exc:
            raise from_rpc_error(exc) from None
        except asyncio.InvalidStateError:
            raise from_rpc_error(await _rpc_error(call)) from None
        finally:
            if writer is not None:
                writer.cancel()
                await asyncio.gather(writer, return_exceptions=True)
            call.cancel()

    def _take_up(self, expected: int) -> None:
        """Agrees with the trainer on the next number."""
        if not self.attaches:
            self._next_seq_id = expected
        elif lost := [n for n in range(expected, self._next_seq_id) if n not in self._unanswered]:
            text = f"The trainer expects operation {expected}, but answered up to {max(lost)}: it lost part of the run."
            raise error("RUN_LOST", f"{text} Create a new model.", expected=expected)
        self.attaches += 1
        # All that is not answered goes again, in order: what the trainer has gets its first answer.
        self._outgoing = asyncio.Queue()
        for seq_id in self._unanswered:
            self._outgoing.put_nowait(seq_id)
        if not self._attached.done():
            self._attached.set_result(expected)

    async def _write(self, call: Any) -> None:
        while True:
            sent = self._unanswered.get(await self._outgoing.get())
            if sent is not None:
                sent.request.acked_seq_id = self._acked
                with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    # The reader tells what ended the call.
                    await call.write(sent.request)

    def _answer(self, response: TrainResponse) -> None:
        sent = self._unanswered.pop(response.seq_id, None)
        if sent is None:
            return
        self._unanswered_bytes -= sent.size_bytes
        self._acked = min(self._unanswered, default=self._next_seq_id) - 1
        sent.answered(response)
        self._room()

    def _end(self, failed: GradwireError) -> None:
        self._over = self._over or failed
        if not self._attached.done():
            self._attached.set_exception(failed)
            # Whether or not anybody asks.
            self._attached.exception()
        unanswered, self._unanswered = self._unanswered, {}
        self._unanswered_bytes = 0
        for seq_id, sent in unanswered.items():
            sent.answered(_failed(seq_id, failed))
        self._room()


async def _rpc_error(call: Any) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(
        await call.code(), await call.initial_metadata(), await call.trailing_metadata(), await call.details()
    )


def _failed(seq_id: int, exc: GradwireError) -> TrainResponse:
    return TrainResponse(seq_id=seq_id, error=to_status(exc))
