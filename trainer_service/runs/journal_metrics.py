"""What curves need to know of a journal's operations; kept when the operations themselves are pruned.

It is a few hundred bytes per operation, read without the requests and answers, which may be megabytes.
"""

import json
import sqlite3
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measured:
    """What is known of an answered operation."""

    seq_id: int
    kind: str
    received_s: float
    """When it came, seconds since 1970."""
    reason: str
    """Of the error it failed with; "" where it succeeded."""
    step: int
    """Optimizer steps applied to the run after it."""
    metrics: dict[str, float]
    optim_step: bytes
    """The encoded TrainRequest of an optim_step; empty for anything else."""


_MAKE_PAST = """
CREATE TABLE IF NOT EXISTS past_metrics (
    seq_id INTEGER PRIMARY KEY, kind TEXT NOT NULL, received_s REAL NOT NULL, reason TEXT NOT NULL,
    step INTEGER NOT NULL, metrics TEXT NOT NULL, optim_step BLOB NOT NULL
)
"""
"""The table is made when operations are first pruned; a journal that has all of them has no such table."""
_KEEP = """
INSERT OR REPLACE INTO past_metrics
SELECT o.seq_id, kind, received_s, reason, step, metrics, CASE kind WHEN 'optim_step' THEN request ELSE x'' END
FROM operations o JOIN outcomes USING (seq_id) WHERE o.seq_id <= ?
"""
_READ_PAST = "SELECT * FROM past_metrics WHERE seq_id > ? ORDER BY seq_id LIMIT ?"
_READ = """
SELECT o.seq_id, kind, received_s, reason, step, metrics, CASE kind WHEN 'optim_step' THEN request ELSE x'' END
FROM operations o LEFT JOIN outcomes USING (seq_id) WHERE o.seq_id > ? ORDER BY o.seq_id LIMIT ?
"""


def keep(db: sqlite3.Connection, *, up_to: int) -> None:
    """Keeps what the operations up to a seq_id measured, before they are pruned."""
    db.execute(_MAKE_PAST)
    db.execute(_KEEP, (up_to,))


def read(db: sqlite3.Connection, after: int, *, limit: int) -> list[Measured]:
    """What the next operations after `after` measured, in order, up to the first without an outcome."""
    rows: list[Any] = []
    # In one transaction: between two queries operations may move from one table to the other.
    db.execute("BEGIN")
    try:
        if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'past_metrics'").fetchone():
            rows += db.execute(_READ_PAST, (after, limit))
        if len(rows) < limit:
            rows += db.execute(_READ, (rows[-1][0] if rows else after, limit - len(rows)))
    finally:
        db.execute("COMMIT")
    answered = next((place for place, row in enumerate(rows) if row[3] is None), len(rows))
    return [
        Measured(seq_id, kind, received_s, reason, step, json.loads(metrics), optim_step)
        for seq_id, kind, received_s, reason, step, metrics, optim_step in rows[:answered]
    ]
