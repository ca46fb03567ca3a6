"""Table: an experiment's log as one row for each unit: its arm, and one number for each metric.

Says which units are compared, and counts those that are not. Knows no statistics.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dynmerge_server.experiments.course import Course
from dynmerge_server.experiments.declaration import Metric
from dynmerge_server.experiments.report.results import Counts
from dynmerge_server.experiments.report.source import (
    Floats,
    Names,
    Numbers,
    others_of,
    outcomes_before,
    outcomes_of,
    served_of,
    units_before,
    units_of,
    words_of,
)

Flags = NDArray[np.bool_]
Indices = NDArray[np.intp]


@dataclass(frozen=True, slots=True, eq=False)
class Column:
    """One metric's numbers, in the order of the units; NaN for a unit that has none."""

    metric: Metric
    now: Floats
    before: Floats  # in the time before the experiment
    answered: Flags  # whether the unit has any value, 0 being one
    words: int = 0  # values that are words and no numbers


@dataclass(frozen=True, slots=True)
class Changed:
    """An arm that was served with more than one merge: with how many, and how many requests were
    not served with the first, since when."""

    arm: str
    merges: int
    requests: int
    since: float


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """The units that are compared, in the order in which they came."""

    arms: tuple[str, ...]
    control: int
    arm: Indices  # of each unit
    time: Floats  # of its first request, seconds since 1970
    columns: tuple[Column, ...]
    counts: Counts
    changed: tuple[Changed, ...] = ()

    @property
    def units(self) -> tuple[int, ...]:
        """How many, by arm."""
        return _by_arm(self.arm, len(self.arms))


@dataclass(frozen=True, slots=True, eq=False)
class _Everyone:
    """All units that got an arm, compared or not, in the order of their names."""

    names: Names
    arm: Indices  # -1 for one that is not declared
    flagged: Floats
    phase: Floats
    time: Floats
    requests: Floats
    cold: Floats
    different: Floats  # how many arms


def compared(
    connection: sqlite3.Connection, course: Course, metrics: Sequence[Metric], now: float
) -> Table:
    """The table for comparisons: with the time before, and no times of requests that were cold."""
    everyone, measured = _everyone(connection, course, metrics, warm=True)
    chosen = _chosen(everyone, course.phase)
    names = everyone.names[chosen]
    found = _numbers(connection, course, metrics, measured, names)
    before, seen = _before(connection, course.began(now), metrics, names)
    asked = [metric.outcome for metric in metrics if metric.outcome]
    words = words_of(connection, course.experiment.name, asked)
    columns = [
        _column(metric, found[metric.name], before[metric.name], seen, words[metric.outcome])
        for metric in metrics
    ]
    counts = _counts(everyone, chosen, course, others_of(connection, course))
    changed = tuple(_changed(connection, course, everyone))
    return _table(course, everyone, chosen, columns, counts, changed)


def guarded(connection: sqlite3.Connection, course: Course, metrics: Sequence[Metric]) -> Table:
    """The table for guardrails: of every request, and of nothing else, as it is asked for often.

    It does not say what came before the experiment, nor what is no part of it.
    """
    everyone, measured = _everyone(connection, course, metrics, warm=False)
    chosen = _chosen(everyone, course.phase)
    found = _numbers(connection, course, metrics, measured, everyone.names[chosen])
    nothing, nobody = np.full(len(chosen), np.nan), np.zeros(len(chosen), dtype=np.bool_)
    columns = [_column(metric, found[metric.name], nothing, nobody) for metric in metrics]
    return _table(course, everyone, chosen, columns, _counts(everyone, chosen, course, (0, 0)))


def _table(
    course: Course,
    everyone: _Everyone,
    chosen: Indices,
    columns: Sequence[Column],
    counts: Counts,
    changed: tuple[Changed, ...] = (),
) -> Table:
    arms = tuple(course.experiment.arms)
    return Table(
        arms,
        arms.index(str(course.experiment.control)),
        everyone.arm[chosen],
        everyone.time[chosen],
        tuple(columns),
        counts,
        changed,
    )


