"""Models: runs by the ids that clients give them, made new or from a checkpoint."""

import asyncio
import contextlib
import hashlib
import json
import logging
import math
import sqlite3
from collections.abc import Awaitable, Callable
from typing import Any

from google.protobuf import json_format
from gradwire.errors import GradwireError
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.checkpoint_pb2 import Checkpoint
from gradwire.v1.checkpoint_service_pb2 import GetCheckpointRequest
from gradwire.v1.trainer_service_pb2 import CreateRunRequest, DeleteRunRequest

from trainer_service.gateway import paths
from trainer_service.gateway.answers import Answers
from trainer_service.gateway.model_line import CustomLosses, ModelLine
from trainer_service.gateway.outcomes import Outcome, Refusal, refusal_of
from trainer_service.gateway.sessions import Caller, Session, Sessions
from trainer_service.gateway.store import Store, owner_of
from trainer_service.gateway.trainers import Trainer, Trainers

logger = logging.getLogger(__name__)


class Models:
    """All models.

    Args:
        store: Where they are kept.
        trainers: Where their runs are.
        sessions: The sessions that own them.
        answers: Where answers wait.
        open_sampler: Gets (session, number, trainer, base model, path) of frozen weights; returns the sampler's id.
    """

    def __init__(
        self,
        store: Store,
        trainers: Trainers,
        sessions: Sessions,
        answers: Answers,
        open_sampler: Callable[[Session, int, Trainer, str, str], str],
    ) -> None:
        self._store = store
        self._trainers = trainers
        self._sessions = sessions
        self._answers = answers
        self._open_sampler = open_sampler
        self._lines: dict[str, tuple[ModelLine, Session]] = {}
        self.custom_losses = CustomLosses()

    async def create(self, session: Session, number: int, base_model: str, request: CreateRunRequest) -> str:
        """Makes a new model; returns its id.

        Raises:
            Refusal, GradwireError: It cannot be made.
        """
        served = await self._trainers.find(base_model, session.key)
        request.base_model = served.base_model
        return self._add(session, number, served.trainer, request, name=served.name)

    async def create_from(
        self, session: Session, number: int, path: str, *, with_optimizer: bool, request: CreateRunRequest
    ) -> str:
        """Makes a model with the state of a checkpoint, laid out as the run that saved it.

        Raises:
            Refusal, GradwireError: It cannot be made.
        """
        trainer, found = await self.find_checkpoint(path, session.key)
        request.base_model = found.base_model
        request.lora_rank = found.lora_rank
        if found.HasField("lora"):
            for name in ("lora_alpha", "train_mlp", "train_attn", "train_unembed"):
                setattr(request, name, getattr(found.lora, name))
        first = ops.LoadStateRequest(path=found.path, with_optimizer=with_optimizer)
        return self._add(session, number, trainer, request, first=first, name=found.base_model)

    async def find_checkpoint(self, path: str, key: str, *, field: str = "path") -> tuple[Trainer, Checkpoint]:
        """Finds a checkpoint by its tinker:// or gradwire:// path; `field` is what the caller calls the path.

        Raises:
            Refusal, GradwireError: There is none, or it is somebody else's.
        """
        owner = owner_of(key)
        found = paths.to_gradwire(path, lambda model_id: self.run_of(model_id, owner), field=field)
        request = GetCheckpointRequest(path=found)
        missing: GradwireError | None = None
        for trainer in self._trainers.all:
            try:
                answer = await trainer.call(trainer.checkpoints.GetCheckpoint, request, key)
            except GradwireError as exc:
                if exc.reason != "CHECKPOINT_NOT_FOUND":
                    raise
                missing = exc
            else:
                return trainer, answer.checkpoint
        assert missing is not None, "a gateway without a trainer"
        raise missing

    def _add(
        self,
        session: Session,
        number: int,
        trainer: Trainer,
        request: CreateRunRequest,
        *,
        name: str,
        first: ops.LoadStateRequest | None = None,
    ) -> str:
        model_id = f"{session.session_id}:train:{number}"
        # The same id gets the same run, however often a call or a gateway starts again.
        request.request_id = model_id
        asked = {"name": name, "run": json_format.MessageToDict(request)}
        if first is not None:
            asked["first"] = json_format.MessageToDict(first)
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).digest()
        try:
            self._store.add_model(
                model_id, session.session_id, session.owner, trainer=trainer.url, request=asked, digest=digest
            )
        except sqlite3.IntegrityError:
            row = self._store.model(model_id)
            if row is None or row["digest"] != digest:
                text = f"model_seq_id {number} of session {session.session_id} was used before for another model."
                raise Refusal(400, text) from None
        self.line(model_id, Caller(session.key))
        return model_id

    def row(self, model_id: str, caller: Caller) -> sqlite3.Row:
        """The stored row of a model, by its id or that of its run.

        Raises:
            Refusal: 404: there is none, or it is somebody else's.
        """
        row = self._store.model(model_id)
        if row is None or row["owner"] != caller.owner:
            raise Refusal(404, f"There is no model {model_id[:100]!r}.", reason="RUN_NOT_FOUND")
        return row

    def line(self, model_id: str, caller: Caller) -> ModelLine:
        """A model's operations.

        Raises:
            Refusal: 404, or 410: its session has ended.
        """
        if (held := self._lines.get(model_id)) is not None and held[1].owner == caller.owner:
            self._sessions.live(held[1].session_id, caller)
            return held[0]
        row = self.row(model_id, caller)
        session = self._sessions.live(row["session_id"], caller)
        model_id = row["model_id"]
        if (held := self._lines.get(model_id)) is not None:
            return held[0]
        asked = json.loads(row["request"])
        trainer = self._trainers.by_url(row["trainer"])
        request = json_format.ParseDict(asked["run"], CreateRunRequest())
        first = json_format.ParseDict(asked["first"], ops.LoadStateRequest()) if "first" in asked else None

        def open_sampler(number: int, path: str) -> str:
            return self._open_sampler(session, number, trainer, asked["name"], path)

        line = ModelLine(
            model_id,
            trainer,
            make=self._maker(row, trainer, request, session),
            first=first,
            store=self._store,
            answers=self._answers,
            custom_losses=self.custom_losses,
            run_of=lambda model_id: self.run_of(model_id, session.owner),
            open_sampler=open_sampler,
            key=lambda: session.key,
        )
        self._lines[model_id] = line, session
        return line

    def _maker(
        self, row: sqlite3.Row, trainer: Trainer, request: CreateRunRequest, session: Session
    ) -> Callable[[], Awaitable[str]]:
        async def make() -> str:
            if row["outcome"] is not None:
                failure = json.loads(Outcome.decode(row["outcome"]).body)
                raise Refusal(400, failure["error"], reason=failure["reason"])
            if row["run_id"] is not None:
                return row["run_id"]
            try:
                answer = await trainer.call(trainer.runs.CreateRun, request, session.key, away_s=math.inf)
            except GradwireError as exc:
                outcome = Outcome.failure(exc).encode()
                self._store.model_made(row["model_id"], run_id=None, outcome=outcome)
                raise
            self._store.model_made(row["model_id"], run_id=answer.run.run_id, outcome=None)
            return answer.run.run_id

        return make

    def run_of(self, model_id: str, owner: str) -> str:
        """The run id of one of the caller's models; any other id as it is, for the trainer to judge."""
        row = self._store.model(model_id)
        return model_id if row is None or row["run_id"] is None or row["owner"] != owner else row["run_id"]

    async def unload(self, model_id: str, caller: Caller) -> None:
        """Ends one model, as `end` does all of a session.

        Raises:
            Refusal: 404, or its run cannot be deleted.
        """
        await self.line(model_id, caller).close(Refusal(410, f"{model_id} was unloaded.", reason="RUN_NOT_FOUND"))
        self._lines.pop(model_id, None)
        row = self.row(model_id, caller)
        if row["run_id"] is not None:
            await self._delete_run(row, caller.key)

    async def end(self, session: Session) -> None:
        """Ends a session's models: what waits fails, and their runs are deleted."""
        why = Refusal(410, f"Session {session.session_id} has ended.", reason="SESSION_ENDED")
        rows = self._store.models(session.session_id)
        for row in rows:
            if (held := self._lines.pop(row["model_id"], None)) is not None:
                await held[0].close(why)
        for row in self._store.models(session.session_id):
            if row["run_id"] is not None:
                await self._delete_run(row, session.key)

    async def _delete_run(self, row: sqlite3.Row, key: str) -> None:
        with contextlib.suppress(Refusal):
            trainer = self._trainers.by_url(row["trainer"])
            try:
                await trainer.call(trainer.runs.DeleteRun, DeleteRunRequest(run_id=row["run_id"]), key)
            except GradwireError as exc:
                if exc.reason != "RUN_NOT_FOUND":
                    raise refusal_of(exc) from exc

    @property
    def num_held(self) -> int:
        """The number of models whose run this gateway is attached to."""
        return len(self._lines)

    async def close(self) -> None:
        """Detaches from all runs, and leaves them for the next gateway."""
        why = Refusal(503, "The gateway is shutting down; ask again.", reason="DRAINING")
        await asyncio.gather(*(line.close(why) for line, _ in self._lines.values()))

    def describe(self, row: sqlite3.Row) -> dict[str, Any]:
        """(name, LoRA rank and layers) that a model was asked for with."""
        asked = json.loads(row["request"])
        request = json_format.ParseDict(asked["run"], CreateRunRequest())
        return {"model_name": asked["name"], "lora_rank": request.lora_rank, "base_model": request.base_model}
