"""The operations of one model: taken in whatever order they arrive, sent to its run in the order of their numbers.

Everything acknowledged is in the store first. What a killed gateway had sent is answered from the run's journal; what
it had not sent is sent by the next one.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import sqlite3
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from google.rpc import code_pb2
from gradwire._wire.codec import Batch, tensor_message
from gradwire.errors import GradwireError
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.trainer_service_pb2 import GetAnswerRequest, TrainResponse

from trainer_service.gateway import request_translation
from trainer_service.gateway.answer_translation import CUSTOM_PASSES, AnswerTranslation, result_of
from trainer_service.gateway.answers import Answers
from trainer_service.gateway.custom_passes import KeptForward, KeptForwards, digest_of
from trainer_service.gateway.later_writes import LaterWrites
from trainer_service.gateway.outcomes import Outcome, Refusal
from trainer_service.gateway.request_translation import Planned
from trainer_service.gateway.run_stream import RunStream
from trainer_service.gateway.store import OperationRow, Store
from trainer_service.gateway.tensors import read_batch
from trainer_service.gateway.trainers import Trainer
from trainer_service.gateway.wire import tinker_wire_pb2 as wire
from trainer_service.tracing import trace_headers

logger = logging.getLogger(__name__)

MAX_SEQ_ID = (1 << 31) - 1
_MAX_HELD = 4096
"""The most operations acknowledged and not sent; a client that waits for answers has far fewer."""
_MAX_UNANSWERED, _MAX_UNANSWERED_BYTES = 64, 64 * 1024 * 1024
"""The most operations sent to the run and not answered; the rest wait in the store."""
_MAX_KEPT_BYTES = 64 * 1024
"""The largest body of a waiting operation that is kept in memory as well as in the store."""
_ANSWER_WAIT_MS = 20_000
_FLUSH_S = 0.2


@dataclass
class CustomLosses:
    """Counts of second passes of custom losses, by how they were done."""

    at_one_forward: int = 0
    at_two_forwards: int = 0


@dataclass(frozen=True)
class _Waiting:
    """An operation that is acknowledged and not sent."""

    row: OperationRow | None = None
    """None where the store alone has it: it is large, or an earlier gateway took it in."""
    request: wire.ForwardBackwardRequest | None = None
    """Its body, of a pass that is about to be sent."""
    trace: Mapping[str, str] = field(default_factory=dict)
    """The context of whoever asked for it; what an earlier gateway took in has none."""


def request_id_of(model_id: str, seq_id: int) -> str:
    """The id of an operation's future; number 0 is the creation of the model."""
    return f"{model_id}:{seq_id}"


