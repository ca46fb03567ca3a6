"""Guardrails: whether an arm is surely worse than it may be, by a bound that holds at every look.

All bounds of an experiment together are wrong at most `alpha` of the time, however often somebody
looks: noise stops nothing. Needs no library but numpy, as servers ask all the time.
"""

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot, isfinite

import numpy as np

from dynmerge_server.experiments.course import Course
from dynmerge_server.experiments.declaration import Guardrail
from dynmerge_server.experiments.report.results import GuardrailState
from dynmerge_server.experiments.report.sequence import one_sided_width
from dynmerge_server.experiments.report.source import Floats, course_of
from dynmerge_server.experiments.report.table import Column, Table, guarded

MIN_UNITS = 100  # of each arm that is looked at


@dataclass(frozen=True, slots=True)
class Level:
    """A number, how sure it is, and of how many units: of the smallest arm, and of all."""

    value: float
    error: float
    least: int
    units: int


@dataclass(frozen=True, slots=True)
class Rule:
    """What a guardrail asks of a level: not to be above the limit, or not below."""

    words: str
    limit: float
    side: int  # 1 where more is worse, -1 where less is

    @classmethod
    def of(cls, rail: Guardrail, control: str) -> "Rule":
        """As declared."""
        if rail.at_most is not None:
            return cls("at most", rail.at_most, 1)
        if rail.at_least is not None:
            return cls("at least", rail.at_least, -1)
        assert rail.worse_by is not None  # the declaration says one of them
        return cls(f"worse than {control} by at most", rail.worse_by, 1)


def broken(connection: sqlite3.Connection, experiment: str) -> list[str]:
    """Why an experiment has to stop: its broken guardrails, each in a sentence.

    Raises UnknownExperiment, and sqlite3.Error where the log cannot be read.
    """
    states = guardrail_states(connection, course_of(connection, experiment))
    return [each.text for each in states if each.state == "broken" and each.action == "stop"]


def guardrail_states(connection: sqlite3.Connection, course: Course) -> tuple[GuardrailState, ...]:
    """All guardrails of an experiment, by what the log has. Raises sqlite3.Error."""
    experiment = course.experiment
    if not experiment.guardrails:
        return ()
    metrics = {rail.metric.name: rail.metric for rail in experiment.guardrails}
    table = guarded(connection, course, list(metrics.values()))
    return check(table, experiment.guardrails, experiment.alpha)


def check(
    table: Table, guardrails: Sequence[Guardrail], alpha: float
) -> tuple[GuardrailState, ...]:
    """Each guardrail in each arm that it is about, which share `alpha`. Pure."""
    columns = {column.metric.name: column for column in table.columns}
    asked = [
        (rail, arm)
        for rail in guardrails
        for arm in range(len(table.arms))
        if rail.worse_by is None or arm != table.control
    ]
    level = alpha / max(len(asked), 1)
    return tuple(_state(table, columns[rail.metric.name], rail, arm, level) for rail, arm in asked)


def surely(level: Level, side: int, alpha: float) -> float | None:
    """What the level is not below (side 1) or not above (-1); None where that is not known yet.

    It is wrong at most `alpha` of the time, at every look.
    """
    if level.least < MIN_UNITS or not isfinite(level.value + level.error):
        return None
    return level.value - side * float(one_sided_width(level.error, float(level.units), alpha))


def mean_of(numbers: Floats) -> Level:
    """The mean of one arm's units; NaN is left out."""
    there = numbers[~np.isnan(numbers)]
    units = len(there)
    if units < MIN_UNITS:
        return Level(np.nan, np.nan, units, units)
    with np.errstate(over="ignore", invalid="ignore"):
        error = float(there.std(ddof=1)) / units**0.5
        return Level(float(there.mean()), error, units, units)


def worse_by(arm: Level, control: Level, better: str) -> Level:
    """How much worse an arm is than the control; below 0 where it is better."""
    gap = arm.value - control.value
    return Level(
        gap if better == "lower" else -gap,
        hypot(arm.error, control.error),
        min(arm.least, control.least),
        arm.units + control.units,
    )


def _state(table: Table, column: Column, rail: Guardrail, arm: int, alpha: float) -> GuardrailState:
    control = table.arms[table.control]
    rule = Rule.of(rail, control)
    level = mean_of(column.now[table.arm == arm])
    if rail.worse_by is not None:
        level = worse_by(level, mean_of(column.now[table.arm == table.control]), rail.metric.better)
    bound = surely(level, rule.side, alpha)
    beyond = bound is not None and (bound - rule.limit) * rule.side > 0
    return GuardrailState(
        rail.metric.name,
        table.arms[arm],
        rule.words,
        rule.limit,
        rail.action,
        "unknown" if bound is None else "broken" if beyond else "ok",
        None if bound is None else level.value,
        bound,
        level.least,
    )
