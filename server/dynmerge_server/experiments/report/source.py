"""Source: what a report asks of the log: one row for each unit, or for each pair. Reads only.

SQL adds up; nothing here compares.
"""

import json
import sqlite3
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynmerge_server.experiments.course import Course, course_named
from dynmerge_server.experiments.declaration import Metric
from dynmerge_server.experiments.records import Revision
from dynmerge_server.experiments.rows import REVISIONS

Floats = NDArray[np.float64]
Names = NDArray[np.bytes_]

PLACED = "(kind IN ('assigned', 'flagged') AND arm IS NOT NULL)"
COLD = "(cache IN ('stored', 'collapsed'))"  # the request waited for its merge
TIMES = ("ttft", "latency")
MEASURES = {
    "error": "(status >= 500)",
    "empty": "empty",
    "ttft": "ttft",
    "latency": "latency",
    "tokens": "completion_tokens",
}
PER_UNIT = {"mean": "avg({0})", "sum": "sum({0})", "any": "sum({0} > 0) > 0"}

# Arm, flag and phase are those of the row with the least time: SQLite promises so beside one min().
FIRST = "arm, unit, kind = 'flagged', phase, min(time)"
COUNTED = f"count(*), total({COLD}), count(DISTINCT arm)"
# By time, as rows lie in the file; by unit or experiment each would be looked up on its own.
IN_TIME = "FROM exposures WHERE time >= ? AND +experiment = ? AND"
CLOCKS = 86_400.0  # seconds by which those of several servers may differ
# SQLite alone would begin with the exposures, most of which have no outcome.
JOINED = "outcomes CROSS JOIN exposures ON exposures.id = outcomes.exposure"
WORDS = "category IS NOT NULL AND value IS NULL"
# What an arm was served with, beginning with the first. Whose unit had two arms is not compared.
SERVED = f"""
SELECT arm, count(*), min(time) AS since {IN_TIME} {PLACED} AND phase = ?
    AND unit NOT IN (SELECT value FROM json_each(?))
GROUP BY arm, preference, method, merge_id ORDER BY since
"""
# The last vote on a pair counts.
VOTES = """
SELECT one.arm, other.arm, category, one.unit, max(outcomes.time)
FROM exposures AS one
JOIN exposures AS other ON other.pair = one.pair AND other.position = 1
JOIN outcomes ON outcomes.exposure = one.pair
WHERE one.pair IS NOT NULL AND +one.experiment = ? AND one.kind = 'pair' AND one.position = 0
    AND name = 'vote' AND category IN ('first', 'second', 'tie')
GROUP BY one.pair
"""


@dataclass(frozen=True, slots=True, eq=False)
class Numbers:
    """Numbers of units, in the order of their names; NaN where there is none."""

    units: Names
    columns: tuple[Floats, ...]

    def of(self, units: Names) -> tuple[Floats, ...]:
        """The same for other units, NaN for those that are not here."""
        if not len(self.units):
            return tuple(np.full(len(units), np.nan) for _ in self.columns)
        found = np.minimum(np.searchsorted(self.units, units), len(self.units) - 1)
        here = self.units[found] == units
        return tuple(np.where(here, column[found], np.nan) for column in self.columns)


def courses(connection: sqlite3.Connection) -> dict[str, Course]:
    """All experiments of the log, by name."""
    return Course.all_of([Revision(*row) for row in connection.execute(REVISIONS).fetchall()])


def course_of(connection: sqlite3.Connection, name: str) -> Course:
    """One experiment. Raises UnknownExperiment naming those that the log has."""
    return course_named(courses(connection), name)


def units_of(
    connection: sqlite3.Connection, course: Course, metrics: Sequence[Metric], warm: bool
) -> tuple[list[str], Numbers]:
    """All units' first arms, the rest of FIRST, COUNTED, and their metrics of measures.

    `warm` leaves out times of requests that waited for their merge.
    """
    values = [_per_unit(metric, _measure(metric, warm)) for metric in metrics]
    rows = connection.execute(
        f"SELECT {', '.join([FIRST, COUNTED, *values])} {IN_TIME} {PLACED} "
        "GROUP BY +unit ORDER BY unit",
        _span(course),
    ).fetchall()
    return [arm for arm, *_ in rows], _numbers([row[1:] for row in rows], 6 + len(metrics))


