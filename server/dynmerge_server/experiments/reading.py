"""Reading: the log's file for those who only read, in the server and beside it.

Knows no queue: what is not written yet is not seen here.
"""

import sqlite3
import threading
from pathlib import Path
from typing import Any

from dynmerge.errors import LogError
from dynmerge_server.experiments.schema import Handle, connect, read_key, reason

BUSY_SECONDS = 0.05  # readers hardly ever wait; the event loop never should


class Reader:
    """Quick questions to the file, from any thread."""

    def __init__(self, path: Path, key: str) -> None:
        self._handle = Handle(path, key, "ro", BUSY_SECONDS)
        self._lock = threading.Lock()

    def rows(self, query: str, *values: Any) -> list[Any]:
        """All rows. Raises sqlite3.Error, OSError or LogError."""
        with self._lock:  # to the last row: a question left open would keep the WAL from shrinking
            return self._handle.connection().execute(query, values).fetchall()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._handle.close()


def open_readonly(path: Path) -> sqlite3.Connection:
    """The log at `path`, for reports: while servers write, and in a folder that is read-only.

    Raises LogError naming the path.
    """
    try:
        if not path.exists():
            raise LogError("there is no such file")
        try:
            return _checked(connect(path, "ro"))
        except sqlite3.OperationalError:
            # In a read-only folder SQLite cannot make the files by which it sees who writes.
            wal = path.with_name(path.name + "-wal")
            if wal.exists() and wal.stat().st_size:
                raise
            return _checked(connect(path, "ro&immutable=1"))
    except (sqlite3.Error, OSError, LogError) as error:
        message = f"cannot read the log of experiments {path}: {reason(error)}"
        raise LogError(message) from None


def _checked(connection: sqlite3.Connection) -> sqlite3.Connection:
    try:
        read_key(connection)
    except BaseException:
        connection.close()
        raise
    return connection
