"""Table: an experiment's log as one row for each unit: its arm, and one number for each metric.

Says which units are compared, and counts those that are not. Knows no statistics.
"""

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dynmerge_server.experiments.course import Course, declared
from dynmerge_server.experiments.declaration import Metric
from dynmerge_server.experiments.report.results import Counts
from dynmerge_server.experiments.report.source import (
    Floats,
    Names,
    others_of,
    outcomes_before,
    outcomes_of,
    units_before,
    units_of,
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


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """The units that are compared, in the order in which they came."""

    arms: tuple[str, ...]
    control: int
    arm: Indices  # of each unit
    time: Floats  # of its first request, seconds since 1970
    columns: tuple[Column, ...]
    counts: Counts

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


def compared(connection: sqlite3.Connection, course: Course, metrics: Sequence[Metric]) -> Table:
    """The table for comparisons: with the time before, and no times of requests that were cold."""
    return _read(connection, course, metrics, began_at(course), warm=True)


def guarded(connection: sqlite3.Connection, course: Course, metrics: Sequence[Metric]) -> Table:
    """The table for guardrails: of every request, and of nothing before the experiment."""
    return _read(connection, course, metrics, 0.0, warm=False)


def began_at(course: Course) -> float:
    """When the experiment first ran; when it last changed, if it never did."""
    for revision in course.revisions:
        experiment = declared(revision)
        if experiment.state == "running":
            start = experiment.start.timestamp() if experiment.start else revision.time
            return max(start, revision.time)
    return course.last.time


def _read(
    connection: sqlite3.Connection,
    course: Course,
    metrics: Sequence[Metric],
    began: float,
    *,
    warm: bool,
) -> Table:
    arms = tuple(course.experiment.arms)
    measured = [metric for metric in metrics if metric.measure]
    asked = [metric for metric in metrics if metric.outcome]
    firsts, numbers = units_of(connection, course, measured, warm)
    known = {arm: index for index, arm in enumerate(arms)}
    indices = np.array([known.get(arm, -1) for arm in firsts], dtype=np.intp)
    everyone = _Everyone(numbers.units, indices, *numbers.columns[:6])
    chosen = _chosen(everyone, course.phase)
    names = everyone.names[chosen]
    seen, *old = units_before(connection, began, measured, warm).of(names)
    old += outcomes_before(connection, began, asked).of(names)
    new = [column[chosen] for column in numbers.columns[6:]]
    new += outcomes_of(connection, course.experiment.name, asked).of(names)
    columns = {
        metric.name: _column(metric, now, before, seen > 0)
        for metric, now, before in zip([*measured, *asked], new, old, strict=True)
    }
    return Table(
        arms,
        known[str(course.experiment.control)],
        everyone.arm[chosen],
        everyone.time[chosen],
        tuple(columns[metric.name] for metric in metrics),
        _counts(everyone, chosen, len(arms), course.phase, others_of(connection, course)),
    )


def _chosen(everyone: _Everyone, phase: int) -> Indices:
    """Units of one arm that were first seen in `phase`, in the order in which they came."""
    known = (everyone.different == 1) & (everyone.arm >= 0)
    chosen = np.flatnonzero(known & (everyone.phase == phase))
    return chosen[np.argsort(everyone.time[chosen], kind="stable")]


def _column(metric: Metric, now: Floats, before: Floats, seen: Flags) -> Column:
    """A sum over no values is 0 where the unit was there; a mean of none is none."""
    answered = ~np.isnan(now)
    if metric.per_unit != "mean":
        now = np.nan_to_num(now, nan=0.0, posinf=np.inf, neginf=-np.inf)
        before = np.where(np.isnan(before) & seen, 0.0, before)
    return Column(metric, now, before, answered)


def _counts(
    everyone: _Everyone, chosen: Indices, arms: int, phase: int, others: tuple[int, int]
) -> Counts:
    arm = everyone.arm[chosen]
    one_arm = everyone.different == 1
    return Counts(
        requests=_by_arm(arm, arms, everyone.requests[chosen]),
        cold=_by_arm(arm, arms, everyone.cold[chosen]),
        assigned=_by_arm(arm, arms, 1 - everyone.flagged[chosen]),
        forced=others[0],
        holdout=others[1],
        two_arms=int(np.sum(~one_arm)),
        earlier=int(np.sum(one_arm & (everyone.phase != phase))),
    )


def _by_arm(arm: Indices, arms: int, weights: Floats | None = None) -> tuple[int, ...]:
    return tuple(int(n) for n in np.bincount(arm, weights, minlength=arms))
