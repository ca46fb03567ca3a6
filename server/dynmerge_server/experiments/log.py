"""Log: which requests were exposed to what and what came of them, in one SQLite file.

Logging never makes a request wait or fail: records go through a bounded queue to one thread that
writes them in batches. kill -9 loses what came in the last `flush_seconds` and the batch being
written, never what an `outcome` said is stored; a power cut may lose the last commits too. Several
processes may share the file. Knows no HTTP and no statistics.
"""

import asyncio
import hashlib
import sqlite3
import threading
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from dynmerge.errors import LogError
from dynmerge_server.experiments.reading import Reader
from dynmerge_server.experiments.records import Exposure, Finish, Outcome, Revision
from dynmerge_server.experiments.rows import FIRST, REVISIONS, add_revisions
from dynmerge_server.experiments.schema import Handle, LogConfig, create, reason
from dynmerge_server.experiments.waiting import Answer, Counts, Forget, Tally, Told, Waiting
from dynmerge_server.experiments.writer import FILE_ERRORS, Writer

__all__ = ["Answer", "Log", "LogConfig", "LogStats"]

HASHED_UNITS = 16_384  # remembered
KEPT_UNITS = 65_536
FORGET_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class LogStats(Counts):
    """How the log does; `waiting` records are in memory only, and `bytes` on the disk."""

    waiting: int = 0
    bytes: int = 0


class Log:
    """The log of one server process. Raises ConfigError where its file cannot be made or is of
    another kind.
    """

    def __init__(self, config: LogConfig) -> None:
        key = create(config.path)
        self._config = config
        self._key = key
        self._tally = Tally()
        self._waiting = Waiting(config.queue, config.batch, config.flush_seconds, self._tally)
        self._writer = Writer(config, key, self._waiting, self._tally)
        self._reader = Reader(config.path, key)
        self._version = 0
        self._hashed = lru_cache(HASHED_UNITS)(partial(hashed, bytes.fromhex(key)))
        self._first = lru_cache(KEPT_UNITS)(self._first_in_file)
        self._remembering = threading.Lock()  # so that what is forgotten does not come back
        self._writer.start()

    def close(self) -> None:
        """Write what waits, within CLOSE_SECONDS, and end."""
        self._reader.close()  # the last to close tidies the file up, and a reader cannot
        self._writer.stop()
        self._reader.close()

    def hashed(self, unit: str) -> str:
        """A unit as the log knows it."""
        return self._hashed(unit)

    def expose(self, exposure: Exposure) -> None:
        """Log a request's arm. Neither waits nor raises."""
        self._waiting.put(exposure)

    def finish(self, finish: Finish) -> None:
        """Log how the request of an exposure ended. Neither waits nor raises."""
        self._waiting.put(finish)

    async def outcome(self, outcome: Outcome) -> Answer:
        """Log what came of a request or a comparison, and wait until it is in the file.

        "again" where it was there already, "queued" where the file cannot be written now. Raises
        UnknownRequest, OutcomeConflict where its id is known with other content, and LogError where
        there is no room.
        """
        told = Told(outcome)
        self._waiting.put(told)
        return await asyncio.wrap_future(told.heard)

    def kept(self, experiment: str, unit: str) -> tuple[str, int] | None:
        """The arm and phase of a hashed unit's first exposure; None also where the file fails."""
        waits = self._waiting.first(experiment, unit)  # first, as it may be written meanwhile
        try:
            with self._remembering:
                return self._first(experiment, unit)
        except KeyError:
            pass
        except FILE_ERRORS as error:
            self._tally.failed(reason(error))
        return waits

    def revisions(self) -> list[Revision]:
        """All, in the order in which they were added. Raises LogError."""
        try:
            return [Revision(*row) for row in self._reader.rows(REVISIONS)]
        except FILE_ERRORS as error:
            raise self._failed("read", error) from None

    def add(self, *revisions: Revision) -> None:
        """Write them now, all or none. Raises LogError, also where one's number is taken."""
        handle = Handle(self._config.path, self._key)
        try:
            add_revisions(handle.connection(), revisions)
        except sqlite3.IntegrityError:
            names = ", ".join(f"{each.experiment} {each.number}" for each in revisions)
            raise LogError(f"a revision is there already, of another process: {names}") from None
        except FILE_ERRORS as error:
            raise self._failed("written", error) from None
        finally:
            handle.close()

    def version(self) -> int:
        """Another number wherever revisions were added, by any process."""
        try:
            [(self._version,)] = self._reader.rows("SELECT ifnull(max(rowid), 0) FROM revisions")
        except FILE_ERRORS as error:
            self._tally.failed(reason(error))
        return self._version

    def stats(self) -> LogStats:
        """How it does now."""
        counts = self._tally.counts()
        size = 0
        for suffix in ("", "-wal"):
            with suppress(OSError):
                size += Path(f"{self._config.path}{suffix}").stat().st_size
        return LogStats(
            counts.written,
            counts.lost_exposures,
            counts.lost_finishes,
            counts.lost_outcomes,
            counts.errors,
            counts.last_error,
            len(self._waiting),
            size,
        )

    def forget(self, unit: str) -> int:
        """Delete a unit's exposures, those that wait too, and their outcomes; how many exposures.

        Blocks until that is done: not for the event loop. Raises LogError where the file cannot be
        written; it is tried again after that. What another process has not yet written stays.
        """
        forget = Forget(self.hashed(unit))
        self._waiting.put(forget)
        try:
            deleted = forget.heard.result(FORGET_SECONDS)
        except FutureTimeout:
            message = "the log of experiments cannot be written now; it will be done when it can"
            raise LogError(message) from None
        with self._remembering:
            self._first.cache_clear()
        self._hashed.cache_clear()
        return deleted

    def _first_in_file(self, experiment: str, unit: str) -> tuple[str, int]:
        """Raises KeyError where there is none, which is therefore not remembered."""
        for arm, phase in self._reader.rows(FIRST, experiment, unit):
            return arm, phase
        raise KeyError(unit)

    def _failed(self, what: str, error: Exception) -> LogError:
        self._tally.failed(reason(error))
        return LogError(f"the log of experiments cannot be {what}: {reason(error)}")


def hashed(key: bytes, unit: str) -> str:
    """A unit so that only who has the log's key can tell whose it is."""
    # Keyed BLAKE2 is a MAC as HMAC is, at a twentieth of its time.
    name = unit.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(name, key=key, digest_size=16).hexdigest()