def _everyone(
    connection: sqlite3.Connection, course: Course, metrics: Sequence[Metric], *, warm: bool
) -> tuple[_Everyone, Numbers]:
    """All units that got an arm, and their metrics of measures."""
    measured = [metric for metric in metrics if metric.measure]
    firsts, numbers = units_of(connection, course, measured, warm)
    known = {arm: index for index, arm in enumerate(course.experiment.arms)}
    indices = np.array([known.get(arm, -1) for arm in firsts], dtype=np.intp)
    everyone = _Everyone(numbers.units, indices, *numbers.columns[:6])
    return everyone, Numbers(numbers.units, numbers.columns[6:])


def _numbers(
    connection: sqlite3.Connection,
    course: Course,
    metrics: Sequence[Metric],
    measured: Numbers,
    names: Names,
) -> dict[str, Floats]:
    """Metrics of units, by the metrics' names."""
    asked = [metric for metric in metrics if metric.outcome]
    outcomes = outcomes_of(connection, course.experiment.name, asked)
    return _by_name(metrics, measured.of(names), outcomes.of(names))


def _before(
    connection: sqlite3.Connection, began: float | None, metrics: Sequence[Metric], names: Names
) -> tuple[dict[str, Floats], Flags]:
    """The same of the time before, and who was there then; nobody where nothing has begun."""
    measured = [metric for metric in metrics if metric.measure]
    asked = [metric for metric in metrics if metric.outcome]
    end = -np.inf if began is None else began
    seen, *old = units_before(connection, end, measured, warm=True).of(names)
    outcomes = outcomes_before(connection, end, asked)
    return _by_name(metrics, old, outcomes.of(names)), seen > 0


def _by_name(
    metrics: Sequence[Metric], measured: Sequence[Floats], asked: Sequence[Floats]
) -> dict[str, Floats]:
    """Columns of measures and of outcomes, each in the order of its metrics."""
    names = [metric.name for metric in metrics if metric.measure]
    names += [metric.name for metric in metrics if metric.outcome]
    return dict(zip(names, [*measured, *asked], strict=True))


def _changed(
    connection: sqlite3.Connection, course: Course, everyone: _Everyone
) -> Iterator[Changed]:
    two_arms = [name.decode() for name in everyone.names[everyone.different != 1]]
    served = served_of(connection, course, two_arms)
    for arm in course.experiment.arms:
        _, *later = served.get(arm, [(0, 0.0)])
        if later:
            requests = sum(number for number, _ in later)
            yield Changed(arm, 1 + len(later), requests, later[0][1])


def _chosen(everyone: _Everyone, phase: int) -> Indices:
    """Units of one arm that were first seen in `phase`, in the order in which they came."""
    known = (everyone.different == 1) & (everyone.arm >= 0)
    chosen = np.flatnonzero(known & (everyone.phase == phase))
    return chosen[np.argsort(everyone.time[chosen], kind="stable")]


def _column(metric: Metric, now: Floats, before: Floats, seen: Flags, words: int = 0) -> Column:
    """A sum over no values is 0 where the unit was there; a mean of none is none."""
    answered = ~np.isnan(now)
    if metric.per_unit != "mean":
        now = np.nan_to_num(now, nan=0.0, posinf=np.inf, neginf=-np.inf)
        before = np.where(np.isnan(before) & seen, 0.0, before)
    return Column(metric, now, before, answered, words)


def _counts(
    everyone: _Everyone, chosen: Indices, course: Course, others: tuple[int, int]
) -> Counts:
    arm, arms = everyone.arm[chosen], len(course.experiment.arms)
    one_arm = everyone.different == 1
    return Counts(
        requests=_by_arm(arm, arms, everyone.requests[chosen]),
        cold=_by_arm(arm, arms, everyone.cold[chosen]),
        assigned=_by_arm(arm, arms, 1 - everyone.flagged[chosen]),
        forced=others[0],
        holdout=others[1],
        two_arms=int(np.sum(~one_arm)),
        earlier=int(np.sum(one_arm & (everyone.phase != course.phase))),
    )


def _by_arm(arm: Indices, arms: int, weights: Floats | None = None) -> tuple[int, ...]:
    return tuple(int(n) for n in np.bincount(arm, weights, minlength=arms))
