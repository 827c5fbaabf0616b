"""A custom loss on its way: forwards, the user's function on a thread of its own, backwards."""

from collections import deque
from concurrent.futures import Future as ConcurrentFuture
from typing import Any

import numpy as np

from gradwire._client import answers
from gradwire._client.custom_loss import CustomLossFn, LossThread, reported_metrics, run_custom_loss
from gradwire._client.gather import Gather
from gradwire._client.loop import LOOP
from gradwire._client.order import Call, OutgoingOperation
from gradwire._client.requests import backward_content, batch_content
from gradwire._client.stream import RunStream
from gradwire._client.tracing import start_span
from gradwire._wire.codec import Batch
from gradwire.futures import APIFuture
from gradwire.types import ForwardBackwardOutput
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.trainer_service_pb2 import TrainRequest, TrainResponse


class CustomCall:
    """A forward_backward_custom on its way: forwards, the user's function, backwards."""

    def __init__(
        self, stream: RunStream, losses: LossThread, data: list[Any], fn: CustomLossFn, pieces: list[Batch]
    ) -> None:
        self._stream = stream
        self._losses = losses
        self._data = data
        self._fn = fn
        self._row_counts = [piece.num_tokens for piece in pieces]
        self._span = start_span("forward_backward_custom", run_id=stream.run_id, messages=len(pieces))
        self._result = Gather(len(pieces), self._output, self._span)
        # The same call's: its span ends with the result.
        forwards = Gather(len(pieces), lambda responses: responses, self._span.part())
        forwards.future.add_done_callback(self._forwarded)
        settings = ops.ForwardRequest(keep_graph=True)
        self._forwards = [forwards.operation(batch_content("forward", settings, piece)) for piece in pieces]
        self._call = Call(deque(self._forwards), custom=True)
        self._forward_output = answers.forward_output([])
        self._loss = 0.0
        self._metrics: dict[str, float] = {}

    def start(self) -> APIFuture[ForwardBackwardOutput]:
        LOOP.call_soon(self._stream.submit, self._call)
        return APIFuture(self._result.future, "forward_backward_custom")

    def _forwarded(self, future: "ConcurrentFuture[list[TrainResponse]]") -> None:
        """On the loop: the logprobs are here, or a forward failed."""
        if exc := future.exception():
            self._give_up(exc)
            return
        responses = future.result()
        self._losses.submit(lambda: self._evaluate(responses))

    def _evaluate(self, responses: list[TrainResponse]) -> None:
        """On the loss thread: the user's function."""
        try:
            self._forward_output = output = answers.forward_output(responses)
            outputs = output.loss_fn_outputs
            with self._span.inside("custom_loss"):
                gradients_T, self._loss, self._metrics = run_custom_loss(
                    self._fn, self._data, outputs.arrays["logprobs"], outputs.cu_seqlens
                )
        except BaseException as exc:  # Whatever the user's function raised belongs to the future.
            LOOP.call_soon(self._give_up, exc)
            return
        LOOP.call_soon(self._send_backwards, gradients_T)

    def _send_backwards(self, gradients_T: np.ndarray) -> None:
        """On the loop: the gradients go back, before anything that waits for them."""
        start = 0
        backwards: list[OutgoingOperation] = []
        for forward, count in zip(self._forwards, self._row_counts, strict=True):
            # Once, since those of all pieces are added up.
            metrics = {} if backwards else reported_metrics(self._metrics, self._loss)
            content = backward_content(forward.request.seq_id, gradients_T[start : start + count], metrics)
            backwards.append(self._result.operation(content))
            start += count
        self._stream.overtake(backwards)
        self._stream.close_call(self._call)

    def _give_up(self, exc: BaseException) -> None:
        """On the loop: no gradients will come; let the graphs go."""
        sent = [forward.request.seq_id for forward in self._forwards if forward.request.seq_id]
        if sent:
            cancel = ops.CancelRequest(forward_seq_ids=sent, taint=self._stream.barrier_waits())
            # Nobody waits for the answer; if it does not come, the graphs went with the run.
            self._stream.overtake(
                [OutgoingOperation(TrainRequest(cancel=cancel), answered=lambda _: None, failed=lambda _: None)]
            )
        self._stream.close_call(self._call)
        self._result.fail(exc)

    def _output(self, backward_responses: list[TrainResponse]) -> ForwardBackwardOutput:
        return answers.custom_output(self._forward_output, backward_responses, self._loss, self._metrics)
