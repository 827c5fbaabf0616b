"""A run's journal: every operation, on disk before it is executed, and its outcome, on disk before it is answered.

One SQLite file per run, `journal.sqlite` in the run's folder, in WAL mode. Killing processes at any instant loses
nothing that was committed, whatever `sync` is. Power loss and kernel crashes are another matter: with "full" every
commit is on the disk before its operation is dispatched; with "normal" the file stays sound, but commits of the last
moments may be missing from its end, so that the run is recovered as it was some operations earlier, and its client is
told so.

Requests and answers from 64 KiB on lie beside the file, see journal_contents.py; in the tables below they are empty.
Format 1 had them inside; such a journal becomes one of this format when it is opened, and keeps what it has.

Tables: `run` (name, value), what the run is; `operations`, by seq_id, as they came; `outcomes`, by seq_id, the encoded
answer, and of it the error's reason, the metrics as JSON and the run's step, for the run's curves and for people who
read the file with sqlite3; `past_metrics`, by seq_id, what is kept of pruned operations.
"""

import contextlib
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from gradwire.errors import error, from_status
from gradwire.v1.trainer_service_pb2 import TrainResponse

from trainer_service.config import Retention, Sync
from trainer_service.runs import journal_contents, journal_metrics
from trainer_service.runs.journal_contents import LARGE_BYTES, Contents
from trainer_service.runs.operation import Operation

FILE_NAME = "journal.sqlite"
_RESERVE = "reserve"
_RESERVE_BYTES = 4 * 1024 * 1024
"""Room for some dozens of commits."""
CHECKPOINT_PAGES = 512
"""Pages of the log after which SQLite copies it into the file."""
_FORMAT = "2"
_FORMATS = ("1", _FORMAT)
# `attempts` has Row.deaths; the name is older, and older journals are read.
_SCHEMA = f"""
CREATE TABLE run (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE operations (
    seq_id INTEGER PRIMARY KEY, kind TEXT NOT NULL, digest BLOB NOT NULL, received_s REAL NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0, request BLOB NOT NULL
);
CREATE TABLE outcomes (
    seq_id INTEGER PRIMARY KEY, reason TEXT NOT NULL, step INTEGER NOT NULL, metrics TEXT NOT NULL, answer BLOB NOT NULL
);
{journal_contents.SCHEMA};
"""
_LARGE_KINDS = ("forward", "forward_backward", "backward")
"""Kinds of operations that carry tensors."""
_BUSY_TIMEOUT_S = 30.0
"""How long a reader may hold up the writer; no reader of ours takes this long."""
_CHUNK_BYTES = 16 * 1024 * 1024
_CHUNK_ROWS = 256


class DamagedJournal(Exception):
    """The file is not a journal, or is damaged; the message says why."""


@dataclass(frozen=True)
class Record:
    """What describes a run for its whole life."""

    run_id: str
    owner: str
    base_model: str
    created_s: float
    create_request: bytes
    """Encoded CreateRunRequest."""
    parent_run_id: str = ""
    """The run it was forked from; "" for one made from the base model."""
    parent_seq_id: int = 0
    """Last operation of the parent that it contains."""
    parent_step: int = 0
    """Optimizer steps applied then."""
    step: int = 0
    """Optimizer steps applied."""


@dataclass(frozen=True)
class Row:
    """One operation of the journal."""

    seq_id: int
    kind: str
    digest: bytes
    deaths: int
    """Workers that died while they executed it, as far as trainers have counted."""
    request: bytes
    """Encoded TrainRequest; empty if there was no room for it, unless it is a cancel, which is small."""
    reason: str | None
    """Reason of the error it failed with; "" if it succeeded, None while it has no outcome."""
    answer: bytes
    """Encoded TrainResponse; empty while it has no outcome."""


def connect(folder: Path, *, sync: Sync = "normal", create: bool = False) -> sqlite3.Connection:
    """The journal in a run's folder, in autocommit mode.

    Args:
        folder: The run's.
        sync: See the module's docstring.
        create: Make one if there is none.

    Raises:
        FileNotFoundError: There is none.
    """
    if not create:
        # SQLite would make an empty one.
        file_id(folder)
    db = sqlite3.connect(folder / FILE_NAME, isolation_level=None, check_same_thread=False, timeout=_BUSY_TIMEOUT_S)
    try:
        # Operations are megabytes: with pages of 4 KiB, copied out of the log every 4 MiB, a gigabyte takes 16 s to
        # write, so 5 s. An operation of a few bytes takes 0.02 ms more.
        db.execute("PRAGMA page_size = 65536")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        db.execute(f"PRAGMA synchronous = {sync.upper()}")
    except BaseException:
        db.close()
        raise
    return db


