"""Guardrails: whether an arm is surely worse than it may be, by a bound that holds at every look.

All bounds of an experiment together are wrong at most `alpha` of the time, however often somebody
looks: noise stops nothing. Needs no library but numpy, as servers ask all the time.
"""

import sqlite3
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from math import isfinite, sqrt

import numpy as np

from dynmerge_server.experiments.course import Course
from dynmerge_server.experiments.declaration import Experiment, Guardrail, Metric
from dynmerge_server.experiments.report.rates import Rate, least, least_gap, most
from dynmerge_server.experiments.report.results import GuardrailState
from dynmerge_server.experiments.report.sequence import one_sided_width
from dynmerge_server.experiments.report.source import Floats, course_of
from dynmerge_server.experiments.report.table import Column, Table, guarded

MIN_UNITS = 100  # of each arm that is looked at
MIN_DIFFERENT = 20  # of those, the ones that differ from most, to know how much numbers vary
SHARES = 0.5  # of numbers from 0 to 1, how many are one of both where they are shares


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


def hidden(
    states: Sequence[GuardrailState], metrics: Collection[str]
) -> tuple[GuardrailState, ...]:
    """The same without the levels of these metrics."""
    return tuple(
        replace(each, value=None, bound=None) if each.metric in metrics else each for each in states
    )


def telling(experiment: Experiment) -> frozenset[str]:
    """Metrics of guardrails that would say how arms do in the primary metric."""
    primary = experiment.primary
    metrics = [rail.metric for rail in experiment.guardrails]
    return frozenset(each.name for each in metrics if primary and _source(each) == _source(primary))


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


def surely(metric: Metric, numbers: Floats, side: int, alpha: float) -> float | None:
    """What the mean is not below (side 1) or not above (-1); None where that is not known yet.

    It is wrong at most `alpha` of the time, at every look: of shares always, of other numbers where
    many units' mean is nearly normal.
    """
    units = len(numbers)
    if units < MIN_UNITS:
        return None
    if _are_shares(numbers):
        if side < 0 and not numbers.any() and not _is_share(metric):
            return None  # all are 0: who knows of how much they are when they are not
        return (least if side > 0 else most)(_rate(numbers), alpha)
    variance = _variance(numbers)
    if variance is None:
        return None
    width = float(one_sided_width(sqrt(variance / units), float(units), alpha))
    return float(numbers.mean()) - side * width


def surely_more(one: Floats, other: Floats, alpha: float) -> float | None:
    """What one mean less the other is not below, in the same sense."""
    arms = one, other
    if min(len(one), len(other)) < MIN_UNITS:
        return None
    if all(_are_shares(each) for each in arms):
        return least_gap(_rate(one), _rate(other), alpha)
    found = [_variance(each) for each in arms]
    known = [each for each in found if each is not None]
    if not known or not all(isfinite(_mean(each)) for each in arms):
        return None
    # Units that are nearly all alike do not say how much they vary: those of the other arm do.
    variances = [max(known) if each is None else each for each in found]
    error = sqrt(sum(v / len(each) for v, each in zip(variances, arms, strict=True)))
    gap = _mean(one) - _mean(other)
    return gap - float(one_sided_width(error, float(len(one) + len(other)), alpha))


def _source(metric: Metric) -> tuple[str | None, str | None]:
    return metric.outcome, metric.measure


def _state(table: Table, column: Column, rail: Guardrail, arm: int, alpha: float) -> GuardrailState:
    rule = Rule.of(rail, table.arms[table.control])
    numbers = _numbers(table, column, arm)
    if rail.worse_by is None:
        units, value = len(numbers), _mean(numbers)
        bound = surely(rail.metric, numbers, rule.side, alpha)
    else:
        pair = numbers, _numbers(table, column, table.control)
        worse, other = pair if rail.metric.better == "lower" else pair[::-1]
        units, value = min(map(len, pair)), _mean(worse) - _mean(other)
        bound = surely_more(worse, other, alpha)
    beyond = bound is not None and (bound - rule.limit) * rule.side > 0
    return GuardrailState(
        rail.metric.name,
        table.arms[arm],
        rule.words,
        rule.limit,
        rail.action,
        "unknown" if bound is None else "broken" if beyond else "ok",
        None if bound is None else value,
        bound,
        units,
    )


def _numbers(table: Table, column: Column, arm: int) -> Floats:
    """Of an arm's units; NaN is left out."""
    numbers: Floats = column.now[(table.arm == arm) & ~np.isnan(column.now)]
    return numbers


def _mean(numbers: Floats) -> float:
    with np.errstate(over="ignore"):
        return float(numbers.mean()) if len(numbers) else np.nan


def _are_shares(numbers: Floats) -> bool:
    """Whether most are 0 or 1 and the others between: whose variance is not to be seen if rare."""
    if numbers.min() < 0 or numbers.max() > 1:
        return False
    return bool(((numbers == 0) | (numbers == 1)).mean() >= SHARES)


def _is_share(metric: Metric) -> bool:
    """Whether no unit can have more than 1."""
    yes_or_no = metric.over is not None or metric.measure in ("error", "empty")
    return metric.per_unit == "any" or (yes_or_no and metric.per_unit == "mean")


def _rate(numbers: Floats) -> Rate:
    ones = float(numbers.sum())
    return Rate(ones, len(numbers) - ones)


def _variance(numbers: Floats) -> float | None:
    """Between units; None where too few of them differ, or their numbers are too large."""
    _, counts = np.unique(numbers, return_counts=True)
    if len(numbers) - counts.max() < MIN_DIFFERENT:
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        variance = float(numbers.var(ddof=1))
    return variance if isfinite(variance) else None
