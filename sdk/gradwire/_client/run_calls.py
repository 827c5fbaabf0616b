"""The one door through which a run's calls go out, in the order made."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from gradwire._client.custom_call import CustomCall
from gradwire._client.custom_loss import CustomLossFn, LossThread
from gradwire._client.gather import Gather
from gradwire._client.loop import LOOP
from gradwire._client.order import Call, OutgoingOperation
from gradwire._client.stream import RunStream
from gradwire._client.tracing import start_span
from gradwire._wire.codec import Batch, DatumColumns, columns_from_data
from gradwire._wire.wire_format import Parts
from gradwire.errors import error
from gradwire.futures import APIFuture
from gradwire.types import ForwardBackwardOutput
from gradwire.types.server_info import Limits
from gradwire.v1.trainer_service_pb2 import TrainRequest, TrainResponse

T = TypeVar("T")

_SPARE_BYTES = 1024
"""By which the settings and lengths of two messages of one call may differ."""


class Pieces:
    """Data as messages of about the target size, split between datums; each is joined when it is asked for.

    Args:
        columns: The data.
        bounds: First datum of each piece, and the one behind its last.
        encode: Makes a message of a piece.
    """

    def __init__(
        self, columns: DatumColumns, bounds: Sequence[tuple[int, int]], encode: Callable[[Batch], Parts]
    ) -> None:
        self.sizes_bytes = [_size_bytes(columns, *each) for each in bounds]
        """Bytes of each piece's arrays."""
        self._columns = columns
        self._bounds = bounds
        self._encode = encode

    def __len__(self) -> int:
        return len(self._bounds)

    def __iter__(self) -> Iterator[Parts]:
        return (self._encode(self._columns.batch(*bounds)) for bounds in self._bounds)


class RunCalls:
    """Sends a run's calls over its stream.

    Inside a custom loss a call would wait for that very loss, so none goes out there but those that may overtake.

    Args:
        stream: The run's stream.
        losses: The thread that runs the user's loss functions.
        limits: What the trainer takes.
    """

    def __init__(self, stream: RunStream, losses: LossThread, limits: Limits) -> None:
        self.stream = stream
        self.losses = losses
        self.limits = limits

    def send(
        self,
        name: str,
        requests: Sequence[TrainRequest | Parts] | Pieces,
        combine: Callable[[list[TrainResponse]], T],
        *,
        barrier: bool = False,
        overtakes_losses: bool = False,
    ) -> APIFuture[T]:
        """Sends one call.

        Args:
            name: The call, as the user made it.
            requests: Its messages, encoded where they are large. Those of Pieces are made while others are sent.
            combine: Makes its answer of theirs.
            barrier: Waits for every custom loss before it.
            overtakes_losses: May be made inside a custom loss, and is then sent before everything in the line.

        Raises:
            RuntimeError: It was made inside a custom loss and may not be.
        """
        inside_loss = self.losses.current()
        if not overtakes_losses:
            self._refuse_inside_loss(name)
        span = start_span(name, run_id=self.stream.run_id, messages=len(requests))
        gather = Gather(len(requests), combine, span)
        made = map(gather.operation, requests)
        if inside_loss:
            LOOP.call_soon(self.stream.overtake, list(made))
        elif isinstance(requests, Pieces) and len(requests) > 1:
            self._submit_while_made(made, requests.sizes_bytes, barrier=barrier)
        else:
            LOOP.call_soon(self.stream.submit, Call(deque(made), barrier=barrier))
        return APIFuture(gather.future, name)

    def _submit_while_made(self, made: Iterator[OutgoingOperation], sizes_bytes: list[int], *, barrier: bool) -> None:
        count = len(sizes_bytes)
        handed_over = [next(made)]
        beside_arrays = handed_over[0].size_bytes - sizes_bytes[0]
        if max(sizes_bytes) + beside_arrays + _SPARE_BYTES > self.limits.max_message_bytes:
            # One may be too large, for which none may be sent.
            LOOP.call_soon(self.stream.submit, Call(deque([*handed_over, *made]), barrier=barrier))
            return
        call = Call(deque(handed_over), barrier=barrier, more=True)
        LOOP.call_soon(self.stream.submit, call)
        try:
            for number, operation in enumerate(made, start=2):
                handed_over.append(operation)
                LOOP.call_soon(partial(self.stream.extend, call, operation, more=number < count))
        except BaseException:
            # Such as Ctrl-C, or no memory.
            LOOP.call_soon(self.stream.break_off, call, handed_over)
            raise

    def send_custom(self, name: str, data: list[Any], loss_fn: CustomLossFn) -> APIFuture[ForwardBackwardOutput]:
        """Sends a custom loss: its forwards now, its backwards once `loss_fn` has run. Raises as `send`."""
        self._refuse_inside_loss(name)
        columns, bounds = self._cut(data)
        return CustomCall(self.stream, self.losses, data, loss_fn, [columns.batch(*each) for each in bounds]).start()

    def pieces(self, data: Iterable[Any], encode: Callable[[Batch], Parts]) -> Pieces:
        """The data as messages of about the target size, split between datums.

        Args:
            data: The user's datums.
            encode: Makes a message of a piece.

        Raises:
            InvalidArgumentError: The data cannot be sent as it is.
            ResourceExhaustedError: LIMIT_EXCEEDED: one datum is larger than a message may be.
        """
        return Pieces(*self._cut(data), encode)

    def _cut(self, data: Iterable[Any]) -> tuple[DatumColumns, list[tuple[int, int]]]:
        columns = columns_from_data(data)
        bounds = columns.bounds(self.limits.target_message_bytes)
        limit = self.limits.max_message_bytes
        for start, stop in bounds:
            # Several datums are one piece only below the target, which is far below the limit.
            if (size_bytes := _size_bytes(columns, start, stop)) > limit:
                raise error(
                    "LIMIT_EXCEEDED",
                    f"data[{start}] takes {size_bytes} bytes on the wire, but the trainer takes messages of at "
                    f"most {limit} bytes. Send shorter sequences, or fewer soft targets a token.",
                    limit=limit,
                    got=size_bytes,
                    datum=start,
                )
        return columns, bounds

    def _refuse_inside_loss(self, name: str) -> None:
        if self.losses.current():
            raise RuntimeError(
                f"{name} was called inside a custom loss, where it would wait for that loss. "
                "Only forward may be called there."
            )


def _size_bytes(columns: DatumColumns, start: int, stop: int) -> int:
    num_tokens = int(columns.cu_seqlens[stop] - columns.cu_seqlens[start])
    return num_tokens * columns.row_bytes() + columns.cu_seqlens[start : stop + 1].nbytes
