"""Comparisons against published figures and scipy, what is corrected, and what is said of them."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dynmerge_server.experiments.declaration import Metric
from dynmerge_server.experiments.report import words
from dynmerge_server.experiments.report.compare import (
    adjusted,
    compare,
    exploratory_results,
    primary_result,
)
from dynmerge_server.experiments.report.results import Comparison, Counts, SampleRatio
from dynmerge_server.experiments.report.samples import Sample, sample
from dynmerge_server.experiments.report.source import Floats
from dynmerge_server.experiments.report.srm import sample_ratio
from dynmerge_server.experiments.report.table import Column, Table
from dynmerge_server.experiments.report.verdict import verdict

FAIR = SampleRatio((1000, 1000), (1000, 1000), 1.0, False)


def numbers(values: Floats) -> Sample | None:
    return sample(values, np.full(len(values), np.nan), 0.0)


def rate(ones: int, units: int) -> Floats:
    return np.repeat([1.0, 0.0], [ones, units - ones])


def table(metric: Metric, *arms: Floats) -> Table:
    """Units of several arms that took turns, all of them answering."""
    arm = np.repeat(np.arange(len(arms)), [len(each) for each in arms])
    now: Floats = np.concatenate(arms)
    none = np.full(len(now), np.nan)
    column = Column(metric, now, none, ~np.isnan(now))
    counts = Counts((0,), (0,), tuple(len(each) for each in arms), 0, 0, 0, 0)
    return Table(
        tuple("ABCDEFG"[: len(arms)]),
        0,
        arm,
        np.arange(len(now), dtype=np.float64),
        (column,),
        counts,
    )


def test_100_of_1000_against_130_is_no_winner_yet_though_a_naive_dashboard_calls_one() -> None:
    found = compare("B", numbers(rate(100, 1000)), numbers(rate(130, 1000)), 0.05)
    assert found.difference is not None
    assert found.difference.value == pytest.approx(0.03)
    fixed, sequence = found.difference.fixed, found.difference.sequence
    assert (fixed.low, fixed.high) == pytest.approx((0.0021, 0.0579), abs=1e-4)
    assert (sequence.low, sequence.high) == pytest.approx((-0.0145, 0.0745), abs=1e-4)
    assert found.fixed_p == pytest.approx(0.0355, abs=1e-3)
    assert found.sequence_p == pytest.approx(0.379, abs=1e-2)


@given(st.integers(0, 2**32), st.floats(-100, 100), st.floats(0.1, 10))
def test_the_fixed_interval_is_welchs(seed: int, mean: float, spread: float) -> None:
    rng = np.random.default_rng(seed)
    one, other = rng.normal(mean, 1, 40), rng.normal(mean, spread, 70)
    found = compare("B", numbers(one), numbers(other), 0.05)
    expected = stats.ttest_ind(other, one, equal_var=False)
    ends = expected.confidence_interval(0.95)
    assert found.difference is not None
    assert found.fixed_p == pytest.approx(expected.pvalue)
    assert found.difference.fixed.low == pytest.approx(ends.low, abs=1e-9)
    assert found.difference.fixed.high == pytest.approx(ends.high, abs=1e-9)


def test_a_relative_difference_is_to_a_mean_well_above_0() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(10, 1, 500), rng.normal(11, 1, 500)
    found = compare("B", numbers(one), numbers(other), 0.05).relative
    assert found is not None
    assert found.value == pytest.approx(other.mean() / one.mean() - 1)
    assert found.sequence.low is not None
    assert found.fixed.low is not None
    assert 0 < found.sequence.low < found.fixed.low < found.value
    for shift in (10, 10.0 - one.mean() + 10, 20):
        assert compare("B", numbers(one - shift), numbers(other - shift), 0.05).relative is None


@pytest.mark.parametrize(
    ("one", "other", "why"),
    [
        (rate(10, 99), rate(10, 100), "99 units of an arm have this metric"),
        (rate(4, 500), rate(40, 500), "4 units of an arm differ"),
        (rate(0, 500), rate(40, 500), "0 units of an arm differ"),
        (rate(0, 500), rate(0, 500), "0 units of an arm differ"),
        (np.full(500, 3.0), np.full(500, 3.0), "all units have the same number"),
        (np.full(500, np.nan), rate(40, 500), "fewer than 2 units of an arm have this metric"),
        (np.full(500, 1e200), rate(40, 500), "too large to add"),
        (np.array([]), np.array([]), "fewer than 2 units of an arm have this metric"),
    ],
)
def test_too_few_units_are_said_to_be_too_few(one: Floats, other: Floats, why: str) -> None:
    given_table = table(Metric(outcome="liked"), one, other)
    found = primary_result(given_table, given_table.columns[0], 0.05)
    assert why in str(found.comparisons[0].too_few)
    decided = verdict(FAIR, found, "A")
    assert decided.decision == "few"
    assert why in decided.text


def test_arms_share_the_primary_metrics_alpha() -> None:
    rng = np.random.default_rng(1)
    metric = Metric(outcome="liked")
    two = table(metric, *(rng.normal(0, 1, 500) for _ in range(2)))
    four = table(metric, *(rng.normal(0, 1, 500) for _ in range(4)))
    assert primary_result(two, two.columns[0], 0.05).alpha == 0.05
    assert primary_result(four, four.columns[0], 0.05).alpha == pytest.approx(0.05 / 3)
    assert exploratory_results(four, four.columns * 2, 0.06)[0].alpha == pytest.approx(0.01)


def test_exploratory_p_values_are_holms() -> None:
    given_table = table(Metric(outcome="liked"), *(rate(n, 1000) for n in (100, 130, 125)))
    (found,) = exploratory_results(given_table, given_table.columns, 0.05)
    control, *others = (numbers(rate(n, 1000)) for n in (100, 130, 125))
    raw = [compare("", control, each, 0.05).fixed_p for each in others]
    assert raw[0] is not None
    assert raw[1] is not None
    assert raw[0] < raw[1]
    assert [each.adjusted_p for each in found.comparisons] == pytest.approx(
        [2 * raw[0], max(2 * raw[0], raw[1])]
    )
    assert [each.fixed_p for each in found.comparisons] == pytest.approx([2 * p for p in raw if p])
    assert adjusted([]) == ()


@given(st.lists(st.integers(1000, 1500), min_size=2, max_size=4), st.integers(1, 3))
@settings(deadline=None, max_examples=20)
def test_p_values_are_below_alpha_where_their_intervals_exclude_0(
    arms: list[int], metrics: int
) -> None:
    ones = table(Metric(outcome="liked"), *(rate(n, 4000) for n in (1200, *arms)))
    results = [primary_result(ones, ones.columns[0], 0.05)]
    results += exploratory_results(ones, ones.columns * metrics, 0.05)[:1]
    for each in (each for result in results for each in result.comparisons):
        assert each.difference is not None
        for p, interval in (
            (each.fixed_p, each.difference.fixed),
            (each.sequence_p, each.difference.sequence),
        ):
            assert p is not None
            assert 0 <= p <= 1
            if abs(p - 0.05) > 1e-6:
                assert (p < 0.05) == interval.excludes_zero


def test_where_there_are_too_few_units_no_p_is_told_nor_the_sequence_printed() -> None:
    for make in (rate(10, 90), np.random.default_rng(0).normal(0, 1, 90)):
        ones = table(Metric(outcome="liked"), make, make[::-1] + (np.arange(90) % 2) * 0.0)
        for found in (
            primary_result(ones, ones.columns[0], 0.05),
            *exploratory_results(ones, ones.columns, 0.05),
        ):
            (each,) = found.comparisons
            assert each.too_few
            assert (each.fixed_p, each.adjusted_p, each.sequence_p) == (None, None, None)
            sequence, p, fixed, fixed_p, relative = words.tests(each, found.rate)
            assert (sequence, p, fixed_p, relative) == ("-",) * 4
            assert fixed != "-"


def test_words_are_no_numbers_and_that_is_said() -> None:
    ones = table(Metric(outcome="liked"), np.full(500, np.nan), np.full(500, np.nan))
    column = replace(ones.columns[0], words=900)
    said = verdict(FAIR, primary_result(ones, column, 0.05), "A")
    why = "liked has words as values; a metric needs numbers or booleans"
    assert (said.decision, said.text) == ("few", f"Nothing can be compared: {why}.")
    some = replace(column, now=np.arange(1000.0), answered=np.ones(1000, dtype=bool))
    assert primary_result(ones, some, 0.05).trouble is None


def test_of_seconds_the_arm_with_fewer_is_better() -> None:
    rng = np.random.default_rng(0)
    for metric in (Metric(measure="latency"), Metric(measure="ttft"), Metric(measure="error")):
        ones = table(metric, rng.exponential(3, 2000), rng.exponential(1, 2000))
        said = verdict(FAIR, primary_result(ones, ones.columns[0], 0.05), "A")
        assert (said.better, said.worse) == (("B",), ())


def test_the_verdict_names_arms_that_the_sequence_shows() -> None:
    ones = table(Metric(outcome="liked"), *(rate(n, 5000) for n in (1500, 1900, 1510, 1100)))
    found = primary_result(ones, ones.columns[0], 0.05)
    said = verdict(FAIR, found, "A")
    assert (said.decision, said.better, said.worse) == ("better", ("B",), ("D",))
    assert said.text == "By liked, B is better than A; A is better than D."
    other_way = verdict(FAIR, replace(found, better="lower"), "A")
    assert (other_way.better, other_way.worse) == (("D",), ("B",))


def test_no_difference_shown_is_said_so() -> None:
    ones = table(Metric(outcome="liked"), rate(100, 1000), rate(130, 1000))
    said = verdict(FAIR, primary_result(ones, ones.columns[0], 0.05), "A")
    assert (said.decision, said.better, said.worse) == ("none", (), ())


def test_a_mismatch_hides_who_is_better() -> None:
    ones = table(Metric(outcome="liked"), rate(1500, 5000), rate(1900, 5000))
    red = sample_ratio((5000, 5500), (0.5, 0.5))
    said = verdict(red, primary_result(ones, ones.columns[0], 0.05), "A")
    assert red.red
    assert (said.decision, said.better, said.worse) == ("mismatch", (), ())
    assert "ample ratio mismatch" in said.text


def test_without_a_primary_metric_nothing_is_decided() -> None:
    assert verdict(FAIR, None, "A").decision == "undeclared"


def test_an_arm_without_weight_has_no_units() -> None:
    assert not sample_ratio((500, 480, 0), (0.5, 0.5, 0.0)).red
    assert sample_ratio((500, 480, 1), (0.5, 0.5, 0.0)).red
    assert sample_ratio((0, 0), (0.5, 0.5)) == SampleRatio((0, 0), (0, 0), None, False)
    assert sample_ratio((7, 0), (1.0, 0.0)).p is None


def test_nothing_is_compared_where_no_number_is() -> None:
    assert compare("B", None, None, 0.05) == Comparison(
        "B", 0, "fewer than 2 units of an arm have this metric, or its numbers are too large to add"
    )
