"""One call's answers, gathered into its future."""

from collections.abc import Callable
from concurrent.futures import Future as ConcurrentFuture
from typing import Any

from gradwire._client.order import OutgoingOperation
from gradwire._client.tracing import CallSpan
from gradwire._wire.wire_format import Parts
from gradwire.errors import from_status
from gradwire.v1.trainer_service_pb2 import TrainRequest, TrainResponse


class Gather:
    """Collects the answers of one call's operations into one future. Used on the loop's thread, but for `operation`."""

    def __init__(self, count: int, combine: Callable[[list[TrainResponse]], Any], span: CallSpan) -> None:
        self.future: ConcurrentFuture[Any] = ConcurrentFuture()
        # Running: the operations are in the run's order and cannot be called back.
        self.future.set_running_or_notify_cancel()
        self._answers: list[TrainResponse | None] = [None] * count
        self._places = iter(range(count))
        self._missing = count
        self._combine = combine
        self._span = span
        self._trace: Any = span.headers

    def operation(self, request: TrainRequest | Parts) -> OutgoingOperation:
        """Adds the next operation of the call, encoded where it is large; its answer takes the same place among the
        answers."""
        place = next(self._places)

        def answered(response: TrainResponse) -> None:
            if response.WhichOneof("result") == "error":
                self.fail(from_status(response.error))
                return
            self._answers[place] = response
            self._missing -= 1
            if self._missing == 0 and not self.future.done():
                try:
                    answer = self._combine([a for a in self._answers if a is not None])
                except Exception as exc:  # An answer we cannot read must reach the caller, not kill the stream.
                    self.fail(exc)
                    return
                self._span.end()
                self.future.set_result(answer)

        message, content = (request, []) if isinstance(request, TrainRequest) else (TrainRequest(), request)
        if self._trace:
            message.MergeFrom(TrainRequest(**self._trace))
        return OutgoingOperation(message, answered=answered, failed=self.fail, content=content)

    def fail(self, exc: BaseException) -> None:
        """Fails the future, unless a piece already did."""
        if not self.future.done():
            self._span.end(exc)
            self.future.set_exception(exc)
