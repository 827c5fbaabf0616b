"""A run's journal by itself."""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from gradwire.errors import FailedPreconditionError, error
from gradwire.v1.operation_pb2 import ZeroGradResponse
from gradwire.v1.trainer_service_pb2 import TrainRequest, TrainResponse

from trainer_service.config import Retention
from trainer_service.runs import journal
from trainer_service.runs.operation import Operation
from trainer_service.runs.sequence import error_response


@pytest.fixture
def db(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    """An empty journal, in tmp_path."""
    journal.create(tmp_path, journal.Record("run-1", "", "fake", 0.0, b""))
    with contextlib.closing(journal.connect(tmp_path)) as db:
        yield db


def insert(db: sqlite3.Connection, seq_id: int, outcome: str | None) -> None:
    """An operation that succeeded (""), failed (a reason) or is still to be done (None)."""
    operation = Operation.made(TrainRequest(seq_id=seq_id, zero_grad={}))
    journal.insert_operation(db, operation, operation.digest(), received_s=0.0)
    if outcome is not None:
        response = TrainResponse(seq_id=seq_id, zero_grad=ZeroGradResponse())
        if outcome:
            response = error_response(seq_id, error(outcome, "Refused.", path="a"))
        journal.insert_outcome(db, seq_id, response, response.SerializeToString(), step=0)


REFUSED = "CHECKPOINT_NOT_FOUND"


@pytest.mark.parametrize(
    ("outcomes", "first_undone"),
    [
        ([], 1),
        ([""], 2),
        ([None], 1),
        (["", REFUSED, None, None], 3),
        # However many were refused at once behind it.
        (["", REFUSED, None, *[REFUSED] * 300], 3),
        ([None, *[REFUSED] * 300, None], 1),
        ([*[REFUSED] * 300], 301),
    ],
)
def test_the_first_operation_still_to_be_done_is_found(
    db: sqlite3.Connection, outcomes: list[str | None], first_undone: int
):
    with db:
        db.execute("BEGIN")
        for seq_id, outcome in enumerate(outcomes, start=1):
            insert(db, seq_id, outcome)
    assert journal.seq_ids(db) == (1, len(outcomes), first_undone)


@pytest.mark.parametrize(("chunks", "up_to"), [(0, 8), (1, 8), (1, 4), (2, 8), (3, 8)])
def test_operations_let_go_while_they_are_read_are_missed(
    db: sqlite3.Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunks: int, up_to: int
):
    monkeypatch.setattr(journal, "_CHUNK_ROWS", 2)
    for seq_id in range(1, 10):
        insert(db, seq_id, "")
    reader = journal.read_all(tmp_path, 0, up_to=up_to)
    read = [row.seq_id for _ in range(chunks) for row in next(reader)]
    journal.prune(db, Retention(keep_operations=4), snapshot_seq_id=9)
    missing = f"Operations {len(read) + 1} to 5 of .* are no longer in its journal"
    with pytest.raises(FailedPreconditionError, match=missing) if len(read) < 5 else contextlib.nullcontext():
        assert [row.seq_id for row in next(reader)] == [7, 8]
