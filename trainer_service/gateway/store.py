"""The gateway's memory on disk: one SQLite file. What was acknowledged is in it, so a gateway that was killed goes on.

A write is on disk, short of a power cut, when the call returns. Keys are never written, only what tells one caller's
things from another's.
"""

import functools
import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from trainer_service.command_lines import SettingsError

_VERSION = 2
_CHECKPOINT_PAGES = 8192
"""Pages of 4 KiB that the write-ahead log may grow to."""
_SCHEMA = """
CREATE TABLE session (
    session_id TEXT PRIMARY KEY, owner TEXT NOT NULL, about TEXT NOT NULL, created_s REAL NOT NULL,
    seen_s REAL NOT NULL, ended_s REAL, ended_by TEXT, cleared INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE model (
    model_id TEXT PRIMARY KEY, session_id TEXT NOT NULL, owner TEXT NOT NULL, trainer TEXT NOT NULL,
    request TEXT NOT NULL, digest BLOB NOT NULL, run_id TEXT, outcome BLOB
) WITHOUT ROWID;
CREATE INDEX model_session ON model (session_id);
CREATE INDEX model_run ON model (run_id);
CREATE TABLE operation (
    model_id TEXT NOT NULL, seq_id INTEGER NOT NULL, kind TEXT NOT NULL, digest BLOB NOT NULL, body BLOB,
    run_seq_id INTEGER, plan TEXT, outcome BLOB, PRIMARY KEY (model_id, seq_id)
) WITHOUT ROWID;
CREATE TABLE sampler (
    sampler_id TEXT PRIMARY KEY, session_id TEXT NOT NULL, owner TEXT NOT NULL, trainer TEXT NOT NULL,
    base_model TEXT NOT NULL, model_path TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX sampler_session ON sampler (session_id);
CREATE TABLE sample (
    request_id TEXT PRIMARY KEY, sampler_id TEXT NOT NULL, session_id TEXT NOT NULL, owner TEXT NOT NULL,
    digest BLOB NOT NULL, num_samples INTEGER NOT NULL, body BLOB, outcome BLOB, answered_s REAL
) WITHOUT ROWID;
CREATE INDEX sample_session ON sample (session_id);
CREATE INDEX sample_answered ON sample (answered_s);
"""
_SINCE_2 = """
CREATE TABLE job (
    job_id TEXT NOT NULL, owner TEXT NOT NULL, about TEXT NOT NULL, created_s REAL NOT NULL,
    sessions TEXT NOT NULL DEFAULT '[]', PRIMARY KEY (owner, job_id)
) WITHOUT ROWID;
"""


@functools.lru_cache(maxsize=1024)
def owner_of(key: str) -> str:
    """The owner id stored for a key; the key cannot be derived from it."""
    return hashlib.sha256(b"gradwire gateway owner" + key.encode()).hexdigest()[:32] if key else ""


class OperationRow(NamedTuple):
    """One operation of a model, as it is stored."""

    seq_id: int
    kind: str
    digest: bytes
    body: bytes | None
    """None once it is answered."""
    run_seq_id: int | None
    """Its number in the run; None until it was sent there."""
    plan: dict[str, Any]
    """What its answer has to be translated with."""
    outcome: bytes | None
    """Where it did not come from the trainer."""