class ModelLine:
    """One model's operations.

    Args:
        model_id: The model.
        trainer: Where its run is.
        make: Makes the run, or finds it; returns its id.
        first: A state that the run begins with; None for none.
        store: Where operations are kept.
        answers: Where answers wait.
        custom_losses: Counts second passes.
        run_of: Run ids of models, for paths.
        open_sampler: Gets (number, path) of frozen weights that become a sampler; returns the sampler's id.
        key: Gives the caller's key.
    """

    def __init__(
        self,
        model_id: str,
        trainer: Trainer,
        *,
        make: Callable[[], Awaitable[str]],
        first: ops.LoadStateRequest | None,
        store: Store,
        answers: Answers,
        custom_losses: CustomLosses,
        run_of: Callable[[str], str],
        open_sampler: Callable[[int, str], str],
        key: Callable[[], str],
    ) -> None:
        self.model_id = model_id
        self.run_id = ""
        """Resolves once the run is made."""
        self.made: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        """The outcome of making the model."""
        self._make = make
        self._first = first
        self._stream: RunStream | None = None
        self._trainer = trainer
        self._store = store
        self._answers = answers
        self._custom_losses = custom_losses
        self._run_of = run_of
        self._key = key
        self._translation = AnswerTranslation(self.answer_of, open_sampler)
        self._kept = KeptForwards()
        self._waiting: dict[int, _Waiting] = {}
        """What is acknowledged and not sent, by number."""
        self._unanswered: dict[int, asyncio.Future[Outcome]] = {}
        self._next = 1
        self._sending = False
        self._started = asyncio.Event()
        self._translating: set[asyncio.Task[None]] = set()
        self._answered = LaterWrites(store.operations_answered, after_s=_FLUSH_S)
        self._failed: Exception | None = None
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"line-{model_id}")

    async def close(self, why: Exception) -> None:
        """Ends the line. What is not answered fails with `why`."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._fail(why)
        if self._stream is not None:
            await self._stream.close()
        for task in self._translating:
            task.cancel()
        await asyncio.gather(*self._translating, return_exceptions=True)
        self.flush()

    # ── taking in ─────────────────────────────────────────────────────────────────────────────────────────────────

    def submit(self, seq_id: int, kind: str, body: bytes, request: wire.ForwardBackwardRequest | None = None) -> str:
        """Takes an operation in, and returns the id of its future. One that comes again is the same operation.

        Args:
            seq_id: Its number.
            kind: Its kind, as in request_translation.
            body: As it came.
            request: The same, of a pass whose body was read already.

        Raises:
            Refusal: Its number has no place in the order.
        """
        if not 0 < seq_id <= MAX_SEQ_ID:
            raise Refusal(400, f"seq_id is {seq_id}; operations of a model count from 1.")
        digest = hashlib.sha256(kind.encode() + b"\0" + body).digest()
        if len(self._waiting) >= _MAX_HELD and seq_id not in self._waiting:
            raise Refusal(429, f"{self.model_id} has {_MAX_HELD} operations waiting; wait for answers first.")
        try:
            self._store.add_operation(self.model_id, seq_id, kind=kind, digest=digest, body=body)
        except sqlite3.IntegrityError:
            row = self._store.operation(self.model_id, seq_id)
            if row is None or row.digest != digest:
                text = f"seq_id {seq_id} of {self.model_id} was used before for another operation."
                raise Refusal(400, text, reason="SEQ_ID_CONFLICT") from None
        else:
            row = OperationRow(seq_id, kind, digest, body, None, {}, None)
            if seq_id == self._next and self._may_send():
                self._came_in(seq_id, _Waiting(row, request, trace_headers.get()))
                # Right behind its acknowledgement, which lets the client send the next one.
                asyncio.get_running_loop().call_soon(self._send_waiting)
            else:
                kept = row if len(body) <= _MAX_KEPT_BYTES else None
                self._came_in(seq_id, _Waiting(kept, trace=trace_headers.get()))
        return request_id_of(self.model_id, seq_id)

    def _came_in(self, seq_id: int, waiting: "_Waiting") -> None:
        self._waiting[seq_id] = waiting
        self._unanswered.setdefault(seq_id, asyncio.get_running_loop().create_future())
        if self._failed is not None:
            self._resolve(seq_id, Outcome.failure(self._failed))

    # ── sending ───────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def stream(self) -> RunStream:
        """The run's, once it is made."""
        assert self._stream is not None, "an operation before there is a run"
        return self._stream

    async def _run(self) -> None:
        try:
            self.run_id = await self._make()
            self._stream = RunStream(self._trainer, self.run_id, self._key, self._send_waiting)
            await self._take_up()
        except (GradwireError, Refusal) as exc:
            self._fail(exc)
        except Exception as exc:
            logger.exception("A model's operations failed.", extra={"fields": {"model_id": self.model_id}})
            self._fail(exc)

    async def _take_up(self) -> None:
        """What an earlier gateway acknowledged, and the run has not received, is to be sent."""
        expected = await self.stream.attached()
        if self._first is not None:
            await self._load_first(expected)
        kind = "create_model" if self._first is None else "load_weights"
        self.made.set_result(Outcome.result(type=kind, model_id=self.model_id))
        received = 0
        for row in self._store.operations(self.model_id):
            if row.run_seq_id is not None and row.run_seq_id < expected:
                received = row.seq_id
            elif row.seq_id not in self._waiting:
                self._came_in(row.seq_id, _Waiting())
        self._next = received + 1
        self._started.set()
        self._send_waiting()

    async def _load_first(self, expected: int) -> None:
        """The state that the run begins with is its first operation.

        Raises:
            GradwireError: It cannot be loaded.
        """
        loaded: asyncio.Future[TrainResponse] = asyncio.get_running_loop().create_future()
        if expected == 1:
            # This began with the call that asked for the model.
            self.stream.send("load_state", self._first, loaded.set_result, trace=trace_headers.get())
            result_of(await loaded)
        else:
            result_of(await self.answer_of(1))

    def _may_send(self) -> bool:
        """Whether the run may get another operation."""
        return (
            self._started.is_set()
            and self._failed is None
            # What ends the run answers operations while they are being sent.
            and not self._sending
            and self.stream.has_room(operations=_MAX_UNANSWERED, size_bytes=_MAX_UNANSWERED_BYTES)
        )

    def _send_waiting(self) -> None:
        """Sends what has waited for its turn, or for room."""
        try:
            while self._next in self._waiting and self._may_send():
                self._sending = True
                self._send(self._next)
                del self._waiting[self._next]
                self._next += 1
                self._sending = False
        except Exception as exc:
            logger.exception("A model's operations failed.", extra={"fields": {"model_id": self.model_id}})
            self._fail(exc)

    def _send(self, seq_id: int) -> None:
        waiting = self._waiting[seq_id]
        row = waiting.row or self._store.operation(self.model_id, seq_id)
        assert row is not None, "an operation that waits is not in the store"
        body = row.body or b""
        batch = None
        try:
            if row.kind in request_translation.PASSES:
                request = waiting.request or request_translation.read_pass(row.kind, body)
                batch = read_batch(request)
                planned = self._plan_pass(
                    row.kind, request.forward_only, request_translation.plan_pass(request, batch), batch
                )
            else:
                planned = request_translation.plan_json(row.kind, body, self._run_of)
        except (GradwireError, Refusal) as exc:
            self._refuse(seq_id, row.kind, body, Outcome.failure(exc))
            return
        self._give_up_forwards(all_of_them=planned.steps)
        run_seq_id, plan = self.stream.next_seq_id, planned.plan
        self._store.operation_sent(self.model_id, seq_id, run_seq_id, plan)
        if plan["as"] == "kept_forward":
            assert batch is not None
            self._kept.keep(digest_of(batch), KeptForward(run_seq_id, self.stream.attaches))
            self._translation.expect_forward(run_seq_id)
        data = batch if plan["as"] in CUSTOM_PASSES else None
        self.stream.send(
            planned.kind,
            planned.content,
            lambda response: self._answer(seq_id, run_seq_id, plan, response, data),
            trace=waiting.trace,
        )

    def _plan_pass(self, kind: str, forward_only: bool, ordinary: Planned, batch: Batch) -> Planned:
        """Plans a pass; the two of a custom loss become a forward that keeps its graph, and its backward."""
        inputs = batch.loss_fn_inputs
        if ordinary.content.loss_fn != "cross_entropy" or inputs.keys() != {"target_tokens", "weights"}:
            return ordinary
        if forward_only:
            if kind == request_translation.FORWARD_BACKWARD:
                return ordinary
            content = ops.ForwardRequest(batch=ordinary.content.batch, keep_graph=True)
            del content.batch.loss_fn_inputs["weights"]
            return Planned("forward", content, {"as": "kept_forward"})
        forward = self._kept.take(digest_of(batch), attach=self.stream.attaches)
        gradients = -inputs["weights"]
        if forward is None or not bool(np.isfinite(gradients).all()):
            # The trainer refuses weights that are not finite, in the caller's terms.
            if kind == request_translation.FORWARD_BACKWARD:
                return ordinary
            self._custom_losses.at_two_forwards += 1
            return Planned(ordinary.kind, ordinary.content, {"as": "second_pass"})
        self._custom_losses.at_one_forward += 1
        content = ops.BackwardRequest(forward_seq_id=forward.run_seq_id, gradients=tensor_message(gradients))
        return Planned("backward", content, {"as": "backward", "forward": forward.run_seq_id})

    def _give_up_forwards(self, *, all_of_them: bool) -> None:
        if given_up := self._kept.give_up(all_of_them=all_of_them):
            self._translation.forget_forwards(given_up)
            self.stream.send("cancel", ops.CancelRequest(forward_seq_ids=given_up), lambda response: None)

    def _refuse(self, seq_id: int, kind: str, body: bytes, outcome: Outcome) -> None:
        """Sends something that does nothing under its number, or those behind it would wait for ever."""
        planned = request_translation.filler(kind, body)
        self._store.operation_refused(self.model_id, seq_id, self.stream.next_seq_id, outcome.encode())
        self.stream.send(planned.kind, planned.content, lambda response: self._let_go(seq_id, {}))
        self._resolve(seq_id, outcome)

    # ── answers ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def outcome(self, seq_id: int) -> Outcome:
        """Waits for the outcome of an operation.

        Raises:
            Refusal: 404: there is no such operation.
            GradwireError: The trainer cannot be asked.
        """
        await self._started.wait()
        if (future := self._unanswered.get(seq_id)) is not None:
            return await asyncio.shield(future)
        if (outcome := self._answers.get(request_id_of(self.model_id, seq_id))) is not None:
            return outcome
        row = self._store.operation(self.model_id, seq_id)
        if row is None:
            raise Refusal(404, f"{self.model_id} has no operation {seq_id}.", reason="FUTURE_NOT_FOUND")
        if row.outcome is not None:
            return Outcome.decode(row.outcome)
        if self._failed is not None:
            return Outcome.failure(self._failed)
        return await self._from_journal(row)

    async def _from_journal(self, row: OperationRow) -> Outcome:
        assert row.run_seq_id is not None, "an operation that is neither sent nor waits"
        try:
            response = await self.answer_of(row.run_seq_id)
        except GradwireError as exc:
            if exc.code == code_pb2.UNAVAILABLE:
                raise
            return Outcome.failure(exc)
        needs_data = row.plan["as"] in CUSTOM_PASSES and "loss" not in row.plan
        batch = read_batch(request_translation.read_pass(row.kind, row.body or b"")) if needs_data else None
        outcome = await self._translation.outcome(row.plan, response, batch)
        self._answers.keep(request_id_of(self.model_id, row.seq_id), outcome)
        return outcome

    async def answer_of(self, run_seq_id: int) -> TrainResponse:
        """An answer from the run's journal, by its number in the run.

        Raises:
            GradwireError: It is not there.
        """
        request = GetAnswerRequest(run_id=self.run_id, seq_id=run_seq_id, timeout_ms=_ANSWER_WAIT_MS)
        while True:
            answer = await self._trainer.call(self._trainer.runs.GetAnswer, request, self._key())
            if not answer.pending:
                return answer.response

    def _answer(
        self, seq_id: int, run_seq_id: int, plan: dict[str, Any], response: TrainResponse, batch: Batch | None
    ) -> None:
        """An answer came by the stream."""
        self._translation.arrived(run_seq_id, response)

        async def translate() -> None:
            try:
                outcome = await self._translation.outcome(plan, response, batch)
            except Exception as exc:
                logger.exception("An answer cannot be translated.", extra={"fields": {"model_id": self.model_id}})
                outcome = Outcome.failure(exc)
            self._resolve(seq_id, outcome)
            self._let_go(seq_id, plan)

        if self._translation.waits(plan):
            task = asyncio.get_running_loop().create_task(translate())
            self._translating.add(task)
            task.add_done_callback(self._translating.discard)
        else:
            # Whoever waits is told now, not when a task of its own has had its turn.
            with contextlib.suppress(StopIteration):
                translate().send(None)

    def _resolve(self, seq_id: int, outcome: Outcome) -> None:
        self._answers.keep(request_id_of(self.model_id, seq_id), outcome)
        future = self._unanswered.pop(seq_id, None)
        if future is not None and not future.done():
            future.set_result(outcome)

    def _let_go(self, seq_id: int, plan: dict[str, Any]) -> None:
        """Lets go of an operation's body once the trainer has operation and answer; several at a time."""
        self._answered.add((json.dumps(plan), self.model_id, seq_id))

    def flush(self) -> None:
        """Lets go of the bodies of what is answered."""
        self._answered.flush()

    def _fail(self, why: Exception) -> None:
        """Fails everything that waits: nothing more can be done for this model."""
        self._failed = self._failed or why
        self._started.set()
        if not self.made.done():
            self.made.set_result(Outcome.failure(why))
        for seq_id in list(self._unanswered):
            self._resolve(seq_id, Outcome.failure(self._failed))
