"""Rows: a record as a row of the log's file, how one is found, and how many are deleted.

Everything here is in the transaction of its caller, except deletions, which make their own.
"""

import sqlite3
from collections.abc import Sequence
from dataclasses import fields
from operator import attrgetter
from typing import Any, Literal

from dynmerge.errors import LogError, OutcomeConflict, UnknownRequest
from dynmerge_server.experiments.records import Exposure, Finish, Outcome, Revision
from dynmerge_server.experiments.schema import transaction

STEP = 500  # exposures deleted in one transaction

Fate = Literal["stored", "again"]


def _names(record: type) -> list[str]:
    return [item.name for item in fields(record)]


def _insert(table: str, names: Sequence[str], more: str = "") -> str:
    marks = ", ".join("?" * len(names))
    return f"INSERT INTO {table} ({', '.join(names)}) VALUES ({marks}){more}"


EXPOSURE = _names(Exposure)
FINISH = [name for name in _names(Finish) if name != "exposure"]
OUTCOME = _names(Outcome)
REVISION = _names(Revision)
SAME = [name for name in OUTCOME if name not in ("id", "time")]

_exposure_values = attrgetter(*EXPOSURE)
_finish_values = attrgetter(*FINISH, "exposure")
_outcome_values = attrgetter(*OUTCOME)
_revision_values = attrgetter(*REVISION)
_same_values = attrgetter(*SAME)

# A batch may come again after a commit of which nobody knows whether it happened.
_ADD_EXPOSURE = _insert("exposures", EXPOSURE, " ON CONFLICT (id) DO NOTHING")
_ADD_OUTCOME = _insert("outcomes", [*OUTCOME, "exposure"])
_ADD_REVISION = _insert("revisions", REVISION)
_SET_FINISH = f"UPDATE exposures SET {', '.join(f'{n} = ?' for n in FINISH)} WHERE id = ?"
_KNOWN_OUTCOME = f"SELECT {', '.join(SAME)} FROM outcomes WHERE id = ?"
_OF_REQUEST = "SELECT id FROM exposures WHERE request_id = ? ORDER BY time DESC, rowid DESC LIMIT 1"
_OF_PAIR = "SELECT pair FROM exposures WHERE pair = ? LIMIT 1"
FIRST = (
    "SELECT arm, phase FROM exposures WHERE experiment = ? AND unit = ? "
    "AND kind IN ('assigned', 'flagged') AND arm IS NOT NULL ORDER BY time, rowid LIMIT 1"
)
REVISIONS = f"SELECT {', '.join(REVISION)} FROM revisions ORDER BY rowid"


def store(connection: sqlite3.Connection, record: Exposure | Finish | Outcome) -> Fate:
    """Write one record. Raises UnknownRequest, OutcomeConflict or, without its row, LogError."""
    if isinstance(record, Exposure):
        connection.execute(_ADD_EXPOSURE, _exposure_values(record))
        return "stored"
    if isinstance(record, Finish):
        if not connection.execute(_SET_FINISH, _finish_values(record)).rowcount:
            raise LogError("the exposure that ended is not in the log")
        return "stored"
    return _store_outcome(connection, record)


def add_revisions(connection: sqlite3.Connection, revisions: Sequence[Revision]) -> None:
    """All of them, or none. Raises sqlite3.IntegrityError where a number is taken."""
    with transaction(connection):
        connection.executemany(_ADD_REVISION, map(_revision_values, revisions))


def exposure_of(connection: sqlite3.Connection, request_id: str) -> str | None:
    """What an outcome of this request belongs to: its newest exposure, or the pair so named."""
    for query in (_OF_REQUEST, _OF_PAIR):
        for (found,) in connection.execute(query, (request_id,)).fetchall():
            return str(found)
    return None


def delete_of_unit(connection: sqlite3.Connection, unit: str) -> int:
    """Delete a unit's exposures and their outcomes; how many exposures there were."""
    return _delete_all(connection, "unit = ?", unit)


def delete_some_before(connection: sqlite3.Connection, time: float) -> int:
    """Delete the oldest exposures with their outcomes, at most STEP; how many there were."""
    return _delete_some(connection, "time < ?", time)


def bytes_used(connection: sqlite3.Connection) -> int:
    """What the file takes, without pages that are free for new rows."""
    pragmas = ("page_count", "freelist_count", "page_size")
    pages, free, size = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in pragmas)
    return int((pages - free) * size)


def _store_outcome(connection: sqlite3.Connection, outcome: Outcome) -> Fate:
    for known in connection.execute(_KNOWN_OUTCOME, (outcome.id,)).fetchall():
        if known == _same_values(outcome):
            return "again"
        message = f"feedback {outcome.id[:80]!r} is known with other content, which counts"
        raise OutcomeConflict(message, "id")
    exposure = exposure_of(connection, outcome.request_id)
    if exposure is None:
        raise unknown(outcome.request_id)
    connection.execute(_ADD_OUTCOME, (*_outcome_values(outcome), exposure))
    return "stored"


def unknown(request_id: str) -> UnknownRequest:
    """The error for a request that was not logged."""
    message = f"no request {request_id[:80]!r} is in the log of experiments"
    return UnknownRequest(message, "request_id")


def _delete_all(connection: sqlite3.Connection, where: str, value: Any) -> int:
    deleted = 0
    while step := _delete_some(connection, where, value):
        deleted += step
    return deleted


def _delete_some(connection: sqlite3.Connection, where: str, value: Any) -> int:
    chosen = f"SELECT id, pair FROM exposures WHERE {where} ORDER BY time LIMIT {STEP}"
    rows = connection.execute(chosen, (value,)).fetchall()
    if not rows:
        return 0
    ids = [(exposure,) for exposure, _ in rows]
    pairs = [(pair,) for _, pair in rows if pair is not None]
    with transaction(connection):
        of = "DELETE FROM outcomes WHERE exposure = ?"
        connection.executemany(of, [*ids, *pairs])
        connection.executemany("DELETE FROM exposures WHERE id = ?", ids)
    return len(ids)