def file_id(folder: Path) -> tuple[int, int]:
    """Tells the journal in a run's folder from another one put in its place.

    Raises:
        FileNotFoundError: There is none.
    """
    stat = (folder / FILE_NAME).stat()
    return stat.st_dev, stat.st_ino


def create(folder: Path, record: Record, *, sync: Sync = "normal") -> None:
    """Writes a journal without operations."""
    with contextlib.closing(connect(folder, sync=sync, create=True)) as db:
        values = {name: getattr(record, name) for name in Record.__dataclass_fields__}
        rows = [("format", _FORMAT), ("boot_id", journal_contents.boot_id()), *values.items()]
        db.executescript(f"BEGIN; {_SCHEMA}")
        db.executemany("INSERT INTO run VALUES (?, ?)", rows)
        db.execute("COMMIT")
    make_reserve(folder)


def make_reserve(folder: Path) -> bool:
    """Reserves room for answers, for when the disk is full. Returns whether there was enough."""
    try:
        with (folder / _RESERVE).open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, _RESERVE_BYTES)
    except OSError:
        spend_reserve(folder)
        return False
    return True


def has_reserve(folder: Path) -> bool:
    """Whether that room is reserved."""
    return (folder / _RESERVE).exists()


def has_room(folder: Path, size_bytes: int) -> bool:
    """Whether an operation of that size leaves room for a reserve."""
    # Twice: it is written to the log first and copied from there.
    return shutil.disk_usage(folder).free >= _RESERVE_BYTES + 2 * size_bytes


def spend_reserve(folder: Path) -> bool:
    """Gives the reserved room back. Returns whether there was any."""
    try:
        (folder / _RESERVE).unlink()
    except OSError:
        return False
    return True


def read_record(db: sqlite3.Connection) -> Record:
    """What the run is.

    Raises:
        DamagedJournal: It cannot be read.
    """
    try:
        values = dict(db.execute("SELECT name, value FROM run"))
    except sqlite3.Error as exc:
        raise DamagedJournal(str(exc)) from exc
    if values.get("format") not in _FORMATS:
        readable = " and ".join(map(repr, _FORMATS))
        raise DamagedJournal(
            f"its format is {values.get('format')!r}, but this version of Gradwire reads {readable}; use the version "
            "that wrote it, or a later one"
        )
    return Record(**{name: values[name] for name in Record.__dataclass_fields__})


def seq_ids(db: sqlite3.Connection) -> tuple[int, int, int]:
    """(oldest operation kept, last operation, first one without an outcome); (1, 0, 1) for an empty journal."""
    # Two queries: one for both reads the whole table.
    oldest, last = db.execute(
        "SELECT (SELECT min(seq_id) FROM operations), (SELECT max(seq_id) FROM operations)"
    ).fetchone()
    if last is None:
        return 1, 0, 1
    # Any number may have been refused at once after one that is still undone, but successes come in order.
    succeeded = db.execute("SELECT seq_id FROM outcomes WHERE reason = '' ORDER BY seq_id DESC LIMIT 1").fetchone()
    undone = db.execute(
        "SELECT seq_id FROM operations o WHERE seq_id > ? "
        "AND NOT EXISTS (SELECT 1 FROM outcomes a WHERE a.seq_id = o.seq_id) ORDER BY seq_id LIMIT 1",
        succeeded or (0,),
    ).fetchone()
    return oldest, last, undone[0] if undone else last + 1


def take_up(folder: Path, db: sqlite3.Connection, *, snapshots: Sequence[int] = ()) -> int | None:
    """Makes a journal that was left fit to be written on: of this format, and without what a power cut took.

    Args:
        folder: The run's.
        db: The journal in it.
        snapshots: Last operations in the whole snapshots. What lies before the newest that the journal reaches is not
            needed to recover the run: if contents are lost there, they are pruned with all operations before.

    Returns:
        The first operation whose contents are lost and needed, from which on all are cut off; None if none is.
    """
    boot_id = journal_contents.boot_id()
    if boot_id and db.execute("SELECT value FROM run WHERE name = 'boot_id'").fetchone() == (boot_id,):
        # What was written since the machine started is there, whatever process was killed.
        return None
    db.execute("BEGIN IMMEDIATE")
    try:
        db.execute(journal_contents.SCHEMA)
        all_lost = journal_contents.lost(folder, db)
        last = seq_ids(db)[1]
        start = max((seq_id for seq_id in snapshots if seq_id <= last), default=0)
        lost = next((seq_id for seq_id in all_lost if seq_id > start), None)
        if lost is not None:
            db.execute("DELETE FROM operations WHERE seq_id >= ?", (lost,))
            db.execute("DELETE FROM outcomes WHERE seq_id >= ?", (lost,))
            db.execute("DELETE FROM contents WHERE seq_id >= ?", (lost,))
        if before := [seq_id for seq_id in all_lost if seq_id <= start]:
            # The last operation stays, without its contents: the next seq_id follows from it.
            _delete(db, up_to=min(before[-1], seq_ids(db)[1] - 1))
            db.execute("DELETE FROM contents WHERE seq_id <= ?", (before[-1],))
        db.execute("INSERT OR REPLACE INTO run VALUES ('boot_id', ?), ('format', ?)", (boot_id, _FORMAT))
        db.execute("COMMIT")
    except BaseException:
        db.execute("ROLLBACK")
        raise
    return lost


