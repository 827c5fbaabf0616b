"""The gateway behind its HTTP: sessions, models and samplers over one store, and what happens when clients vanish."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator

from gradwire.errors import GradwireError

from trainer_service.access import ApiKeys
from trainer_service.config import GatewayConfig
from trainer_service.gateway.answers import Answers
from trainer_service.gateway.downloads import Downloads
from trainer_service.gateway.fireworks_jobs import Jobs
from trainer_service.gateway.models import Models
from trainer_service.gateway.outcomes import Refusal
from trainer_service.gateway.sample_queue import SampleQueue
from trainer_service.gateway.sampling_sessions import SamplingSessions
from trainer_service.gateway.sessions import Caller, Session, Sessions
from trainer_service.gateway.store import Store
from trainer_service.gateway.tokenizers import Tokenizers
from trainer_service.gateway.trainers import Trainers

logger = logging.getLogger(__name__)

_SWEEP_S = 1.0
_KEEP_ENDED_S = 30 * 24 * 3600.0
"""How long the owner of an ended session is remembered."""
_FORGET_S = 60.0
"""How often older ones are looked for."""
_KEEP_SAMPLES_S = 1800.0
"""How long a sample's answer may still be fetched."""


class Gateway:
    """Sessions, models, samplers and jobs, over one store.

    Args:
        config: Its settings.
        trainers: The trainers that it serves.

    Raises:
        SettingsError: Another gateway uses the folder.
    """

    def __init__(self, config: GatewayConfig, trainers: Trainers) -> None:
        self.config = config
        self.api_keys = ApiKeys(config.api_keys, config.api_key_file)
        """Keys that open the gateway itself; without any, the trainer alone decides."""
        self.trainers = trainers
        self.tokenizers = Tokenizers()
        self._stopping = False
        self._polls: set[asyncio.Timeout] = set()
        """Of requests that wait for an answer."""
        self._store = Store(config.data_dir / "gateway" / "gateway.sqlite")
        self._answers = Answers()
        self.sessions = Sessions(self._store, grace_s=config.session_grace_s)
        self.queue = SampleQueue(max_in_flight=config.max_in_flight_samples, max_num_samples=config.max_num_samples)
        self.sampling_sessions = SamplingSessions(self._store, trainers, self._answers, self.queue)
        self.models = Models(
            self._store, trainers, self.sessions, self._answers, self.sampling_sessions.add_frozen_weights
        )
        self.jobs = Jobs(self._store)
        self.downloads = Downloads()
        self._ending: set[str] = set()
        self._background: set[asyncio.Task[None]] = set()
        self._sweeper = asyncio.get_running_loop().create_task(self._sweep(), name="gateway-sweep")

    @contextlib.asynccontextmanager
    async def long_poll(self, timeout_s: float) -> AsyncGenerator[None]:
        """Raises TimeoutError where the block takes longer, or once the gateway stops."""
        async with asyncio.timeout(0 if self._stopping else timeout_s) as poll:
            self._polls.add(poll)
            try:
                yield
            finally:
                self._polls.discard(poll)

    def end_polls(self) -> None:
        """The gateway stops: nobody is kept waiting any more."""
        self._stopping = True
        for poll in self._polls:
            if not poll.expired():
                poll.reschedule(asyncio.get_running_loop().time())

    def session_models(self, session: Session) -> list[str]:
        """Ids of a session's models."""
        return [row["model_id"] for row in self._store.models(session.session_id)]

    def session_samplers(self, session: Session) -> list[str]:
        """Ids of a session's samplers."""
        return [row["sampler_id"] for row in self._store.samplers(session.session_id)]

    def heard(self, caller: Caller) -> None:
        """A caller came with a key; what was left over for want of it can be done now."""
        if not self._ending:
            return
        for session in self.sessions.held(caller):
            if session.session_id in self._ending and not session.key:
                session.key = caller.key
                self.clear(session)

    def finish(self, session: Session, ended_by: dict[str, object]) -> None:
        """Ends a session."""
        self.sampling_sessions.end(session)
        self.sessions.end(session, ended_by)
        self.clear(session)

    def end_session(self, session_id: str, caller: Caller, ended_by: dict[str, object]) -> None:
        """Ends one of the caller's sessions, unless it has ended or is unknown."""
        for session in self.sessions.held(caller):
            if session.session_id == session_id and session.ended_by is None:
                session.key = caller.key
                self.finish(session, ended_by)

    def clear(self, session: Session) -> None:
        """Deletes the runs of a session that is over, in the background."""
        self._ending.add(session.session_id)
        task = asyncio.get_running_loop().create_task(self._clear(session))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _clear(self, session: Session) -> None:
        try:
            await self.models.end(session)
        except Refusal as exc:
            # The key was not given yet, or is valid no more; the next call with one tries again.
            session.key = ""
            fields = {"session_id": session.session_id, "error": exc.message}
            logger.warning("Runs of an ended session are left over.", extra={"fields": fields})
            return
        self._ending.discard(session.session_id)
        self._answers.forget_session(session.session_id)
        self.sessions.cleared(session)

    async def _sweep(self) -> None:
        """Ends silent sessions, writes down who was heard of, and forgets what is old."""
        self._ending.update(session.session_id for session in self.sessions.ending())
        forgotten_s = 0.0
        while True:
            await asyncio.sleep(min(_SWEEP_S, self.config.session_grace_s / 4))
            try:
                for session in self.sessions.silent():
                    logger.info("A session was silent.", extra={"fields": {"session_id": session.session_id}})
                    self.finish(session, {"type": "silent"})
                self.sessions.flush()
                now = time.time()
                self._store.forget_samples(now - _KEEP_SAMPLES_S)
                if now - forgotten_s > _FORGET_S:
                    self.sessions.forget(now - _KEEP_ENDED_S)
                    forgotten_s = now
            except Exception:
                logger.exception("The gateway could not sweep.")

    async def close(self) -> None:
        """Stops, and leaves everything for the next gateway."""
        self.end_polls()
        self._sweeper.cancel()
        for task in self._background:
            task.cancel()
        await asyncio.gather(self._sweeper, *self._background, return_exceptions=True)
        await self.queue.close()
        with contextlib.suppress(GradwireError):
            await self.models.close()
        self.sampling_sessions.flush()
        self.sessions.flush()
        await self.trainers.close()
        self._store.close()
