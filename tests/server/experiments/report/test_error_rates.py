"""How often the report is wrong, by simulation: the promises that make it worth looking at daily.

Vectorised over experiments; each figure is of a fixed seed.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binomtest, kstest, norm

from dynmerge_server.experiments.declaration import Guardrail
from dynmerge_server.experiments.report.compare import compare
from dynmerge_server.experiments.report.guardrails import check, surely
from dynmerge_server.experiments.report.power import (
    Run,
    fixed_effect,
    fixed_power,
    sequence_effect,
    sequence_power,
)
from dynmerge_server.experiments.report.report import report_of
from dynmerge_server.experiments.report.results import Comparison
from dynmerge_server.experiments.report.samples import sample
from dynmerge_server.experiments.report.sequence import half_width
from dynmerge_server.experiments.report.srm import sample_ratio
from tests.server.experiments.report.log_factory import LogFile, run_experiment
from tests.server.experiments.report.test_guardrails import ERROR, LIKED, table

EXPERIMENTS, LOOKS, PER_LOOK = 1000, 30, 200
Floats = NDArray[np.float64]


def levels(ones: NDArray[np.int64], per_look: int) -> tuple[Floats, Floats, Floats]:
    """Units, means and variances of the means by look, of 0s and 1s that came in looks."""
    n = per_look * np.arange(1.0, ones.shape[-1] + 1)
    mean = ones.cumsum(axis=-1) / n
    return n, mean, mean * (1 - mean) / (n - 1)


def differences(
    rng: np.random.Generator, rates: tuple[float, float], experiments: int = EXPERIMENTS
) -> tuple[Floats, Floats, Floats]:
    """Units of both arms, difference and standard error: (experiments, looks)."""
    one, other = (rng.binomial(PER_LOOK, rate, (experiments, LOOKS)) for rate in rates)
    n, mean, variance = levels(one, PER_LOOK)
    _, other_mean, other_variance = levels(other, PER_LOOK)
    return 2 * n, other_mean - mean, np.sqrt(variance + other_variance)


def test_of_1000_comparisons_of_the_same_looked_at_on_30_days_the_sequence_errs_in_5_percent() -> (
    None
):
    n, gap, error = differences(np.random.default_rng(1), (0.1, 0.1))
    ever = (np.abs(gap) > half_width(error, n, 0.05)).any(axis=1).mean()
    assert ever <= 0.05
    # The control, that this can fail: the test that holds for one look.
    naive = (np.abs(gap) > norm.isf(0.025) * error).any(axis=1).mean()
    assert 0.20 <= naive <= 0.35
    print(f"sequence {ever:.3f}, z-test {naive:.3f}")


def test_a_difference_that_is_there_is_found() -> None:
    n, gap, error = differences(np.random.default_rng(2), (0.1, 0.13))
    assert (np.abs(gap) > half_width(error, n, 0.05)).any(axis=1).mean() > 0.85


def ever_broken(rail: Guardrail, arms: Sequence[Floats], looks: Iterable[int]) -> bool:
    """Whether one of two arms' guardrails is called broken at any look, of so many units each."""
    return any(
        each.state == "broken"
        for n in looks
        for each in check(table(rail.metric, *(arm[:n] for arm in arms)), [rail], 0.05)
    )


RARE = (0.002, 0.01, 0.02)
AT_THE_LIMIT: list[tuple[dict[str, float], float]] = [
    *(({"at_most": rate}, rate) for rate in (*RARE, 0.5)),
    *(({"at_least": rate}, rate) for rate in (*RARE, 0.5)),
    ({"at_least": 0.01}, 0.02),
    *(({"worse_by": 0.0}, rate) for rate in RARE),
]


@pytest.mark.parametrize(("limit", "rate"), AT_THE_LIMIT)
@pytest.mark.parametrize("number", [1, 3], ids=["shares", "numbers"])
def test_a_guardrail_that_holds_is_called_broken_in_5_percent_at_most(
    limit: dict[str, float], rate: float, number: int
) -> None:
    """At its limit, looked at 30 times, of shares and of numbers that are rarely not 0."""
    rng, looks = np.random.default_rng(3), range(100, 3001, 100)
    metric = ERROR if number == 1 else LIKED
    rail = Guardrail(metric, **{name: number * each for name, each in limit.items()})  # type: ignore[arg-type]
    slow = "worse_by" in limit and number == 1  # of which test_rates.py has more
    found = [
        ever_broken(rail, [number * each for each in ones], looks)
        for ones in rng.binomial(1, rate, (10 if slow else 100, 2, 3000)) * 1.0
    ]
    print(f"{limit} at {rate}, numbers 0 and {number}: {np.mean(found):.3f}")
    assert np.mean(found) <= 0.05


@pytest.mark.parametrize(
    ("limit", "rates"),
    [
        ({"at_most": 0.05}, (0.01, 0.4)),
        ({"at_least": 0.5}, (0.7, 0.1)),
        ({"worse_by": 0.02}, (0.0, 0.4)),
        ({"worse_by": 0.02}, (0.01, 0.4)),
    ],
)
def test_a_guardrail_that_is_clearly_broken_stops_at_100_units(
    limit: dict[str, float], rates: tuple[float, float]
) -> None:
    rng = np.random.default_rng(4)
    for _ in range(30):
        arms = [rng.binomial(1, rate, 130).astype(float) for rate in rates]
        assert not ever_broken(Guardrail(ERROR, **limit), arms, [99])  # type: ignore[arg-type]
        assert ever_broken(Guardrail(ERROR, **limit), arms, [100, 130])  # type: ignore[arg-type]