def read(folder: Path, db: sqlite3.Connection, after: int, *, up_to: int | None = None) -> list[Row]:
    """The next chunk of operations after `after`, in order; empty at the end.

    Args:
        folder: The run's.
        db: The journal in it.
        after: A seq_id.
        up_to: Last seq_id of interest.
    """
    rows: list[Row] = []
    size_bytes = 0
    # In one transaction: contents go with their operations.
    db.execute("BEGIN")
    try:
        for row in db.execute(
            "SELECT o.seq_id, kind, digest, attempts, request, reason, answer, "
            "(SELECT coalesce(sum(size), 0) FROM contents c WHERE c.seq_id = o.seq_id) FROM operations o "
            "LEFT JOIN outcomes a USING (seq_id) WHERE o.seq_id > ? AND o.seq_id <= ? ORDER BY o.seq_id LIMIT ?",
            (after, 2**62 if up_to is None else up_to, _CHUNK_ROWS),
        ):
            seq_id, kind, digest, deaths, request, reason, answer, large_bytes = row
            # Older trainers wrote -1 for some that had caused none.
            rows.append(Row(seq_id, kind, digest, max(0, deaths), request, reason, answer or b""))
            size_bytes += len(request) + len(answer or b"") + large_bytes
            if size_bytes > _CHUNK_BYTES:
                break
        contents = journal_contents.read(folder, db, (rows[0].seq_id, rows[-1].seq_id)) if rows else {}
    finally:
        db.execute("COMMIT")
    return [
        replace(
            row,
            request=contents.get((row.seq_id, "request"), row.request),
            answer=contents.get((row.seq_id, "answer"), row.answer),
        )
        for row in rows
    ]


def read_all(folder: Path, after: int, *, up_to: int | None = None) -> Iterator[list[Row]]:
    """Every chunk that `read` gives, to the end, each with a connection of its own.

    Raises:
        FailedPreconditionError: RUN_LOST: some operations were pruned.
    """
    while True:
        with contextlib.closing(connect(folder)) as db:
            rows = read(folder, db, after, up_to=up_to)
            next_seq_id = rows[0].seq_id if rows else seq_ids(db)[0]
        if next_seq_id > after + 1 and (up_to is None or after < up_to):
            raise error(
                "RUN_LOST",
                f"Operations {after + 1} to {next_seq_id - 1} of {folder.name} are no longer in its journal, which "
                "keeps as much as --keep-bytes, --keep-operations and --keep-s say.",
                run_id=folder.name,
            )
        if not rows:
            return
        yield rows
        after = rows[-1].seq_id


_STEPS = "FROM operations JOIN outcomes USING (seq_id) WHERE kind IN ('optim_step', 'load_state') AND reason = ''"
"""Operations after which a run is at their outcome's step."""


def seq_id_of_step(db: sqlite3.Connection, step: int) -> int | None:
    """The last operation that made or loaded the step `step`; None if the journal has none."""
    return db.execute(f"SELECT max(seq_id) {_STEPS} AND step = ?", (step,)).fetchone()[0]


def steps(db: sqlite3.Connection) -> tuple[int, int, int]:
    """(count, first, last) of the optimizer steps that the journal's operations made or loaded; zeros for none."""
    many, first, last = db.execute(f"SELECT count(DISTINCT step), min(step), max(step) {_STEPS}").fetchone()
    return many, first or 0, last or 0


def insert_operation(
    db: sqlite3.Connection, operation: Operation, digest: bytes, *, received_s: float, contents: Contents | None = None
) -> None:
    """Writes down an operation as it was received, into `contents` if it is large and there are some."""
    seq_id, kind, encoded = operation.seq_id, operation.kind, operation.encoded
    if contents is not None and kind in _LARGE_KINDS and len(encoded) >= LARGE_BYTES:
        contents.write(seq_id, "request", encoded)
        encoded = b""
    values = (seq_id, kind, digest, received_s, encoded)
    db.execute("INSERT INTO operations (seq_id, kind, digest, received_s, request) VALUES (?, ?, ?, ?, ?)", values)


