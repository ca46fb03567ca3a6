"""The report of a real log: what is in it, and what is withheld from it."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynmerge.errors import ConfigError, UnknownExperiment
from dynmerge_server.experiments.report.report import Report, report, report_of
from tests.server.experiments.report.log_factory import BEGAN, DAY, LogFile, run_experiment

TONE: dict[str, Any] = {
    "arms": {"A": {}, "B": {"preset": "law"}, "C": {"method": "ties"}},
    "primary": {"outcome": "liked"},
    "metrics": [{"measure": "tokens", "better": "higher"}, {"measure": "latency", "better": "lower"}],
    "guardrails": [{"metric": {"measure": "error", "better": "lower"}, "at_most": 0.05}],
    "plan": {"units": 6000, "effect": 0.05},
}


@pytest.fixture
def log(tmp_path: Path) -> LogFile:
    return LogFile(tmp_path / "log.db")


def made(log: LogFile, rates: dict[str, float], seed: int = 0) -> Report:
    log.declare("tone", TONE)
    run_experiment(log, 4000, rates, np.random.default_rng(seed))
    return report_of(log.path, "tone")


def leaves(value: Any) -> Iterator[tuple[str, Any]]:
    """All values of a JSON object that are no object, with the last key before each."""
    for key, each in value.items() if isinstance(value, dict) else ():
        for item in each if isinstance(each, list) else [each]:
            yield from leaves(item) if isinstance(item, dict) else [(key, item)]


def test_an_arm_that_is_better_is_shown_to_be(log: LogFile) -> None:
    found = made(log, {"A": 0.3, "B": 0.42, "C": 0.3})
    assert found.verdict.better == ("B",)
    assert found.verdict.decision == "better"
    assert not found.sample_ratio.red
    assert sum(found.units) == 4000
    liked, tokens, latency = found.metrics
    assert (liked.role, tokens.role, latency.role) == ("primary", "exploratory", "exploratory")
    assert liked.rate
    assert not latency.rate
    assert liked.comparisons[0].difference is not None
    assert liked.comparisons[0].difference.value == pytest.approx(0.12, abs=0.05)
    assert found.guardrails[0].state == "ok"
    last = found.looks[-1]
    assert last.units == found.units
    assert last.differences[0] == liked.comparisons[0].difference
    assert len(found.looks) == 30


def test_arms_alike_are_not_told_apart(log: LogFile) -> None:
    found = made(log, {"A": 0.3, "B": 0.3, "C": 0.3})
    assert found.verdict.decision == "none"


def test_a_plan_says_what_it_can_find(log: LogFile) -> None:
    (to_b, to_c) = made(log, {"A": 0.3, "B": 0.3, "C": 0.3}).power
    assert to_b == replace(to_c, arm="B")
    assert to_b.units == 4000
    assert to_b.planned
    assert to_b.fixed is not None
    assert to_b.sequence is not None
    assert to_b.sequence < to_b.fixed
    assert to_b.smallest_sequence > to_b.smallest_fixed


def test_json_keeps_its_keys_and_holds_finite_numbers(log: LogFile) -> None:
    found = made(log, {"A": 0.3, "B": 0.4, "C": 0.3}).json()
    json.dumps(found, allow_nan=False)
    assert list(found) == [
        "experiment", "time", "state", "control", "arms", "weights", "traffic", "alpha", "began",
        "units", "counts", "verdict", "sample_ratio", "metrics", "guardrails", "power", "pairs",
        "looks", "history", "notes", "caveats",
    ]  # fmt: skip
    assert list(found["metrics"][0]["comparisons"][0]) == [
        "arm", "units", "too_few", "difference", "relative", "fixed_p", "adjusted_p",
        "sequence_p", "variance_removed",
    ]  # fmt: skip
    assert any("latency is not independent" in caveat for caveat in found["caveats"])
    assert any("warm requests only" in caveat for caveat in found["caveats"])


def test_a_mismatch_withholds_every_difference(log: LogFile) -> None:
    """A part of one arm's log is gone, the arm that would have won."""
    log.declare("tone", TONE)
    run_experiment(log, 4000, {"A": 0.3, "B": 0.5, "C": 0.3}, np.random.default_rng(0))
    with log.writing() as connection:
        connection.execute("DELETE FROM exposures WHERE arm = 'B' AND abs(random()) % 5 = 0")
    found = report_of(log.path, "tone")
    assert found.sample_ratio.red
    assert found.sample_ratio.p is not None
    assert found.sample_ratio.p < 0.001
    assert found.verdict.decision == "mismatch"
    assert (found.metrics, found.verdict.better, found.verdict.worse) == ((), (), ())
    shown = dict(leaves(found.json()))
    assert not {"difference", "fixed_p", "sequence_p", "mean", "fixed_low"} & set(shown)
    assert "better" not in found.verdict.text
    assert found.units[1] < found.units[0]  # how many there are is shown


