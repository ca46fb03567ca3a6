"""Report: all that is said of one experiment, built from the log's file.

Light to import: what the statistics need is only loaded when a report is built.
"""

import sqlite3
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from dynmerge.errors import ConfigError
from dynmerge_server.experiments.reading import open_readonly
from dynmerge_server.experiments.report.results import (
    Change,
    Counts,
    GuardrailState,
    Look,
    MetricResult,
    Pairs,
    Power,
    SampleRatio,
    Verdict,
)
from dynmerge_server.experiments.report.source import course_of


@dataclass(frozen=True, slots=True)
class Report:
    """An experiment at one moment. Where the sample ratio is red, no metric is in it."""

    experiment: str
    time: float  # seconds since 1970, when it was made
    state: str
    control: str
    arms: tuple[str, ...]
    weights: Mapping[str, float]
    traffic: float
    alpha: float
    began: float | None  # when units could first have arms
    units: tuple[int, ...]  # that are compared, by arm
    counts: Counts
    verdict: Verdict
    sample_ratio: SampleRatio
    metrics: tuple[MetricResult, ...]  # the primary one first, if there is one
    guardrails: tuple[GuardrailState, ...]
    power: tuple[Power, ...]
    pairs: Pairs | None
    looks: tuple[Look, ...]
    history: tuple[Change, ...]
    notes: tuple[str, ...]  # of this experiment
    caveats: tuple[str, ...]  # of any

    def json(self) -> dict[str, Any]:
        """As JSON holds it; null for a number that is not finite."""
        table: dict[str, Any] = _finite(asdict(self))
        return table


def report(connection: sqlite3.Connection, experiment: str) -> Report:
    """The report of one experiment, of one moment of the log.

    Raises UnknownExperiment naming those there are, ConfigError where a library is missing, and
    sqlite3.Error.
    """
    course = course_of(connection, experiment)
    try:
        from dynmerge_server.experiments.report.build import build
    except ModuleNotFoundError as error:
        message = f"a report needs {error.name}: pip install 'dynmerge[experiments]'"
        raise ConfigError(message) from None
    if connection.in_transaction:
        return build(connection, course, time.time())
    connection.execute("BEGIN")  # all that is read is of one moment
    try:
        return build(connection, course, time.time())
    finally:
        connection.execute("ROLLBACK")


def report_of(path: Path, experiment: str) -> Report:
    """The same from the log's file. Raises ConfigError where it cannot be read."""
    with closing(open_readonly(path)) as connection:
        return report(connection, experiment)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not isfinite(value) else value
