"""Experiments: those of one server, as they are now; which arm a request gets, and how they change.

Changes are revisions in the log, which all processes that share it read: each looks every second
whether there are new ones. Knows no HTTP and no statistics.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from dynmerge.errors import ExperimentError
from dynmerge_server.experiments.assignment import arm_of
from dynmerge_server.experiments.course import Course, course_named, first, patched, with_state
from dynmerge_server.experiments.declaration import Experiment, State, UnitSource, check_apart
from dynmerge_server.experiments.log import Log
from dynmerge_server.experiments.records import Kind, Revision

logger = logging.getLogger("dynmerge.experiments")

FILE = "file"


@dataclass(frozen=True, slots=True)
class Units:
    """Whom a request may be counted as, by where it says so."""

    header: str | None = None
    session: str | None = None
    user: str | None = None

    def of(self, source: UnitSource) -> str | None:
        """The unit for an experiment that counts such; None leaves the request out."""
        if source == "any":
            return self.header or self.session or self.user
        return getattr(self, source) or None


@dataclass(frozen=True, slots=True)
class Placed:
    """Where one request stands. `unit` is hashed; no arm for `holdout` and `outside`."""

    unit: str
    kind: Kind
    experiment: str | None = None
    arm: str | None = None
    phase: int = 0
    pair: str | None = None  # of two answers to one prompt, and which of them is shown first
    position: int | None = None


class ArmFlags(Protocol):
    """A team's own flags, which choose an arm."""

    async def arm(self, experiment: Experiment, unit: str) -> str | None:
        """The arm that the flag names, None where it names none."""


