"""Samplers, and the sample requests made of them: acknowledged, done, and answered once, whatever happens between."""

import asyncio
import hashlib
import sqlite3
from typing import Any

from gradwire.v1.sampling_service_pb2 import OpenSamplerRequest, Sampler, SampleRequest

from trainer_service.gateway import paths
from trainer_service.gateway.answers import Answers
from trainer_service.gateway.later_writes import LaterWrites
from trainer_service.gateway.models import Models
from trainer_service.gateway.outcomes import Outcome, Refusal
from trainer_service.gateway.sample_polls import Completions, Target, target_of
from trainer_service.gateway.sample_queue import SampleQueue
from trainer_service.gateway.sessions import Caller, Session
from trainer_service.gateway.store import Store
from trainer_service.gateway.trainers import Trainer, Trainers

_FLUSH_S = 0.05
_MAX_WAITING = 100_000
"""Requests acknowledged and not answered, of all callers."""


class SamplingSessions:
    """All samplers that clients opened.

    Args:
        store: Where they are kept.
        trainers: Where they are.
        answers: Where answers wait.
        queue: What does the sampling.
    """

    def __init__(self, store: Store, trainers: Trainers, answers: Answers, queue: SampleQueue) -> None:
        self._store = store
        self._trainers = trainers
        self._answers = answers
        self._queue = queue
        self._rows: dict[str, sqlite3.Row] = {}
        """Of samplers of sessions that go on, by id."""
        self._waiting: dict[str, asyncio.Future[Outcome]] = {}
        self._completions = Completions()
        self._answered = LaterWrites(store.samples_answered, after_s=_FLUSH_S)

    def add_frozen_weights(self, session: Session, number: int, trainer: Trainer, base_model: str, path: str) -> str:
        """Adds a sampler of frozen weights; returns its id."""
        sampler_id = f"{session.session_id}:sample:{number}"
        self._rows.pop(sampler_id, None)
        self._store.add_sampler(
            sampler_id, session.session_id, session.owner, trainer=trainer.url, base_model=base_model, model_path=path
        )
        return sampler_id

    async def open(self, session: Session, number: int, *, base_model: str, model_path: str, models: Models) -> str:
        """Opens a sampler of a base model, or of saved weights; returns its id.

        Raises:
            Refusal, GradwireError: There is no such model or checkpoint.
        """
        if model_path:
            trainer, found = await models.find_checkpoint(model_path, session.key)
            name, path = base_model or self._trainers.name_of(found.base_model), found.path
            request = OpenSamplerRequest(sampler=Sampler(model_path=path))
            await trainer.call(trainer.sampling.OpenSampler, request, session.key)
        else:
            served = await self._trainers.find(base_model, session.key)
            trainer, name, path = served.trainer, served.name, ""
        return self.add_frozen_weights(session, number, trainer, name, path)

    def row(self, sampler_id: str, caller: Caller) -> sqlite3.Row:
        """The stored row of a sampler.

        Raises:
            Refusal: 404: there is none, or it is somebody else's.
        """
        row = self._rows.get(sampler_id) or self._store.sampler(sampler_id)
        if row is None or row["owner"] != caller.owner:
            raise Refusal(404, f"There is no sampler {sampler_id[:100]!r}.", reason="SAMPLER_NOT_FOUND")
        self._rows[sampler_id] = row
        return row

    @staticmethod
    def source(row: sqlite3.Row) -> Sampler:
        """A sampler as the trainer knows it."""
        path = row["model_path"]
        return Sampler(model_path=path) if path else Sampler(base_model="")

    @staticmethod
    def tinker_path(row: sqlite3.Row) -> str | None:
        """A sampler's checkpoint in tinker's words; None where it has none."""
        return paths.to_tinker(row["model_path"]) if row["model_path"] else None

    def submit(self, row: sqlite3.Row, seq_id: int, request: SampleRequest, caller: Caller) -> str:
        """Takes a request in, and returns the id of its future. One that comes again is the same request.

        Raises:
            Refusal: Its number was used for another one, or too many wait.
        """
        request_id = f"{row['sampler_id']}:{seq_id}"
        body = request.SerializeToString(deterministic=True)
        digest = hashlib.sha256(body).digest()
        if len(self._waiting) >= _MAX_WAITING:
            raise Refusal(429, f"{_MAX_WAITING} sample requests wait already; wait for answers first.")
        try:
            self._store.add_sample(
                request_id,
                row["sampler_id"],
                row["session_id"],
                row["owner"],
                digest=digest,
                num_samples=request.num_samples,
                body=body,
            )
        except sqlite3.IntegrityError:
            stored = self._store.sample(request_id)
            if stored is None or stored["digest"] != digest:
                text = f"seq_id {seq_id} of {row['sampler_id']} was used before for another request."
                raise Refusal(400, text, reason="SEQ_ID_CONFLICT") from None
        else:
            self._begin(request_id, request, self._trainers.by_url(row["trainer"]), caller.key)
        return request_id

    def _begin(self, request_id: str, request: SampleRequest, trainer: Trainer, key: str) -> asyncio.Future[Outcome]:
        future = self._waiting[request_id] = self._queue.add(request, trainer, key)

        def done(future: asyncio.Future[Outcome]) -> None:
            if self._waiting.get(request_id) is future:
                del self._waiting[request_id]
            if not future.cancelled():
                outcome, cursor = future.result(), self._completions.tick()
                self._answers.keep(request_id, outcome)
                self._answered.add((outcome.encode(), cursor / 1e6, request_id))
                self._completions.add(cursor, request_id, None if outcome.failed else len(outcome.body))

        future.add_done_callback(done)
        return future

    def flush(self) -> None:
        """Writes answers to the store."""
        self._answered.flush()

    async def outcome(self, request_id: str, caller: Caller) -> Outcome:
        """Waits for the outcome of a request, whose session is one of the caller's.

        Raises:
            Refusal: 404: there is none, or it is somebody else's.
        """
        # Its session is the caller's, and so is what is known of it here.
        if (outcome := self._answers.get(request_id)) is not None:
            return outcome
        future = self._waiting.get(request_id)
        if future is None:
            row = self._store.sample(request_id)
            if row is None or row["owner"] != caller.owner:
                raise Refusal(404, f"There is no future {request_id[:200]!r}.", reason="FUTURE_NOT_FOUND")
            if row["outcome"] is not None:
                return Outcome.decode(row["outcome"])
            future = self._begin_again(row, caller)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            if not future.cancelled():
                raise
            raise Refusal(410, "This was cancelled.", reason="CANCELLED") from None

    def _begin_again(self, row: sqlite3.Row, caller: Caller) -> asyncio.Future[Outcome]:
        """A request that an earlier gateway took in."""
        sampler = self.row(row["sampler_id"], caller)
        request = SampleRequest.FromString(row["body"])
        return self._begin(row["request_id"], request, self._trainers.by_url(sampler["trainer"]), caller.key)

    async def answered_since(
        self, row: sqlite3.Row, clone: int, cursor: int, *, caller: Caller
    ) -> tuple[list[dict[str, Any]], int]:
        """Like Completions.since, for one of the caller's samplers."""
        target = row["sampler_id"], clone
        if not self._completions.knows(target):
            self._take_up(target, cursor, caller)
        return await self._completions.since(target, cursor)

    def _take_up(self, target: Target, cursor: int, caller: Caller) -> None:
        """What an earlier gateway answered is told, and what it took in is begun again."""
        self.flush()
        samples = [one for one in self._store.samples(target[0]) if target_of(one["request_id"]) == target]
        answered = [
            (round(one["answered_s"] * 1e6), one["request_id"], None if one["mark"] == b"F" else one["size_bytes"] - 1)
            for one in samples
            if one["answered_s"] is not None
        ]
        self._completions.open(target, [one for one in answered if one[0] > cursor])
        for one in samples:
            if one["answered_s"] is None and one["request_id"] not in self._waiting:
                stored = self._store.sample(one["request_id"])
                assert stored is not None, "a sample that was just listed"
                self._begin_again(stored, caller)

    def forget(self, row: sqlite3.Row, request_ids: list[str]) -> None:
        """Forgets answers that the client has."""
        own = [one for one in request_ids if one.rpartition(":")[0] == row["sampler_id"]]
        if own:
            self.flush()
            self._store.forget_answered(own)
        for request_id in own:
            self._answers.forget(request_id)

    @property
    def num_waiting(self) -> int:
        """The number of unanswered requests."""
        return len(self._waiting)

    def cancel(self, request_id: str, caller: Caller) -> None:
        """Gives up a request that nobody wants any more."""
        row = self._store.sample(request_id)
        if row is not None and row["owner"] == caller.owner and (future := self._waiting.get(request_id)) is not None:
            future.cancel()

    def end(self, session: Session) -> None:
        """Gives up what a session asked for."""
        for request_id, future in list(self._waiting.items()):
            if request_id.startswith(f"{session.session_id}:"):
                future.cancel()
        sampler_ids = [row["sampler_id"] for row in self._store.samplers(session.session_id)]
        self._completions.forget(sampler_ids)
        for sampler_id in sampler_ids:
            self._rows.pop(sampler_id, None)
