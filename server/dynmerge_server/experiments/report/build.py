"""Build: a report from the log: which numbers are asked for, and what is withheld."""

import sqlite3
from collections.abc import Sequence

from dynmerge_server.experiments.course import Course
from dynmerge_server.experiments.declaration import Experiment, metrics_of
from dynmerge_server.experiments.report.compare import exploratory_results, primary_result
from dynmerge_server.experiments.report.guardrails import guardrail_states, hidden, telling
from dynmerge_server.experiments.report.history import changes
from dynmerge_server.experiments.report.looks import looks
from dynmerge_server.experiments.report.notes import CAVEATS, notes
from dynmerge_server.experiments.report.pairs import pairs
from dynmerge_server.experiments.report.power import Run, plan
from dynmerge_server.experiments.report.report import Report
from dynmerge_server.experiments.report.results import MetricResult, Power
from dynmerge_server.experiments.report.samples import MIN_UNITS, samples
from dynmerge_server.experiments.report.source import votes_of
from dynmerge_server.experiments.report.srm import sample_ratio
from dynmerge_server.experiments.report.table import Column, Table, compared
from dynmerge_server.experiments.report.verdict import verdict

POWER = 0.8  # where no plan says another


def build(connection: sqlite3.Connection, course: Course, now: float) -> Report:
    """The report as of `now`. Raises sqlite3.Error."""
    experiment = course.experiment
    table = compared(connection, course, metrics_of(experiment), now)
    ratio = sample_ratio(table.counts.assigned, list(experiment.weights.values()))
    column = table.columns[0] if experiment.primary else None
    primary = primary_result(table, column, experiment.alpha) if column else None
    control = table.arms[table.control]
    withheld = telling(experiment) if ratio.red else frozenset()
    votes = pairs(votes_of(connection, experiment.name), table.arms, control, experiment.alpha)
    return Report(
        experiment=experiment.name,
        time=now,
        state=experiment.state,
        control=control,
        arms=table.arms,
        weights=dict(experiment.weights),
        traffic=experiment.traffic_at(now),
        alpha=experiment.alpha,
        began=course.began(now),
        units=table.units,
        counts=table.counts,
        verdict=verdict(ratio, primary, control),
        sample_ratio=ratio,
        metrics=() if ratio.red else _metrics(experiment, table, primary),
        guardrails=hidden(guardrail_states(connection, course), withheld),
        power=_power(experiment, table, column) if column else (),
        pairs=votes,
        looks=looks(table, None if ratio.red else column, experiment.alpha),
        history=changes(course, withheld),
        notes=notes(table, votes),
        caveats=CAVEATS,
    )


def _metrics(
    experiment: Experiment, table: Table, primary: MetricResult | None
) -> tuple[MetricResult, ...]:
    if primary is None:
        return exploratory_results(table, table.columns, experiment.alpha)
    return primary, *exploratory_results(table, table.columns[1:], experiment.alpha)


def _power(experiment: Experiment, table: Table, column: Column) -> tuple[Power, ...]:
    """Of each arm against the control, by how units of the control vary; not of arms so small that
    nothing is decided of them.
    """
    known = samples(table, column)[table.control]
    if known is None or known.variance == 0:
        return ()
    planned = experiment.plan
    units: Sequence[float] = table.units
    if planned:
        units = [planned.units * weight for weight in experiment.weights.values()]
    level = experiment.alpha / (len(table.arms) - 1)
    return tuple(
        plan(
            name,
            Run(units[table.control], units[index], known.variance, level),
            known.mean,
            planned.power if planned else POWER,
            planned.effect if planned else None,
            planned is not None,
        )
        for index, name in enumerate(table.arms)
        if index != table.control and min(units[table.control], units[index]) >= MIN_UNITS
    )