class Experiments:
    """What runs now, and the way to change it."""

    def __init__(
        self,
        log: Log,
        check: Callable[[Course], None] = lambda _: None,
        flags: ArmFlags | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Read what the log has. `check` raises RequestError where an arm cannot be served; `clock`
        tells seconds since 1970.
        """
        self.log = log
        self._check = check
        self._flags = flags
        self._clock = clock
        self._changing = threading.RLock()
        self._version = -1
        self.courses: Mapping[str, Course] = {}
        self._open: tuple[Course, ...] = ()  # those that are not stopped
        self.unreadable: Mapping[str, str] = {}  # experiments of another version, and why
        self.file_error: str | None = None
        self.error: str | None = None  # of whoever looks after them meanwhile
        self._failures: dict[str, tuple[str, str]] = {}
        self.refresh()

    def refresh(self) -> None:
        """See what other processes changed."""
        with self._changing:
            version = self.log.version()
            if version == self._version:
                return
            found, unreadable = _readable(Course.all_of(self.log.revisions()))
            self._open = tuple(c for c in found.values() if c.experiment.state != "stopped")
            self.courses, self.unreadable = found, unreadable
            self._version = version

    def course(self, name: str) -> Course:
        """One experiment's. Raises UnknownExperiment."""
        return course_named(self.courses, name)

    def fail(self, name: str, bank: str, reason: str) -> None:
        """Give no arms of an experiment while that bank is served, as one cannot be."""
        if self.failure(name, bank) is None:
            logger.error("experiment %s is not run: %s", name, reason)
        self._failures[name] = (bank, reason)

    def failure(self, name: str, bank: str) -> str | None:
        """Why an experiment cannot be run on a bank; None where nothing is known against it."""
        failed, reason = self._failures.get(name, ("", ""))
        return reason if failed == bank else None

    def outside(self, units: Units) -> Placed | None:
        """The place of a request that says itself what it wants; None where no unit is named."""
        unit = units.of("any")
        return Placed(self.log.hashed(unit), "outside") if unit else None

    async def place(self, units: Units, bank: str, only: str | None = None) -> Placed | None:
        """The arm of a request, of `only` one experiment or of any; None where no unit is named.

        Of several experiments that would have the unit it gets that which had it before, else the
        one declared first.
        """
        outside = self.outside(units)
        if outside is None:
            return None
        now = self._clock()
        claims: list[tuple[Placed, bool]] = []
        held: Placed | None = None
        for course in self._open:
            name = course.experiment.name
            if only not in (None, name) or self.failure(name, bank) is not None:
                continue
            unit = units.of(course.experiment.unit)
            if unit is None or not course.experiment.runs_at(now):
                continue
            placed, kept = await self._placed(course, unit, now)
            if placed.kind == "holdout":
                held = held or placed
            elif placed.arm is not None:
                claims.append((placed, kept))
        if len(claims) > 1:
            claims.sort(key=lambda claim: not self._was_there(claim))
        return claims[0][0] if claims else held or outside

    def declare(self, name: str, table: Any, source: str = "api") -> Course:
        """A new experiment. Raises ExperimentError, also where the name is taken."""
        with self._changing:
            self.refresh()
            if name in self.courses:
                raise ExperimentError(
                    f"experiment {name} exists: change it, or choose another name"
                )
            return self._keep(first(Experiment.parse(name, table), self._clock(), source))

    def change(self, name: str, changes: Mapping[str, Any], source: str = "api") -> Course:
        """Other values under some keys. Raises ExperimentError; the old one then stays as it is."""
        return self._revise(name, source, lambda old: patched(old, changes))

    def turn(self, name: str, state: State, source: str = "api", reason: str = "") -> Course:
        """Start, pause or stop. Raises ExperimentError."""
        return self._revise(name, source, lambda old: with_state(old, state), reason)

    def declare_all(self, declared: Mapping[str, Experiment], source: str = FILE) -> list[str]:
        """Make a file's experiments count; why some of them cannot, and stay as they were.

        Raises RequestError where arms cannot be served or units would be shared; then none counts.
        What was changed in another way since counts on until the file says something new; what the
        file does not name any more is paused, for a file may be whole again soon.
        """
        with self._changing:
            self.refresh()
            now = self._clock()
            notes: list[str] = []
            made = []
            for name, new in declared.items():
                try:
                    made.append(_by_file(self.courses.get(name), new, now, source))
                except ExperimentError as error:
                    notes.append(str(error))
            gone = [
                course.changed(with_state(course.experiment, "paused"), now, source, "not in it")
                for name, course in self.courses.items()
                if course.revisions[0].source == source
                and name not in declared
                and course.experiment.state == "running"
            ]
            revisions = [each for each in [*made, *gone] if each is not None]
            self._accept(revisions)
            self.log.add(*revisions)
            self.refresh()
            return notes

    async def _placed(self, course: Course, unit: str, now: float) -> tuple[Placed, bool]:
        """Where one experiment has a unit, and whether it is known to have been there."""
        experiment, hashed = course.experiment, self.log.hashed(unit)
        traffic = experiment.traffic_at(now)
        found = arm_of(experiment, unit, course.phase, traffic)
        if found.kind == "holdout":
            return Placed(hashed, "holdout", experiment.name), False
        if course.phase and traffic and (kept := self.log.kept(experiment.name, hashed)):
            arm, phase = kept
            return Placed(hashed, "assigned", experiment.name, arm, phase), True
        if found.arm is None or experiment.flag is None:
            return Placed(hashed, found.kind, experiment.name, found.arm, course.phase), False
        flagged = await self._flags.arm(experiment, unit) if self._flags else None
        return Placed(hashed, "flagged", experiment.name, flagged, course.phase), False

    def _was_there(self, claim: tuple[Placed, bool]) -> bool:
        placed, known = claim
        return known or self.log.kept(placed.experiment or "", placed.unit) is not None

    def _revise(
        self, name: str, source: str, new: Callable[[Experiment], Experiment], reason: str = ""
    ) -> Course:
        with self._changing:
            self.refresh()
            course = self.course(name)
            revision = course.changed(new(course.experiment), self._clock(), source, reason)
            same = revision.declaration == course.last.declaration
            return course if same else self._keep(revision)

    def _keep(self, revision: Revision) -> Course:
        self._accept([revision])
        self.log.add(revision)
        self.refresh()
        return self.courses[revision.experiment]

    def _accept(self, revisions: list[Revision]) -> None:
        """Raise RequestError where experiments so revised could not be served, or would share
        units that they must not.
        """
        after = {name: course.experiment for name, course in self.courses.items()}
        for revision in revisions:
            course = Course((revision,))
            after[revision.experiment] = course.experiment
            if course.experiment.flag and self._flags is None:
                name = course.experiment.name
                raise ExperimentError(f"experiment {name}: flag needs [experiments.flags]", "flag")
            if course.experiment.state != "stopped":
                self._check(course)
        check_apart(after.values())


def _by_file(course: Course | None, new: Experiment, now: float, source: str) -> Revision | None:
    """The revision that a file asks for, None where it says what it said before."""
    wanted = first(new, now, source)
    if course is None:
        return wanted
    said = course.said_by(source)
    if said is None:
        raise ExperimentError(f"experiment {new.name} exists, and was not declared by the file")
    over = course.experiment.state == new.state == "stopped"  # by a guardrail, say
    return None if over or said == wanted.declaration else course.changed(new, now, source)


def _readable(courses: Mapping[str, Course]) -> tuple[dict[str, Course], dict[str, str]]:
    """Those that this version can read; and why not, of the others."""
    found, unreadable = {}, {}
    for name, course in courses.items():
        try:
            _ = course.experiments
        except ExperimentError as error:
            unreadable[name] = str(error)
        else:
            found[name] = course
    return found, unreadable
