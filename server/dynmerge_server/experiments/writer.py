"""Writer: the one thread that moves what waits into the file, batch by batch, and keeps it small.

A batch that cannot be written waits on and is tried again; the thread ends only when it is told to.
"""

import sqlite3
import threading
import time
from contextlib import suppress

from dynmerge.errors import LogError, RequestError
from dynmerge_server.experiments.rows import (
    Fate,
    bytes_used,
    delete_of_unit,
    delete_some_before,
    exposure_of,
    store,
    unknown,
)
from dynmerge_server.experiments.schema import Handle, LogConfig, reason, transaction
from dynmerge_server.experiments.waiting import Forget, Record, Tally, Told, Waiting, hear

RETRY_SECONDS = 0.5  # after the file could not be written
CLOSE_SECONDS = 5.0
RETAIN_SECONDS = 60.0  # between looks for what is too old
STEP_SECONDS = 0.05  # between steps while there is some
DAY = 86_400.0

# The file, or the disk below it: the same batch may succeed later.
FILE_ERRORS = (sqlite3.Error, OSError, LogError)
# This record, which never will.
RECORD_ERRORS = (
    sqlite3.IntegrityError,
    sqlite3.InterfaceError,
    sqlite3.ProgrammingError,
    sqlite3.DataError,
    UnicodeError,
    OverflowError,
    LogError,
)


class Writer:
    """Begins on `start`; `stop` writes what waits, if it can."""

    def __init__(self, config: LogConfig, key: str, waiting: Waiting, tally: Tally) -> None:
        self.handle = Handle(config.path, key)
        self._config = config
        self._waiting = waiting
        self._tally = tally
        self._retain_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="experiments-log", daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def stop(self) -> None:
        """End within CLOSE_SECONDS; what is not in the file by then is lost, and counted."""
        self._waiting.close()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._waiting.all_lost("the log was closed")

    def _run(self) -> None:
        while True:
            batch = self._waiting.take(self._idle_seconds())
            if not batch and self._waiting.closed:
                break
            if batch and not self._written(batch):
                if self._waiting.closed:
                    self._waiting.all_lost("the log was closed while it could not be written")
                    break
                self._waiting.put_back()
                self._waiting.pause(RETRY_SECONDS)
            if time.monotonic() >= self._retain_at:
                self._retain()
        self.handle.close()

    def _written(self, batch: list[Record]) -> bool:
        """Whether the batch is dealt with: in the file, or lost for good."""
        try:
            connection = self.handle.connection()
            first = batch[0]
            if isinstance(first, Forget):
                deleted = _forget(connection, first.unit)
                self._waiting.written()
                hear(first.heard, deleted)
            elif self._is_full(connection):
                self._waiting.lost(f"the file has reached max_bytes, {self._config.max_bytes}")
            else:
                records = [each for each in batch if not (isinstance(each, Told) and each.refused)]
                with transaction(connection):
                    fates = [_store(connection, record) for record in records]
                self._waiting.written()
                for record, fate in zip(records, fates, strict=True):
                    self._tell(record, fate)
        except FILE_ERRORS as error:
            self._tally.failed(reason(error))
            self._answer_unwritten()
            return False
        return True

    def _tell(self, record: Record, fate: Fate | Exception) -> None:
        heard = isinstance(record, Told) and hear(record.heard, fate)
        if not isinstance(fate, Exception):
            self._tally.wrote(1)
        elif not (heard and isinstance(fate, RequestError)):
            self._tally.lost(record, str(fate))

    def _answer_unwritten(self) -> None:
        """Let nobody wait for a file that cannot be written; who asks of no request hears so."""
        told, requests = self._waiting.unheard()
        for each in told:
            request = each.outcome.request_id
            known = request in requests or self._may_be_known(request)
            hear(each.heard, "queued" if known else unknown(request))

    def _may_be_known(self, request_id: str) -> bool:
        try:
            return exposure_of(self.handle.connection(), request_id) is not None
        except FILE_ERRORS:
            return True

    def _is_full(self, connection: sqlite3.Connection) -> bool:
        if bytes_used(connection) < self._config.max_bytes:
            return False
        self._retain()
        return bytes_used(connection) >= self._config.max_bytes

    def _retain(self) -> None:
        """One step of deleting what is too old."""
        deleted = 0
        days = self._config.retention_days
        if days is not None:
            try:
                connection = self.handle.connection()
                deleted = delete_some_before(connection, time.time() - days * DAY)
            except FILE_ERRORS as error:
                self._tally.failed(reason(error))
        self._retain_at = time.monotonic() + (STEP_SECONDS if deleted else RETAIN_SECONDS)

    def _idle_seconds(self) -> float:
        return max(0.0, self._retain_at - time.monotonic())


def _store(connection: sqlite3.Connection, record: Record) -> Fate | Exception:
    """A record's fate; raises only what concerns the file."""
    assert not isinstance(record, Forget)
    try:
        return store(connection, record.outcome if isinstance(record, Told) else record)
    except RequestError as error:
        return error
    except RECORD_ERRORS as error:
        return LogError(f"a record does not fit the log: {error}")


def _forget(connection: sqlite3.Connection, unit: str) -> int:
    deleted = delete_of_unit(connection, unit)
    with suppress(sqlite3.Error):  # while somebody reads, the old pages stay until a later one
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    return deleted