def test_an_experiment_that_just_began_is_reported(log: LogFile) -> None:
    log.declare("tone", TONE)
    found = report_of(log.path, "tone")
    assert found.verdict.decision == "few"
    assert found.units == (0, 0, 0)
    assert found.looks == ()
    log.expose("u", "A")
    assert report_of(log.path, "tone").units == (1, 0, 0)
    json.dumps(report_of(log.path, "tone").json(), allow_nan=False)


def test_without_metrics_units_are_still_counted(log: LogFile) -> None:
    log.declare("tone", {"arms": TONE["arms"]})
    run_experiment(log, 600, {"A": 0.3, "B": 0.3, "C": 0.3}, np.random.default_rng(0))
    found = report_of(log.path, "tone")
    assert found.verdict.decision == "undeclared"
    assert (sum(found.units), found.metrics, found.power) == (600, (), ())
    assert found.looks[-1].units == found.units


def test_what_was_left_out_is_noted(log: LogFile) -> None:
    log.declare("tone", TONE)
    for arm in "AB":
        log.expose("both", arm)
    log.expose("one", "A", cache="stored")
    log.expose("one", "A", kind="forced")
    log.expose("held", None, kind="holdout")
    log.expose("theirs", "B", kind="flagged")
    told = " ".join(report_of(log.path, "tone").notes)
    assert "1 units (33.33%) were seen in more than one arm" in told
    assert "1 requests named their arm" in told
    assert "1 units are held out" in told
    assert "1 units were placed by your own flags" in told
    assert "Requests that waited for their merge: A 1, B 0, C 0." in told


def test_arms_that_answer_more_often_are_noted(log: LogFile) -> None:
    log.declare("tone", TONE)
    exposures = [log.expose(f"u{index}", "AB"[index % 2]) for index in range(200)]
    for exposure in exposures[:100:2] + exposures[1:20:2]:
        log.vote(exposure, "liked", 1)
    told = report_of(log.path, "tone").notes
    assert any("differ in how many of their units have any value of liked" in each for each in told)


def test_history_says_what_changed_by_whom_and_why(log: LogFile) -> None:
    course = log.declare("tone", TONE)
    course = log.change(course, BEGAN + DAY, "looks good", traffic=0.5)
    log.change(course, BEGAN + 2 * DAY, weights={"A": 0.5, "B": 0.25, "C": 0.25})
    first, second, third = report_of(log.path, "tone").history
    assert (first.number, first.source, first.changes) == (1, "file", ())
    assert (second.source, second.reason) == ("api", "looks good")
    assert second.changes == ("traffic: 1.0 to 0.5",)
    assert third.phase == 1
    assert third.changes[0].startswith('weights: {"A": 0.333')


def test_votes_on_pairs_have_a_part_of_their_own(log: LogFile) -> None:
    log.declare("tone", TONE)
    rng = np.random.default_rng(0)
    for index in range(120):
        one, other = (str(arm) for arm in rng.permutation(["A", "B", "C"])[:2])
        log.pair((one, other), str(rng.choice(["first", "second", "tie"])), f"u{index}")
    found = report_of(log.path, "tone")
    assert found.pairs is not None
    assert found.pairs.votes == 120
    assert found.pairs.units == 120
    assert sum(each.wins for each in found.pairs.arms) == 120
    assert found.units == (0, 0, 0)


def test_the_last_vote_on_a_pair_counts(log: LogFile) -> None:
    from dynmerge_server.experiments.records import Outcome

    log.declare("tone", TONE)
    log.pair(("A", "B"), "first", "")
    again = Outcome("again", "p1", BEGAN + 9, "vote", "CATEGORICAL", category="second")
    log.add((), (), [(again, "p1")])
    found = report_of(log.path, "tone").pairs
    assert found is not None
    assert (found.votes, found.arms[1].wins) == (1, 1)


def test_an_unknown_experiment_is_an_error_that_names_those_there_are(log: LogFile) -> None:
    with pytest.raises(UnknownExperiment, match=r"no experiment named 'tune' \(known: none\)"):
        report_of(log.path, "tune")
    log.declare("tone", TONE)
    with pytest.raises(UnknownExperiment, match=r"no experiment named 'tune' \(known: tone\)"):
        report_of(log.path, "tune")


def test_a_report_reads_one_moment_and_leaves_the_connection_as_it_was(log: LogFile) -> None:
    log.declare("tone", TONE)
    connection = log.open()
    report(connection, "tone")
    assert not connection.in_transaction
    connection.execute("BEGIN")
    report(connection, "tone")
    assert connection.in_transaction
    connection.close()


def test_without_the_libraries_the_error_says_what_to_install(
    log: LogFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.declare("tone", TONE)
    for name in list(sys.modules):
        if name.startswith("dynmerge_server.experiments.report.") and not name.endswith("report"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tea_tasting", None)
    monkeypatch.setitem(sys.modules, "tea_tasting.aggr", None)
    with pytest.raises(ConfigError, match=r"tea_tasting.*pip install 'dynmerge\[experiments\]'"):
        report_of(log.path, "tone")
