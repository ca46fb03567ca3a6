"""The report of a real log: what is in it, and what is withheld from it."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from dynmerge.errors import ConfigError, UnknownExperiment
from dynmerge_server.experiments.records import Exposure, Finish, Outcome
from dynmerge_server.experiments.report.guardrails import guardrail_states
from dynmerge_server.experiments.report.report import Report, report, report_of
from dynmerge_server.experiments.report.results import GuardrailState
from dynmerge_server.experiments.report.source import course_of
from tests.server.experiments.report.log_factory import BEGAN, DAY, LogFile, run_experiment

TONE: dict[str, Any] = {
    "arms": {"A": {}, "B": {"preset": "law"}, "C": {"method": "ties"}},
    "primary": {"outcome": "liked"},
    "metrics": [
        {"measure": "tokens", "better": "higher"},
        {"measure": "latency"},
    ],
    "guardrails": [{"metric": {"measure": "error"}, "at_most": 0.05}],
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


def states_of(log: LogFile) -> tuple[GuardrailState, ...]:
    with closing(log.open()) as connection:
        return guardrail_states(connection, course_of(connection, "tone"))


def test_a_mismatch_hides_how_arms_do_by_guardrails_on_the_primary_metric(log: LogFile) -> None:
    rail = {"metric": {"outcome": "liked", "over": 0.5}, "at_least": 0.4}
    declared = {
        "weights": {"A": 2, "B": 1, "C": 1},
        "guardrails": [rail, *TONE["guardrails"]],
    }
    course = log.declare("tone", {**TONE, **declared})
    run_experiment(log, 2000, {"A": 0.3, "B": 0.9, "C": 0.3}, np.random.default_rng(0))
    reason = states_of(log)[0].text
    assert "surely below" in reason
    stopped = replace(course.experiment, state="stopped")
    log.add([course.changed(stopped, BEGAN + DAY, "guardrail", reason)])
    found = report_of(log.path, "tone")
    assert found.sample_ratio.red
    hidden = found.guardrails[:3]
    assert {each.metric for each in hidden} == {"liked over 0.5"}
    assert [each.state for each in hidden] == ["broken", "ok", "broken"]
    assert {(each.value, each.bound) for each in hidden} == {(None, None)}
    assert "broken; by how much is not shown" in hidden[0].text
    assert found.history[-1].reason == "liked over 0.5 in A, at least 0.4: broken"
    assert [each.value for each in found.guardrails[3:]] == [0, 0, 0]


def test_the_time_before_one_started_by_hand_does_not_take_its_effect_away(log: LogFile) -> None:
    """Had it been the time up to the start that was planned, treated requests would be in it."""
    began = time.time() - 10 * DAY
    start = datetime.fromtimestamp(began + 9 * DAY, timezone.utc).isoformat()
    primary = {"measure": "tokens", "better": "higher"}
    arms = {"A": {}, "B": {"preset": "law"}}
    course = log.declare("tone", {"arms": arms, "primary": primary, "start": start}, began - DAY)
    rng = np.random.default_rng(0)
    records: list[Exposure] = []
    ends: list[Finish] = []
    usual = rng.normal(500, 100, 600)
    for index, tokens in enumerate(usual):
        mine = "AB"[index % 2]
        for day, arm in ((-0.5, None), (2, mine), (3, mine)):
            name, kind = f"{index} on {day}", "assigned" if arm else "outside"
            where = (kind, "", "", "", "tone" if arm else None, arm)
            records.append(Exposure(name, name, began + day * DAY, f"u{index}", *where))  # type: ignore[arg-type]
            count = round(tokens + 40 * (arm == "B") + rng.normal(0, 20))
            ends.append(Finish(name, 200, "hit", completion_tokens=count))
    log.add(records, ends)
    log.change(course, began, "at once", start=None)
    found = report_of(log.path, "tone")
    assert found.began == began
    (each,) = found.metrics[0].comparisons
    assert each.difference is not None
    fixed = each.difference.fixed
    assert fixed.low is not None
    assert fixed.high is not None
    assert fixed.low < 40 < fixed.high
    assert each.variance_removed is not None
    assert each.variance_removed > 0.8
    plain = stats.ttest_ind(usual[1::2] + 40, usual[::2], equal_var=False).confidence_interval()
    assert fixed.high - fixed.low < 0.5 * (plain.high - plain.low)
    assert found.verdict.better == ("B",)


def test_one_that_has_not_begun_says_so(log: LogFile) -> None:
    log.declare("tone", {**TONE, "state": "draft"})
    assert report_of(log.path, "tone").json()["began"] is None


def test_an_arm_that_does_not_mean_one_thing_is_noted(log: LogFile) -> None:
    log.declare("tone", TONE)
    log.expose("u", "B", BEGAN + 1)
    log.expose("u", "B", BEGAN + DAY, merge_id="n")
    log.expose("v", "B", BEGAN + 2 * DAY, merge_id="n")
    log.expose("w", "A", BEGAN + DAY, merge_id="n")
    (told,) = [each for each in report_of(log.path, "tone").notes if "merges" in each]
    assert told.startswith(
        "B was served with 2 different merges: since 2027-01-16 08:00 UTC, 2 requests were not"
    )


def test_a_primary_metric_of_words_is_said_to_be_none(log: LogFile) -> None:
    log.declare("tone", TONE)
    for index in range(9):
        asked = log.expose(f"u{index}", "ABC"[index % 3])
        said = Outcome(f"o{index}", asked.request_id, BEGAN, "liked", "CATEGORICAL", category="a")
        log.add((), (), [(said, asked.id)])
    found = report_of(log.path, "tone")
    assert "liked has words as values; a metric needs numbers or booleans" in found.verdict.text
    assert any("9 values of liked are words" in each for each in found.notes)


def test_votes_of_nobody_are_noted(log: LogFile) -> None:
    log.declare("tone", TONE)
    for said in ("first", "second", "tie"):
        log.pair(("A", "B"), said, "")
    log.pair(("B", "A"), "first", "u")
    found = report_of(log.path, "tone")
    assert found.pairs is not None
    assert (found.pairs.units, found.pairs.without_unit) == (1, 3)
    assert any("3 of 4 votes named no unit; they may be one" in each for each in found.notes)


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