def insert_refused(db: sqlite3.Connection, operation: Operation, digest: bytes, response: TrainResponse) -> None:
    """Writes down an operation that there was no room for, without its content, so that its seq_id is used."""
    seq_id, kind = operation.seq_id, operation.kind
    values = (seq_id, kind, digest, time.time(), operation.encoded if kind == "cancel" else b"")
    # A failed commit may turn out whole in the log when the file is opened again; what was answered counts.
    db.execute(
        "INSERT OR REPLACE INTO operations (seq_id, kind, digest, received_s, request) VALUES (?, ?, ?, ?, ?)", values
    )
    db.execute("DELETE FROM contents WHERE seq_id = ?", (seq_id,))
    insert_outcome(db, seq_id, response, response.SerializeToString(), step=0)


def insert_outcome(
    db: sqlite3.Connection,
    seq_id: int,
    response: TrainResponse,
    answer: bytes,
    *,
    step: int,
    reported: Mapping[str, float] = MappingProxyType({}),
    contents: Contents | None = None,
) -> None:
    """Writes down an operation's outcome; its metrics include those that its caller `reported`. A large answer goes
    into `contents`, if there are some."""
    kind = response.WhichOneof("result") or "error"
    reason = from_status(response.error).reason if kind == "error" else ""
    metrics = {**getattr(getattr(response, kind), "metrics", {}), **reported}
    metrics |= {f"{part}_ms:sum": getattr(response, f"{part}_ms") for part in ("queue", "execute", "transfer")}
    if contents is not None and len(answer) >= LARGE_BYTES:
        contents.write(seq_id, "answer", answer)
        answer = b""
    values = (seq_id, reason, step, json.dumps(metrics), answer)
    db.execute("INSERT OR REPLACE INTO outcomes VALUES (?, ?, ?, ?, ?)", values)
    if kind in ("optim_step", "load_state"):
        db.execute("UPDATE run SET value = ? WHERE name = 'step'", (step,))


def set_deaths(db: sqlite3.Connection, seq_id: int, deaths: int) -> None:
    """Remembers how many workers died while they executed an operation."""
    db.execute("UPDATE operations SET attempts = ? WHERE seq_id = ?", (deaths, seq_id))


def prune(db: sqlite3.Connection, retention: Retention, *, snapshot_seq_id: int) -> None:
    """Deletes the oldest operations that need not be kept.

    Args:
        db: The journal.
        retention: What is kept.
        snapshot_seq_id: Last operation in the oldest snapshot that recovery may have to start from.
    """
    if retention.keep_everything:
        return
    last = db.execute("SELECT max(seq_id) FROM operations").fetchone()[0]
    if last is None:
        return
    cuts = [0]
    if retention.keep_operations:
        cuts.append(last - retention.keep_operations)
    if retention.keep_s:
        oldest_s = time.time() - retention.keep_s
        found = db.execute("SELECT max(seq_id) FROM operations WHERE received_s < ?", (oldest_s,)).fetchone()
        cuts.append(found[0] or 0)
    if retention.keep_bytes:
        size_bytes = 0
        # The length of a blob is in its row's header, so this reads no requests.
        for seq_id, row_bytes in db.execute(
            "SELECT o.seq_id, length(request) + coalesce(length(answer), 0) + "
            "(SELECT coalesce(sum(size), 0) FROM contents c WHERE c.seq_id = o.seq_id) FROM operations o "
            "LEFT JOIN outcomes a USING (seq_id) ORDER BY o.seq_id DESC"
        ):
            size_bytes += row_bytes
            if size_bytes > retention.keep_bytes:
                cuts.append(seq_id)
                break
    # The last operation stays, since the next seq_id follows from it.
    cut = min(max(cuts), snapshot_seq_id, last - 1)
    _delete(db, up_to=cut)


def _delete(db: sqlite3.Connection, *, up_to: int) -> None:
    journal_metrics.keep(db, up_to=up_to)
    db.execute("DELETE FROM operations WHERE seq_id <= ?", (up_to,))
    db.execute("DELETE FROM outcomes WHERE seq_id <= ?", (up_to,))
    db.execute("DELETE FROM contents WHERE seq_id <= ?", (up_to,))


def size_bytes(folder: Path) -> int:
    """Bytes the journal takes on disk."""
    total = 0
    parts = [folder / f"{FILE_NAME}{suffix}" for suffix in ("", "-wal", "-shm")]
    for part in [*parts, *journal_contents.files(folder)]:
        with contextlib.suppress(OSError):
            total += os.lstat(part).st_size
    return total
