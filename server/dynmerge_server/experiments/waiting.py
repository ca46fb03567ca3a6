"""Waiting: what is not written yet, in its order, bounded: the oldest makes room for the newest.

Knows no file. What is lost is counted in the Tally. A Forget takes no room, and makes none.
"""

import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any, Literal

from dynmerge.errors import LogError
from dynmerge_server.experiments.records import Exposure, Finish, Outcome

Answer = Literal["stored", "again", "queued"]


@dataclass(slots=True, eq=False)
class Told:
    """An outcome, and who waits to hear what became of it."""

    outcome: Outcome
    heard: "Future[Answer]" = field(default_factory=Future)

    @property
    def refused(self) -> bool:
        """Whether it was answered with an error, so that it must not be stored after that."""
        done = self.heard.done() and not self.heard.cancelled()
        return done and self.heard.exception() is not None


@dataclass(slots=True, eq=False)
class Forget:
    """A unit to delete all of, and who waits to hear how many exposures these were."""

    unit: str
    heard: "Future[int]" = field(default_factory=Future)


Record = Exposure | Finish | Told | Forget


def hear(heard: "Future[Any]", value: object) -> bool:
    """Tell whoever waits; False where nobody does any more."""
    try:
        heard.set_exception(value) if isinstance(value, Exception) else heard.set_result(value)
    except InvalidStateError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Counts:
    """Records that were written and that were lost, failures, and the last one's reason."""

    written: int = 0
    lost_exposures: int = 0
    lost_finishes: int = 0
    lost_outcomes: int = 0
    errors: int = 0
    last_error: str | None = None


class Tally:
    """Counts as they grow, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._written = self._exposures = self._finishes = self._outcomes = self._errors = 0
        self._last_error: str | None = None

    def wrote(self, records: int) -> None:
        """So many are in the file."""
        with self._lock:
            self._written += records

    def failed(self, reason: str) -> None:
        """The file could not be written or read."""
        with self._lock:
            self._errors += 1
            self._last_error = reason

    def lost(self, record: Record, reason: str) -> None:
        """A record will not be in the file."""
        with self._lock:
            self._exposures += isinstance(record, Exposure)
            self._finishes += isinstance(record, Finish)
            self._outcomes += isinstance(record, Told)
            self._last_error = reason

    def counts(self) -> Counts:
        """All at one moment."""
        with self._lock:
            lost = (self._exposures, self._finishes, self._outcomes)
            return Counts(self._written, *lost, self._errors, self._last_error)


class Waiting:
    """The queue between those who log and the one thread that writes."""

    def __init__(self, bound: int, batch: int, flush_seconds: float, tally: Tally) -> None:
        self._bound = bound
        self._batch = min(batch, bound)
        self._flush_seconds = flush_seconds
        self._tally = tally
        self._lock = threading.Lock()  # taken itself, as a Condition takes longer
        self._changed = threading.Condition(self._lock)
        self._records: deque[Record] = deque()
        self._taken: list[Record] = []
        self._forgets = 0
        self._first: dict[tuple[str | None, str], Exposure] = {}
        self.closed = False

    def __len__(self) -> int:
        return len(self._records) + len(self._taken)

    def put(self, record: Record) -> None:
        """Add the newest. Neither waits nor raises."""
        with self._lock:
            if self.closed:
                self._lose(record, "the log was closed")
                return
            self._records.append(record)
            waiting = len(self._records)
            if type(record) is Exposure and record.kind in ("assigned", "flagged"):
                self._first.setdefault((record.experiment, record.unit), record)
            elif type(record) is Forget:
                self._forgets += 1
                self._changed.notify()
            if waiting in (1, self._batch):
                self._changed.notify()
            self._make_room()

    def first(self, experiment: str, unit: str) -> tuple[str, int] | None:
        """The arm and phase of a unit's first exposure among what waits."""
        found = self._first.get((experiment, unit))
        return None if found is None or found.arm is None else (found.arm, found.phase)

    def take(self, idle_seconds: float) -> list[Record]:
        """A batch once it is due, or one Forget; nothing after `idle_seconds` without any.

        It counts as waiting until it is `written`, `put_back` or `lost`.
        """
        with self._lock:
            self._changed.wait_for(lambda: self._records or self.closed, idle_seconds)
            if self._records:
                self._changed.wait_for(self._due, self._flush_seconds)
            while self._records and len(self._taken) < self._batch:
                if type(self._records[0]) is Forget:
                    if not self._taken:
                        self._forgets -= 1
                        self._taken.append(self._records.popleft())
                    break
                self._taken.append(self._records.popleft())
            return self._taken

    def written(self) -> None:
        """What was taken is done with."""
        with self._lock:
            for record in self._taken:
                self._settle(record)
            self._taken = []

    def put_back(self) -> None:
        """What was taken waits on, as the oldest."""
        with self._lock:
            self._forgets += sum(type(record) is Forget for record in self._taken)
            self._records.extendleft(reversed(self._taken))
            self._taken = []
            self._make_room()

    def lost(self, reason: str) -> None:
        """What was taken will not be written."""
        with self._lock:
            for record in self._taken:
                self._lose(record, reason)
            self._taken = []

    def all_lost(self, reason: str) -> None:
        """Neither will anything else."""
        self.lost(reason)
        with self._lock:
            while self._records:
                self._lose(self._records.popleft(), reason)

    def unheard(self) -> tuple[list[Told], set[str]]:
        """Outcomes whose senders wait for an answer; the requests and pairs among what waits."""
        with self._lock:
            records = [*self._taken, *self._records]
        told = [each for each in records if isinstance(each, Told) and not each.heard.done()]
        return told, set(_requests(records)) if told else set()

    def pause(self, seconds: float) -> None:
        """Wait, unless it is closed."""
        with self._lock:
            self._changed.wait_for(lambda: self.closed, seconds)

    def close(self) -> None:
        """Take nothing more in; what waits is due."""
        with self._lock:
            self.closed = True
            self._changed.notify_all()

    def _due(self) -> bool:
        return self.closed or self._forgets > 0 or len(self._records) >= self._batch

    def _make_room(self) -> None:
        """Lose the oldest of too many. A Forget stays, as it is done whenever it can be."""
        while len(self._records) - self._forgets > self._bound:
            oldest = next(each for each in self._records if type(each) is not Forget)
            self._records.remove(oldest)
            self._lose(oldest, "more waited to be written than the queue holds")

    def _settle(self, record: Record) -> None:
        if type(record) is Exposure:
            place = (record.experiment, record.unit)
            if self._first.get(place) is record:
                del self._first[place]

    def _lose(self, record: Record, reason: str) -> None:
        self._settle(record)
        if isinstance(record, Told) and record.refused:
            return
        if isinstance(record, (Told, Forget)):
            hear(record.heard, LogError(f"the log of experiments cannot keep it: {reason}"))
        self._tally.lost(record, reason)


def _requests(records: Iterable[Record]) -> Iterable[str]:
    for record in records:
        if isinstance(record, Exposure):
            yield record.request_id
            if record.pair is not None:
                yield record.pair
