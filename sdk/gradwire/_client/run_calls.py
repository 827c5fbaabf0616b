"""The one door through which a run's calls go out, in the order made."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from gradwire._client.custom_call import CustomCall
from gradwire._client.custom_loss import CustomLossFn, LossThread
from gradwire._client.gather import Gather
from gradwire._client.loop import LOOP
from gradwire._client.order import Call
from gradwire._client.stream import RunStream
from gradwire._client.tracing import start_span
from gradwire._wire.codec import Batch, batch_from_data, split
from gradwire._wire.wire_format import Parts
from gradwire.errors import error
from gradwire.futures import APIFuture
from gradwire.types import ForwardBackwardOutput
from gradwire.types.server_info import Limits
from gradwire.v1.trainer_service_pb2 import TrainRequest, TrainResponse

T = TypeVar("T")


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
        requests: Sequence[TrainRequest | Parts],
        combine: Callable[[list[TrainResponse]], T],
        *,
        barrier: bool = False,
        overtakes_losses: bool = False,
    ) -> APIFuture[T]:
        """Sends one call.

        Args:
            name: The call, as the user made it.
            requests: Its messages, encoded where they are large.
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
        operations = [gather.operation(request) for request in requests]
        if inside_loss:
            LOOP.call_soon(self.stream.overtake, operations)
        else:
            LOOP.call_soon(self.stream.submit, Call(deque(operations), barrier=barrier))
        return APIFuture(gather.future, name)

    def send_custom(self, name: str, data: list[Any], loss_fn: CustomLossFn) -> APIFuture[ForwardBackwardOutput]:
        """Sends a custom loss: its forwards now, its backwards once `loss_fn` has run. Raises as `send`."""
        self._refuse_inside_loss(name)
        return CustomCall(self.stream, self.losses, data, loss_fn, self.pieces(data)).start()

    def pieces(self, data: Iterable[Any]) -> list[Batch]:
        """The data as messages of about the target size, split between datums.

        Raises:
            InvalidArgumentError: The data cannot be sent as it is.
            ResourceExhaustedError: LIMIT_EXCEEDED: one datum is larger than a message may be.
        """
        pieces = split(batch_from_data(data), self.limits.target_message_bytes)
        limit = self.limits.max_message_bytes
        for piece in pieces:
            # Several datums are one piece only below the target, which is far below the limit.
            if (size_bytes := piece.size_bytes()) > limit:
                raise error(
                    "LIMIT_EXCEEDED",
                    f"{piece.datum_path(0)} takes {size_bytes} bytes on the wire, but the trainer takes messages of at "
                    f"most {limit} bytes. Send shorter sequences, or fewer soft targets a token.",
                    limit=limit,
                    got=size_bytes,
                    datum=piece.first_datum_index,
                )
        return pieces

    def _refuse_inside_loss(self, name: str) -> None:
        if self.losses.current():
            raise RuntimeError(
                f"{name} was called inside a custom loss, where it would wait for that loss. "
                "Only forward may be called there."
            )