class Store:
    """The file. Used by one gateway at a time, on one thread.

    Args:
        path: Where it is; made if need be.

    Raises:
        SettingsError: Another gateway has it, or it is none of ours.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = sqlite3.connect(path, isolation_level=None, timeout=1.0)
            # Held until the process ends, however it ends.
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            # Each moves the log into the file and waits for the disk, while every request waits.
            self._db.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
            self._db.execute("BEGIN IMMEDIATE")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            for since, schema in ((1, _SCHEMA), (2, _SINCE_2)):
                if version < since:
                    for statement in schema.split(";"):
                        self._db.execute(statement)
            if version < _VERSION:
                self._db.execute(f"PRAGMA user_version = {_VERSION}")
            self._db.execute("COMMIT")
        except sqlite3.OperationalError as exc:
            raise SettingsError(
                f"{path}: {exc}; another gateway may use it. Give each a --data-dir of its own."
            ) from exc
        except sqlite3.DatabaseError as exc:
            raise SettingsError(f"{path} is no file of a gateway: {exc}.") from exc
        if version > _VERSION:
            raise SettingsError(f"{path} is of another version of the gateway ({version}, not {_VERSION}).")

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    # ── sessions ──────────────────────────────────────────────────────────────────────────────────────────────────

    def add_session(self, session_id: str, owner: str, about: dict[str, Any]) -> None:
        """Adds a session."""
        now = time.time()
        row = (session_id, owner, json.dumps(about), now, now)
        self._run("INSERT INTO session (session_id, owner, about, created_s, seen_s) VALUES (?, ?, ?, ?, ?)", row)

    def session(self, session_id: str) -> sqlite3.Row | None:
        """One of them, ended or not."""
        found = self._rows("SELECT * FROM session WHERE session_id = ?", (session_id,))
        return found[0] if found else None

    def sessions(self, owner: str) -> list[sqlite3.Row]:
        """An owner's jobs, newest first."""
        return self._rows("SELECT * FROM session WHERE owner = ? ORDER BY created_s DESC, session_id", (owner,))

    def uncleared(self) -> list[sqlite3.Row]:
        """Sessions that go on, and those that ended and whose runs are not deleted yet."""
        return self._rows("SELECT * FROM session WHERE NOT cleared")

    def seen(self, session_ids: Iterable[tuple[str, float]]) -> None:
        """Writes when sessions were last heard of."""
        with self._transaction():
            self._db.executemany("UPDATE session SET seen_s = ?2 WHERE session_id = ?1", list(session_ids))

    def end_session(self, session_id: str, ended_by: dict[str, Any]) -> None:
        """It is over, and what waited to be sent or to be taken goes; who it was remains."""
        with self._transaction():
            self._db.execute(
                "UPDATE session SET ended_s = ?, ended_by = ? WHERE session_id = ? AND ended_s IS NULL",
                (time.time(), json.dumps(ended_by), session_id),
            )
            self._db.execute("DELETE FROM sample WHERE session_id = ?", (session_id,))
            self._db.execute(
                "DELETE FROM operation WHERE model_id IN (SELECT model_id FROM model WHERE session_id = ?)",
                (session_id,),
            )

    def session_cleared(self, session_id: str) -> None:
        """Its runs are deleted too."""
        self._run("UPDATE session SET cleared = 1 WHERE session_id = ?", (session_id,))

    def forget_sessions(self, before_s: float) -> None:
        """Nothing is kept of sessions that ended before then."""
        old = "SELECT session_id FROM session WHERE cleared AND ended_s < ?"
        with self._transaction():
            for table in ("sampler", "model", "session"):
                self._db.execute(f"DELETE FROM {table} WHERE session_id IN ({old})", (before_s,))  # noqa: S608

    # ── jobs ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def add_job(self, job_id: str, owner: str, about: str) -> None:
        """Adds a job."""
        row = (job_id, owner, about, time.time())
        self._run("INSERT INTO job (job_id, owner, about, created_s) VALUES (?, ?, ?, ?)", row)

    def job(self, job_id: str, owner: str) -> sqlite3.Row | None:
        """One of an owner's jobs."""
        found = self._rows("SELECT * FROM job WHERE job_id = ? AND owner = ?", (job_id, owner))
        return found[0] if found else None

    def jobs(self, owner: str) -> list[sqlite3.Row]:
        """An owner's jobs, newest first."""
        return self._rows("SELECT * FROM job WHERE owner = ? ORDER BY created_s DESC", (owner,))

    def set_job_sessions(self, job_id: str, owner: str, sessions: str) -> None:
        """Writes which sessions were begun in a job."""
        self._run("UPDATE job SET sessions = ? WHERE job_id = ? AND owner = ?", (sessions, job_id, owner))

    def delete_job(self, job_id: str, owner: str) -> None:
        """Ends a job."""
        self._run("DELETE FROM job WHERE job_id = ? AND owner = ?", (job_id, owner))

    # ── models ────────────────────────────────────────────────────────────────────────────────────────────────────

    def add_model(
        self, model_id: str, session_id: str, owner: str, *, trainer: str, request: dict[str, Any], digest: bytes
    ) -> None:
        """Adds a model that is to be made."""
        row = (model_id, session_id, owner, trainer, json.dumps(request), digest)
        self._run(
            "INSERT INTO model (model_id, session_id, owner, trainer, request, digest) VALUES (?, ?, ?, ?, ?, ?)", row
        )

    def model_made(self, model_id: str, *, run_id: str | None, outcome: bytes | None) -> None:
        """Notes that a model was made, or could not be."""
        self._run("UPDATE model SET run_id = ?, outcome = ? WHERE model_id = ?", (run_id, outcome, model_id))

    def model(self, model_id: str) -> sqlite3.Row | None:
        """A model, by its id or that of its run."""
        found = self._rows("SELECT * FROM model WHERE model_id = ?1 OR run_id = ?1", (model_id,))
        return found[0] if found else None

    def models(self, session_id: str) -> list[sqlite3.Row]:
        """What belongs to a session."""
        return self._rows("SELECT * FROM model WHERE session_id = ? ORDER BY model_id", (session_id,))

    # ── operations ────────────────────────────────────────────────────────────────────────────────────────────────

    def add_operation(self, model_id: str, seq_id: int, *, kind: str, digest: bytes, body: bytes) -> None:
        """Adds an operation that is about to be acknowledged."""
        row = (model_id, seq_id, kind, digest, body)
        self._run("INSERT INTO operation (model_id, seq_id, kind, digest, body) VALUES (?, ?, ?, ?, ?)", row)

    def operation_sent(self, model_id: str, seq_id: int, run_seq_id: int, plan: dict[str, Any]) -> None:
        """Notes that an operation is about to go to the run under that number."""
        row = (run_seq_id, json.dumps(plan), model_id, seq_id)
        self._run("UPDATE operation SET run_seq_id = ?, plan = ? WHERE model_id = ? AND seq_id = ?", row)

    def operation_refused(self, model_id: str, seq_id: int, run_seq_id: int, outcome: bytes) -> None:
        """Notes that an operation will not be sent; its number is used up by something else."""
        row = (run_seq_id, outcome, model_id, seq_id)
        self._run("UPDATE operation SET run_seq_id = ?, outcome = ? WHERE model_id = ? AND seq_id = ?", row)

    def operations_answered(self, answered: Iterable[tuple[str, str, int]]) -> None:
        """(plan as JSON, model_id, seq_id) of operations whose trainer has the answer: their bodies are let go."""
        with self._transaction():
            self._db.executemany(
                "UPDATE operation SET plan = ?, body = NULL WHERE model_id = ? AND seq_id = ?", list(answered)
            )

    def operation(self, model_id: str, seq_id: int) -> OperationRow | None:
        """One of them."""
        found = self._operations("WHERE model_id = ? AND seq_id = ?", (model_id, seq_id))
        return found[0] if found else None

    def operations(self, model_id: str) -> list[OperationRow]:
        """A model's operations in order, without their bodies."""
        return self._operations("WHERE model_id = ? ORDER BY seq_id", (model_id,), body="NULL")

    # ── samplers and samples ──────────────────────────────────────────────────────────────────────────────────────

    def add_sampler(
        self, sampler_id: str, session_id: str, owner: str, *, trainer: str, base_model: str, model_path: str
    ) -> None:
        """Adds a sampler."""
        row = (sampler_id, session_id, owner, trainer, base_model, model_path)
        self._run("INSERT OR REPLACE INTO sampler VALUES (?, ?, ?, ?, ?, ?)", row)

    def sampler(self, sampler_id: str) -> sqlite3.Row | None:
        """One of them."""
        found = self._rows("SELECT * FROM sampler WHERE sampler_id = ?", (sampler_id,))
        return found[0] if found else None

    def samplers(self, session_id: str) -> list[sqlite3.Row]:
        """What belongs to a session."""
        return self._rows("SELECT * FROM sampler WHERE session_id = ? ORDER BY sampler_id", (session_id,))

    def add_sample(
        self,
        request_id: str,
        sampler_id: str,
        session_id: str,
        owner: str,
        *,
        digest: bytes,
        num_samples: int,
        body: bytes,
    ) -> None:
        """Adds a sample request that is about to be acknowledged."""
        row = (request_id, sampler_id, session_id, owner, digest, num_samples, body)
        self._run(
            "INSERT INTO sample (request_id, sampler_id, session_id, owner, digest, num_samples, body) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            row,
        )

    def sample(self, request_id: str) -> sqlite3.Row | None:
        """One of them."""
        found = self._rows("SELECT * FROM sample WHERE request_id = ?", (request_id,))
        return found[0] if found else None

    def samples(self, sampler_id: str) -> list[sqlite3.Row]:
        """Of a sampler: (request_id, answered_s, size_bytes of the stored outcome, its first byte as `mark`)."""
        columns = "request_id, answered_s, length(outcome) AS size_bytes, substr(outcome, 1, 1) AS mark"
        # Ids of samples begin with that of their sampler; ";" is what follows ":".
        return self._rows(
            f"SELECT {columns} FROM sample WHERE request_id > ? AND request_id < ?",  # noqa: S608
            (f"{sampler_id}:", f"{sampler_id};"),
        )

    def samples_answered(self, answered: Iterable[tuple[bytes, float, str]]) -> None:
        """(outcome, time, request_id) of those that are."""
        with self._transaction():
            self._db.executemany(
                "UPDATE sample SET outcome = ?, answered_s = ?, body = NULL WHERE request_id = ?", list(answered)
            )

    def forget_answered(self, request_ids: Iterable[str]) -> None:
        """Forgets samples whose answers the client has."""
        with self._transaction():
            self._db.executemany(
                "DELETE FROM sample WHERE request_id = ? AND answered_s IS NOT NULL", [(one,) for one in request_ids]
            )

    def forget_samples(self, before_s: float) -> None:
        """Deletes answers given before then."""
        self._run("DELETE FROM sample WHERE answered_s < ?", (before_s,))

    # ── SQLite ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _operations(self, where: str, values: tuple[Any, ...], *, body: str = "body") -> list[OperationRow]:
        query = f"SELECT seq_id, kind, digest, {body}, run_seq_id, plan, outcome FROM operation {where}"  # noqa: S608
        with closing(self._db.execute(query, values)) as cursor:
            return [OperationRow(*row)._replace(plan=json.loads(row[5]) if row[5] else {}) for row in cursor.fetchall()]

    def _rows(self, query: str, values: tuple[Any, ...] = ()) -> list[sqlite3.Row]:
        with closing(self._db.cursor()) as cursor:
            cursor.row_factory = sqlite3.Row
            return cursor.execute(query, values).fetchall()

    def _run(self, statement: str, values: tuple[Any, ...]) -> None:
        self._db.execute(statement, values)

    def _transaction(self) -> "_Transaction":
        return _Transaction(self._db)


class _Transaction:
    """All or nothing of several writes."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, *_: object) -> None:
        self._db.execute("COMMIT" if kind is None else "ROLLBACK")