@pytest.mark.parametrize("side", [1, -1])
def test_a_guardrail_on_skewed_numbers_is_called_broken_in_5_percent_at_most(side: int) -> None:
    """Such as tokens or seconds, whose means are far from normal for long."""
    truth, rng = np.exp(0.5), np.random.default_rng(4)
    found = [
        any(
            bound is not None and side * (bound - truth) > 0
            for n in range(100, 3001, 100)
            for bound in [surely(LIKED, numbers[:n], side, 0.05)]
        )
        for numbers in rng.lognormal(0, 1, (300, 3000))
    ]
    print(f"broken on side {side}: {np.mean(found):.3f}")
    assert np.mean(found) <= 0.05


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.9, 0.1)])
def test_planned_power_is_the_power_there_is(shares: tuple[float, float]) -> None:
    rng = np.random.default_rng(5)
    control, arm = (round(4000 * share) for share in shares)
    run = Run(control, arm, 4.0, 0.05)
    plans = {
        "fixed": (fixed_effect(run, 0.8), fixed_power),
        "sequence": (sequence_effect(run, 0.8), sequence_power),
    }
    for name, (effect, power) in plans.items():
        assert power(run, effect) == pytest.approx(0.8, abs=1e-3)
        one = rng.normal(0, 2, (4000, control)).mean(axis=1)
        gap = rng.normal(effect, 2, (4000, arm)).mean(axis=1) - one
        wide = norm.isf(0.025) if name == "fixed" else run.wide
        realised = (np.abs(gap) > wide * run.error).mean()  # its own error is 0.006
        print(f"{name}, {shares}: planned 0.8, realised {realised:.3f}")
        assert realised == pytest.approx(0.8, abs=0.03)


def test_as_many_units_as_promised_are_not_called_a_mismatch() -> None:
    rng = np.random.default_rng(6)
    found = [sample_ratio(n, (0.9, 0.1)).red for n in rng.multinomial(100_000, (0.9, 0.1), 1000)]
    print(f"red without a reason: {np.mean(found):.4f}")
    assert np.mean(found) <= 0.003
    quiet = sample_ratio((90_123, 9_877), (0.9, 0.1))
    assert not quiet.red
    assert quiet.p == pytest.approx(0.195, abs=0.001)


@pytest.mark.parametrize("arm", [0, 1])
def test_5_percent_of_one_arms_log_lost_is_a_mismatch(arm: int) -> None:
    rng = np.random.default_rng(7)
    found = []
    for n in rng.multinomial(100_000, (0.9, 0.1), 1000):
        n[arm] = rng.binomial(n[arm], 0.95)
        found.append(sample_ratio(n, (0.9, 0.1)))
    exact = sample_ratio((90_000, 9_500) if arm else (85_500, 10_000), (0.9, 0.1))
    print(f"red: {np.mean([each.red for each in found]):.3f}; p if exact {exact.p:.2g}")
    assert exact.red
    assert np.mean([each.red for each in found]) > 0.85


def shifted(rng: np.random.Generator, effect: float) -> Comparison:
    """Arms that differ by `effect`, of units whose time before says most of what they do."""
    before = rng.normal(5, 1, (2, 300))
    now = before + rng.normal(0, 0.5, (2, 300)) + np.array([[0.0], [effect]])
    before[:, :50] = np.nan
    pair = [sample(now[arm], before[arm], 5.0) for arm in (0, 1)]
    return compare("b", pair[0], pair[1], 0.05)


def test_the_time_before_makes_intervals_narrower_and_not_wrong() -> None:
    """CUPED, A/A at one look: as often wrong as promised, with the variance it explains gone."""
    rng = np.random.default_rng(8)
    made = [shifted(rng, 0.0) for _ in range(600)]
    wrong = sum(each.fixed_p is not None and each.fixed_p < 0.05 for each in made)
    removed = np.mean([each.variance_removed or 0.0 for each in made])
    print(f"wrong {wrong / 600:.4f}, variance removed {removed:.3f}")
    assert binomtest(wrong, 600, 0.05).pvalue > 0.01
    assert 0.5 < removed < 0.8


def test_the_time_before_leaves_a_difference_as_it_is() -> None:
    rng = np.random.default_rng(9)
    gaps, missed = [], 0
    for _ in range(300):
        found = shifted(rng, 0.3).difference
        assert found is not None
        assert found.fixed.low is not None
        assert found.fixed.high is not None
        gaps.append(found.value)
        missed += not found.fixed.low < 0.3 < found.fixed.high
    print(f"mean difference {np.mean(gaps):.4f} of 0.3, missed {missed / 300:.3f}")
    assert np.mean(gaps) == pytest.approx(0.3, abs=4 * np.std(gaps) / 300**0.5)
    assert binomtest(missed, 300, 0.05).pvalue > 0.01


def test_reports_of_whole_logs_err_as_seldom(tmp_path: Path) -> None:
    """A/A from the file to the verdict: neither a winner nor a mismatch where there is none."""
    rng, said, ratios = np.random.default_rng(10), Counter[str](), []
    for index in range(20):
        log = LogFile(tmp_path / f"{index}.db")
        log.declare("tone", {"arms": {"A": {}, "B": {}}, "primary": {"outcome": "liked"}})
        run_experiment(log, 400, {"A": 0.3, "B": 0.3}, rng)
        found = report_of(log.path, "tone")
        said[found.verdict.decision] += 1
        assert found.sample_ratio.p is not None
        ratios.append(found.sample_ratio.p)
        assert sum(found.sample_ratio.units) == 400
    assert set(said) <= {"none", "better"}
    assert said["better"] <= 3
    assert kstest(ratios, "uniform").pvalue > 0.01  # its p is of that shape where all is well
