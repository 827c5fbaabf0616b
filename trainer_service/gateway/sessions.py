"""Sessions: who a client is, and whether it still lives."""

import json
import sqlite3
import time
import uuid
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from trainer_service.gateway.outcomes import Refusal
from trainer_service.gateway.store import Store, owner_of


@dataclass(frozen=True)
class Caller:
    """Who makes a request."""

    key: str = field(repr=False)
    """The key as it came; the trainer judges it."""

    @cached_property
    def owner(self) -> str:
        """A digest of the key, which tells the caller's things from others'."""
        return owner_of(self.key)


@dataclass
class Session:
    """One client's session."""

    session_id: str
    owner: str
    about: dict[str, Any]
    created_s: float
    seen_s: float
    ended_by: dict[str, Any] | None
    key: str = field(default="", repr=False)
    """The last one its client came with; known to this process alone."""


class Sessions:
    """All sessions.

    Args:
        store: Where they are kept.
        grace_s: How long a client may be silent.
    """

    def __init__(self, store: Store, *, grace_s: float) -> None:
        self._store = store
        self._grace_s = grace_s
        self._held: dict[str, Session] = {}
        """Those that go on, and those whose runs are not deleted yet; the rest is in the store alone."""
        self._seen: dict[str, float] = {}
        now = time.time()
        for row in store.uncleared():
            session = _stored(row)
            # A gateway that was down could not be heard by anybody.
            session.seen_s = now
            self._held[session.session_id] = session

    def create(self, caller: Caller, about: dict[str, Any]) -> Session:
        """Begins a session."""
        now = time.time()
        session = Session(str(uuid.uuid4()), caller.owner, about, now, now, None, caller.key)
        self._store.add_session(session.session_id, session.owner, about)
        self._held[session.session_id] = session
        return session

    def of(self, caller: Caller) -> list[Session]:
        """A caller's sessions, newest first."""
        return [self._held.get(row["session_id"]) or _stored(row) for row in self._store.sessions(caller.owner)]

    def held(self, caller: Caller) -> list[Session]:
        """Those of a caller's that go on, or whose runs are not deleted yet."""
        return [one for one in self._held.values() if one.owner == caller.owner]

    def ending(self) -> list[Session]:
        """Those that are over, and whose runs are not deleted yet."""
        return [one for one in self._held.values() if one.ended_by is not None]

    def find(self, session_id: str, caller: Caller) -> Session:
        """One of the caller's, ended or not.

        Raises:
            Refusal: 404: there is none, or it is somebody else's.
        """
        session = self._held.get(session_id)
        if session is None and (row := self._store.session(session_id)) is not None:
            session = _stored(row)
        if session is None or session.owner != caller.owner:
            raise Refusal(404, f"There is no session {session_id[:100]!r}.", reason="SESSION_NOT_FOUND")
        return session

    def live(self, session_id: str, caller: Caller) -> Session:
        """One of the caller's that goes on; it is heard of with this.

        Raises:
            Refusal: 404, or 410: it has ended.
        """
        session = self.find(session_id, caller)
        if session.ended_by is not None:
            text = (
                f"Session {session_id} has ended ({session.ended_by['type']}); its checkpoints stay. Begin a new one."
            )
            raise Refusal(410, text, reason="SESSION_ENDED")
        session.key = caller.key
        session.seen_s = self._seen[session_id] = time.time()
        return session

    def end(self, session: Session, ended_by: dict[str, Any]) -> None:
        """Ends a session."""
        session.ended_by = ended_by
        self._store.end_session(session.session_id, ended_by)

    def cleared(self, session: Session) -> None:
        """The runs of one that is over are deleted too."""
        self._store.session_cleared(session.session_id)
        self._held.pop(session.session_id, None)

    def silent(self) -> list[Session]:
        """Those that go on and have not been heard of for longer than the grace."""
        before_s = time.time() - self._grace_s
        return [one for one in self._held.values() if one.ended_by is None and one.seen_s < before_s]

    def forget(self, before_s: float) -> None:
        """Forgets sessions that ended long ago."""
        self._store.forget_sessions(before_s)

    @property
    def num_live(self) -> int:
        """Sessions that have not ended."""
        return sum(one.ended_by is None for one in self._held.values())

    def flush(self) -> None:
        """Writes down when they were heard of."""
        seen, self._seen = self._seen, {}
        if seen:
            self._store.seen(seen.items())


def _stored(row: sqlite3.Row) -> Session:
    ended_by = json.loads(row["ended_by"]) if row["ended_by"] else None
    about = json.loads(row["about"])
    return Session(row["session_id"], row["owner"], about, row["created_s"], row["seen_s"], ended_by)
