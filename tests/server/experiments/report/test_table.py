"""Which units are compared, and which number each of them has, from a log as servers write it."""

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynmerge_server.experiments.declaration import Metric, metrics_of
from dynmerge_server.experiments.records import Outcome
from dynmerge_server.experiments.report.table import Changed, Table, compared, guarded
from tests.server.experiments.report.log_factory import BEGAN, DAY, LogFile

ARMS = {"arms": {"A": {}, "B": {"preset": "law"}}}
LIKED = Metric(outcome="liked")
TOKENS = Metric(measure="tokens", better="higher")
NOW = BEGAN + 100 * DAY


@pytest.fixture
def log(tmp_path: Path) -> LogFile:
    return LogFile(tmp_path / "log.db")


def table_of(log: LogFile, *metrics: Metric, **more: Any) -> Table:
    course = log.declare("tone", {**ARMS, **more})
    with log.open() as connection:
        found = compared(connection, course, metrics or (LIKED,), NOW)
    connection.close()
    return found


def test_a_unit_is_of_the_arm_it_was_first_assigned(log: LogFile) -> None:
    log.expose("u", "A", BEGAN + 5)
    log.expose("u", "A", BEGAN + 9)
    log.expose("v", "B", BEGAN + 1, kind="flagged")
    found = table_of(log)
    assert found.units == (1, 1)
    assert found.counts.requests == (2, 1)
    assert found.counts.assigned == (1, 0)
    assert list(found.time) == [BEGAN + 1, BEGAN + 5]


def test_units_seen_in_two_arms_are_counted_and_left_out(log: LogFile) -> None:
    log.expose("u", "A")
    log.expose("u", "B")
    log.expose("v", "B")
    found = table_of(log)
    assert found.units == (0, 1)
    assert found.counts.two_arms == 1


def test_what_was_forced_held_out_or_outside_is_no_part_of_a_comparison(log: LogFile) -> None:
    log.expose("u", "A")
    for kind, arm in (("forced", "B"), ("pair", "B"), ("holdout", None)):
        log.expose("u" if kind != "holdout" else "h", arm, kind=kind)
    log.expose("o", None, kind="outside", experiment=None)
    log.expose("other", "A", experiment="another")
    found = table_of(log)
    assert found.units == (1, 0)
    assert (found.counts.forced, found.counts.holdout, found.counts.two_arms) == (1, 1, 0)


def test_units_that_came_before_the_weights_changed_are_left_out(log: LogFile) -> None:
    course = log.declare("tone", ARMS)
    log.expose("old", "A", BEGAN + 1)
    course = log.change(course, BEGAN + DAY, weights={"A": 0.9, "B": 0.1})
    log.expose("old", "A", BEGAN + DAY + 1)
    log.expose("new", "B", BEGAN + DAY + 2, phase=1)
    connection = log.open()
    found = compared(connection, course, (), NOW)
    connection.close()
    assert found.units == (0, 1)
    assert found.counts.earlier == 1


@pytest.mark.parametrize(
    ("metric", "numbers"),
    [
        (LIKED, [2.0, np.nan, -1.0]),
        (Metric(outcome="liked", per_unit="sum"), [4.0, 0.0, -1.0]),
        (Metric(outcome="liked", per_unit="any"), [1.0, 0.0, 0.0]),
        (Metric(outcome="liked", over=2), [0.5, np.nan, 0.0]),
        (Metric(outcome="liked", over=2, per_unit="sum"), [1.0, 0.0, 0.0]),
        (Metric(outcome="liked", over=2, per_unit="any"), [1.0, 0.0, 0.0]),
        (Metric(measure="tokens", better="higher"), [6.0, 3.0, 10.0]),
        (
            Metric(measure="tokens", better="higher", per_unit="sum"),
            [12.0, 3.0, 10.0],
        ),
        (Metric(measure="tokens", better="higher", over=5), [0.5, 0.0, 1.0]),
        (Metric(measure="error"), [0.5, 0.0, 0.0]),
        (Metric(measure="empty", per_unit="any"), [0.0, 1.0, 0.0]),
    ],
    ids=lambda given: given.name if isinstance(given, Metric) else "",
)
def test_a_unit_has_one_number(log: LogFile, metric: Metric, numbers: list[float]) -> None:
    first = log.expose("u", "A", BEGAN + 1, completion_tokens=4, status=500)
    second = log.expose("u", "A", BEGAN + 2, completion_tokens=8, status=200, empty=False)
    log.expose("v", "A", BEGAN + 3, completion_tokens=3, status=499, empty=True)
    third = log.expose("w", "B", BEGAN + 4, completion_tokens=10)
    log.vote(first, "liked", 1)
    log.vote(second, "liked", 3, BEGAN + 100 * DAY)
    log.vote(third, "liked", -1)
    log.vote(third, "disliked", 7)
    (column,) = table_of(log, metric).columns
    np.testing.assert_array_equal(column.now, numbers)


def test_who_answered_is_known_also_where_silence_counts(log: LogFile) -> None:
    log.vote(log.expose("u", "A", BEGAN + 1), "liked", 0)
    log.expose("v", "A", BEGAN + 2)
    (column,) = table_of(log, Metric(outcome="liked", per_unit="sum")).columns
    assert list(column.answered) == [True, False]