def others_of(connection: sqlite3.Connection, course: Course) -> tuple[int, int]:
    """How many requests named their arm, and how many units were held out."""
    found = connection.execute(
        "SELECT total(kind = 'forced'), count(DISTINCT CASE WHEN kind = 'holdout' THEN unit END) "
        f"{IN_TIME} kind IN ('forced', 'holdout')",
        _span(course),
    ).fetchone()
    return int(found[0]), int(found[1])


def outcomes_of(
    connection: sqlite3.Connection, experiment: str, metrics: Sequence[Metric]
) -> Numbers:
    """Metrics of outcomes: of what the experiment itself served."""
    return _outcomes(connection, metrics, f"experiment = ? AND {PLACED}", (experiment,))


def units_before(
    connection: sqlite3.Connection, began: float, metrics: Sequence[Metric], warm: bool
) -> Numbers:
    """How many requests units had before `began`, and their metrics of measures then."""
    values = [_per_unit(metric, _measure(metric, warm)) for metric in metrics]
    rows = connection.execute(
        f"SELECT unit, {', '.join(['count(*)', *values])} FROM exposures "
        "WHERE time < ? AND kind != 'pair' GROUP BY +unit ORDER BY unit",
        (began,),
    ).fetchall()
    return _numbers(rows, 1 + len(metrics))


def outcomes_before(
    connection: sqlite3.Connection, began: float, metrics: Sequence[Metric]
) -> Numbers:
    """Metrics of outcomes, of what was known at `began`."""
    where = "outcomes.time < ? AND exposures.time < ? AND kind != 'pair'"
    return _outcomes(connection, metrics, where, (began, began))


def words_of(
    connection: sqlite3.Connection, experiment: str, names: Sequence[str]
) -> Counter[str | None]:
    """How many outcomes of each name are words, of what the experiment itself served."""
    found = connection.execute(
        f"SELECT name, count(*) FROM {JOINED} WHERE name IN ({_marks(names)}) AND {WORDS} "
        f"AND experiment = ? AND {PLACED} GROUP BY name",
        (*names, experiment),
    ).fetchall()
    return Counter(dict(found))


def served_of(
    connection: sqlite3.Connection, course: Course, two_arms: Sequence[str]
) -> dict[str, list[tuple[int, float]]]:
    """By arm, each merge that its units were served with: how many requests, and since when.

    Units of `two_arms` and of phases before are left out.
    """
    found: dict[str, list[tuple[int, float]]] = {}
    given = (*_span(course), course.phase, json.dumps(two_arms))
    for arm, requests, since in connection.execute(SERVED, given):
        found.setdefault(arm, []).append((requests, since))
    return found


def votes_of(connection: sqlite3.Connection, experiment: str) -> list[tuple[str, str, str, str]]:
    """Of each pair the arms as they were shown, the vote (first, second or tie), and the unit.

    No unit is "".
    """
    rows = connection.execute(VOTES, (experiment,)).fetchall()
    return [(one, other, vote, unit) for one, other, vote, unit, _ in rows]


def _span(course: Course) -> tuple[float, str]:
    return course.revisions[0].time - CLOCKS, course.experiment.name


def _outcomes(
    connection: sqlite3.Connection, metrics: Sequence[Metric], where: str, given: Sequence[object]
) -> Numbers:
    if not metrics:
        return _numbers([], 0)
    names = [str(metric.outcome) for metric in metrics]
    values = [_per_unit(metric, "CASE WHEN name = ? THEN value END") for metric in metrics]
    rows = connection.execute(
        f"SELECT unit, {', '.join(values)} FROM {JOINED} "
        f"WHERE name IN ({_marks(names)}) AND {where} GROUP BY unit ORDER BY unit",
        (*names, *names, *given),
    ).fetchall()
    return _numbers(rows, len(metrics))


def _marks(names: Sequence[str]) -> str:
    return ", ".join("?" * len(names))


def _measure(metric: Metric, warm: bool) -> str:
    value = MEASURES[str(metric.measure)]
    if warm and metric.measure in TIMES:
        return f"CASE WHEN coalesce({COLD}, 0) THEN NULL ELSE {value} END"
    return value


def _per_unit(metric: Metric, value: str) -> str:
    over = "" if metric.over is None else f" > {float(metric.over)!r}"
    return PER_UNIT[metric.per_unit].format(f"(({value}){over})")


def _numbers(rows: Sequence[Sequence[Any]], width: int) -> Numbers:
    """Rows that begin with a unit, the others of `width` numbers."""
    units, *columns = zip(*rows, strict=True) if rows else ((), *((),) * width)
    made = tuple(np.array(column, dtype=np.float64) for column in columns)
    return Numbers(np.array(units, dtype=np.bytes_), made)
