"""Schema: the SQLite file of the log, its settings, its tables, and how it is opened.

Knows no queue and no requests, and must not import the server's configuration, which imports this.
"""

import os
import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from dynmerge.errors import ConfigError, LogError

VERSION = "1"
BUSY_SECONDS = 2.0  # to wait for another process that writes
WAL_BYTES = 64 << 20  # what is kept of the write-ahead log once a reader let it grow

Mode = Literal["ro", "rw", "rwc", "ro&immutable=1"]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY NOT NULL, value TEXT NOT NULL);
CREATE TABLE revisions (
    experiment TEXT NOT NULL, number INTEGER NOT NULL, phase INTEGER NOT NULL, time REAL NOT NULL,
    source TEXT NOT NULL, declaration TEXT NOT NULL, reason TEXT NOT NULL,
    PRIMARY KEY (experiment, number)
);
CREATE TABLE exposures (
    id TEXT PRIMARY KEY NOT NULL, request_id TEXT NOT NULL, time REAL NOT NULL,
    unit TEXT NOT NULL, kind TEXT NOT NULL, preference TEXT NOT NULL, method TEXT NOT NULL,
    merge_id TEXT NOT NULL, experiment TEXT, arm TEXT, phase INTEGER NOT NULL,
    pair TEXT, position INTEGER,
    status INTEGER, cache TEXT, prompt_tokens INTEGER, completion_tokens INTEGER,
    ttft REAL, latency REAL, finish_reason TEXT, empty INTEGER
);
CREATE INDEX exposures_of_request ON exposures (request_id);
CREATE INDEX exposures_of_experiment ON exposures (experiment, unit, time);
CREATE INDEX exposures_of_unit ON exposures (unit);
CREATE INDEX exposures_in_time ON exposures (time);
CREATE INDEX exposures_of_pair ON exposures (pair) WHERE pair IS NOT NULL;
CREATE TABLE outcomes (
    id TEXT PRIMARY KEY NOT NULL, request_id TEXT NOT NULL, time REAL NOT NULL,
    name TEXT NOT NULL, data_type TEXT NOT NULL, value REAL, category TEXT, comment TEXT,
    exposure TEXT NOT NULL
);
CREATE INDEX outcomes_of_exposure ON outcomes (exposure);
CREATE INDEX outcomes_in_time ON outcomes (time);
"""


@dataclass(frozen=True, slots=True)
class LogConfig:
    """Where the log is, and what it may take. Retention should outlast every experiment."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    path: Path
    queue: Count = 10_000  # records that wait to be written; more push out the oldest
    batch: Count = 500  # records in one transaction
    flush_seconds: Positive = 0.2  # the longest that a record waits for others to join it
    max_bytes: Count = 4 << 30  # of the file; what does not fit is lost, and counted
    retention_days: Positive | None = None  # older exposures go, with their outcomes


def create(path: Path) -> str:
    """Make the file where there is none; the key that its units are hashed with.

    Raises ConfigError naming the path where it cannot be written or is of another kind.
    """
    try:
        if not path.parent.is_dir():
            raise ConfigError(_cannot(path, "its folder does not exist"))
        # SQLite opens what is read-only, and fails only when there is something to write.
        for needed in (path.parent, *([path] if path.exists() else [])):
            if not os.access(needed, os.W_OK):
                raise ConfigError(_cannot(path, f"{needed} is read-only"))
        with closing(_in_wal_mode(path)) as connection, transaction(connection):
            if not _tables(connection):
                for statement in filter(str.strip, TABLES.split(";")):
                    connection.execute(statement)
                made = [("schema", VERSION), ("key", secrets.token_hex(32))]
                connection.executemany("INSERT INTO meta VALUES (?, ?)", made)
            return read_key(connection)
    except LogError as error:
        raise ConfigError(_cannot(path, str(error))) from None
    except (sqlite3.Error, OSError) as error:
        raise ConfigError(_cannot(path, reason(error))) from None


def connect(
    path: Path, mode: Mode = "rw", busy_seconds: float = BUSY_SECONDS
) -> sqlite3.Connection:
    """A connection in autocommit that any thread may use. Raises sqlite3.Error."""
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}",
        timeout=busy_seconds,
        isolation_level=None,
        check_same_thread=False,
        uri=True,
    )
    connection.execute("PRAGMA synchronous=NORMAL")  # kill -9 loses no commit; a power cut may
    connection.execute("PRAGMA secure_delete=ON")  # who is forgotten is so in free pages too
    connection.execute(f"PRAGMA journal_size_limit={WAL_BYTES}")
    return connection


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All or nothing, with the right to write from the start."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):  # a full disk may have rolled back already
            connection.execute("ROLLBACK")
        raise


def read_key(connection: sqlite3.Connection) -> str:
    """The key of a log. Raises LogError where the file is of another version, or no log."""
    if "meta" not in _tables(connection):
        raise LogError("the file holds something else than a log of experiments")
    meta = dict(connection.execute("SELECT key, value FROM meta").fetchall())
    if meta.get("schema") != VERSION:
        raise LogError(f"it has schema {meta.get('schema')}, and this server writes {VERSION}")
    return str(meta["key"])


def reason(error: Exception) -> str:
    """What went wrong, without the path."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return str(error)


class Handle:
    """A connection to whatever file is at `path`, if it is the log with this key.

    SQLite would write on into a file that was moved or deleted, where nobody finds it.
    """

    def __init__(self, path: Path, key: str, mode: Mode = "rw", busy_seconds: float = BUSY_SECONDS):
        self._path = path
        self._key = key
        self._mode: Mode = mode
        self._busy_seconds = busy_seconds
        self._connection: sqlite3.Connection | None = None
        self._file = (0, 0)

    def connection(self) -> sqlite3.Connection:
        """Open, or still open. Raises sqlite3.Error, OSError or LogError."""
        found = os.stat(self._path)  # noqa: PTH116 (a third of the time, and this is per request)
        file = (found.st_dev, found.st_ino)
        if self._connection is None or file != self._file:
            self.close()
            opened = connect(self._path, self._mode, self._busy_seconds)
            try:
                if read_key(opened) != self._key:
                    raise LogError("another log is in its place")
            except BaseException:
                opened.close()
                raise
            self._connection, self._file = opened, file
        return self._connection

    def close(self) -> None:
        """Close what is open; the next use opens again."""
        if self._connection is not None:
            with suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None


def _in_wal_mode(path: Path) -> sqlite3.Connection:
    """Open and make a new file's journal a write-ahead log, for which SQLite does not wait."""
    connection = connect(path, "rwc")
    try:
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                connection.execute("PRAGMA journal_mode=WAL")
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
            else:
                return connection
    except BaseException:
        connection.close()
        raise


def _tables(connection: sqlite3.Connection) -> set[str]:
    rows = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    return {name for (name,) in rows}


def _cannot(path: Path, why: str) -> str:
    return f"cannot keep the log of experiments in {path}: {why}"