def test_times_of_requests_that_waited_for_their_merge_are_for_guardrails_only(
    log: LogFile,
) -> None:
    metric = Metric(measure="ttft", per_unit="sum")
    course = log.declare("tone", ARMS)
    for cache, seconds in (("hit", 1.0), ("stored", 10.0), ("collapsed", 100.0), (None, 1000.0)):
        log.expose("u", "A", cache=cache, ttft=seconds)
    connection = log.open()
    assert list(compared(connection, course, [metric], NOW).columns[0].now) == [1001.0]
    assert list(guarded(connection, course, [metric]).columns[0].now) == [1111.0]
    assert compared(connection, course, [metric], NOW).counts.cold == (2, 0)
    connection.close()


def test_the_time_before_is_what_was_known_when_the_experiment_began(log: LogFile) -> None:
    metrics = (
        Metric(measure="tokens", better="higher"),
        LIKED,
        Metric(outcome="liked", per_unit="sum"),
    )
    before = log.expose(
        "u", None, BEGAN - DAY, kind="outside", experiment=None, completion_tokens=7
    )
    other = log.expose("u", "X", BEGAN - DAY, experiment="another", completion_tokens=9)
    log.expose("u", "A", BEGAN + 1, completion_tokens=100)
    log.expose("v", "B", BEGAN + 2, completion_tokens=100)
    log.expose("w", None, BEGAN - DAY, kind="outside", experiment=None, completion_tokens=5)
    log.expose("w", "B", BEGAN + 3)
    log.vote(before, "liked", 1, BEGAN - 1)
    log.vote(other, "liked", 5, BEGAN + 1)  # too late to be of the time before
    tokens, mean, total = table_of(log, *metrics).columns
    np.testing.assert_array_equal(tokens.before, [8, np.nan, 5])
    np.testing.assert_array_equal(mean.before, [1, np.nan, np.nan])
    np.testing.assert_array_equal(total.before, [1, np.nan, 0])


def test_an_experiment_begins_when_it_first_runs(log: LogFile) -> None:
    course = log.declare("tone", {**ARMS, "state": "draft"}, BEGAN - 2 * DAY)
    log.expose("u", None, BEGAN - DAY, kind="outside", experiment=None, completion_tokens=7)
    course = log.change(course, BEGAN, state="running")
    log.expose("u", "A", BEGAN + 1, completion_tokens=9)
    connection = log.open()
    (column,) = compared(connection, course, [TOKENS], NOW).columns
    connection.close()
    assert list(column.before) == [7]


def test_one_started_by_hand_before_its_time_begins_then(log: LogFile) -> None:
    """What was served since is no time before, though the first revision names a later start."""
    later = datetime.fromtimestamp(BEGAN + 10 * DAY, timezone.utc).isoformat()
    course = log.declare("tone", {**ARMS, "start": later})
    connection = log.open()
    assert compared(connection, course, [TOKENS], BEGAN + 1).units == (0, 0)
    log.expose("u", None, BEGAN + 1, kind="outside", experiment=None, completion_tokens=7)
    course = log.change(course, BEGAN + DAY, "now", start=None)
    for day in (2, 3):
        log.expose("u", "A", BEGAN + day * DAY, completion_tokens=900)
        log.expose("v", "B", BEGAN + day * DAY, completion_tokens=900)
    (column,) = compared(connection, course, [TOKENS], NOW).columns
    connection.close()
    np.testing.assert_array_equal(column.before, [7, np.nan])
    np.testing.assert_array_equal(column.now, [900, 900])


def test_guardrails_do_not_ask_for_what_is_no_part_of_them(log: LogFile) -> None:
    course = log.declare("tone", {**ARMS, "primary": {"outcome": "liked"}})
    log.expose("u", "A")
    log.expose("v", "B", status=500)
    log.expose("w", "B", kind="forced")
    asked: list[str] = []
    connection = log.open()
    connection.set_trace_callback(asked.append)
    found = guarded(connection, course, [Metric(measure="error")])
    assert (found.units, list(found.columns[0].now)) == ((1, 1), [0, 1])
    (only,) = asked
    assert "ttft" not in only
    assert "completion_tokens" not in only
    asked.clear()
    guarded(connection, course, [Metric(measure="error"), LIKED])
    assert len(asked) == 2
    connection.close()


def test_values_that_are_words_are_counted(log: LogFile) -> None:
    exposure = log.expose("u", "A")
    for name in ("liked", "mood"):
        said = Outcome(name, exposure.request_id, BEGAN + 2, name, "CATEGORICAL", category="yes")
        log.add((), (), [(said, exposure.id)])
    liked, tokens = table_of(log, LIKED, TOKENS).columns
    assert (liked.words, tokens.words) == (1, 0)
    assert not liked.answered.any()


def test_an_arm_whose_merge_changed_is_known_by_how_many_requests_and_since_when(
    log: LogFile,
) -> None:
    log.expose("u", "A", BEGAN + 1)
    log.expose("u", "A", BEGAN + 20, merge_id="n")
    log.expose("v", "A", BEGAN + 10, method="ties")
    log.expose("v", "A", BEGAN + 30, preference="law")
    log.expose("w", "B", BEGAN + 2)
    for arm in "AB":  # not compared
        log.expose("both", arm, BEGAN + 3, merge_id="other")
    log.expose("x", "B", BEGAN + 3, merge_id="other", kind="forced")
    assert table_of(log).changed == (Changed("A", 4, 3, BEGAN + 10),)


def test_an_experiment_that_nobody_saw_has_an_empty_table(log: LogFile) -> None:
    course = log.declare("tone", {**ARMS, "primary": {"outcome": "liked"}})
    connection = log.open()
    found = compared(connection, course, metrics_of(course.experiment), NOW)
    connection.close()
    assert found.units == (0, 0)
    assert len(found.columns[0].now) == 0
