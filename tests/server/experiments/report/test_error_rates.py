"""How often the report is wrong, by simulation: the promises that make it worth looking at daily.

Vectorised over experiments; each figure is of a fixed seed.
"""

from math import sqrt

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import norm

from dynmerge_server.experiments.report.guardrails import Level, surely
from dynmerge_server.experiments.report.power import (
    Run,
    fixed_effect,
    fixed_power,
    sequence_effect,
    sequence_power,
)
from dynmerge_server.experiments.report.samples import sample
from dynmerge_server.experiments.report.sequence import half_width, p_value
from dynmerge_server.experiments.report.srm import sample_ratio

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
    by_p = (p_value(gap, error, n, 0.05) < 0.05).any(axis=1).mean()
    assert by_p == ever
    # The control, that this can fail: the test that holds for one look.
    naive = (np.abs(gap) > norm.isf(0.025) * error).any(axis=1).mean()
    assert 0.20 <= naive <= 0.35
    print(f"sequence {ever:.3f}, z-test {naive:.3f}")


def test_a_difference_that_is_there_is_found() -> None:
    n, gap, error = differences(np.random.default_rng(2), (0.1, 0.13))
    assert (np.abs(gap) > half_width(error, n, 0.05)).any(axis=1).mean() > 0.85


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.5])
def test_a_guardrail_that_holds_is_called_broken_in_5_percent_at_most(rate: float) -> None:
    """An arm exactly at its limit, looked at 30 times: more than noise can do elsewhere."""
    ones = np.random.default_rng(3).binomial(PER_LOOK, rate, (EXPERIMENTS, LOOKS))
    n, mean, variance = levels(ones, PER_LOOK)
    found = [
        any(
            (surely(Level(m, sqrt(v), int(k), int(k)), 1, 0.05) or 0) > rate
            for k, m, v in zip(n, means, variances, strict=True)
        )
        for means, variances in zip(mean, variance, strict=True)
    ]
    print(f"broken at its limit of {rate}: {np.mean(found):.3f}")
    assert np.mean(found) <= 0.05


@pytest.mark.parametrize("side", [1, -1])
def test_a_guardrail_on_skewed_numbers_is_called_broken_in_5_percent_at_most(side: int) -> None:
    """Such as tokens or seconds, whose means are far from normal for long."""
    rng = np.random.default_rng(4)
    numbers = rng.lognormal(0, 1, (400, LOOKS * 100))
    n = 100 * np.arange(1, LOOKS + 1)
    mean = numbers.cumsum(axis=1)[:, n - 1] / n
    variance = (np.square(numbers).cumsum(axis=1)[:, n - 1] / n - mean**2) / n
    truth = np.exp(0.5)
    found = [
        any(
            side * ((surely(Level(m, sqrt(v), int(k), int(k)), side, 0.05) or 0) - truth) > 0
            for k, m, v in zip(n, means, variances, strict=True)
        )
        for means, variances in zip(mean, variance, strict=True)
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


def test_the_time_before_makes_intervals_narrower_and_not_wrong() -> None:
    """CUPED, A/A at one look: as often wrong as promised, with the variance it explains gone."""
    from dynmerge_server.experiments.report.compare import compare

    rng = np.random.default_rng(8)
    wrong, removed = [], []
    for _ in range(200):
        before = rng.normal(5, 1, (2, 300))
        now = before + rng.normal(0, 0.5, (2, 300))
        before[:, :50] = np.nan
        pair = [sample(now[arm], before[arm], 5.0) for arm in (0, 1)]
        found = compare("b", pair[0], pair[1], 0.05)
        assert found.fixed_p is not None
        assert found.variance_removed is not None
        wrong.append(found.fixed_p < 0.05)
        removed.append(found.variance_removed)
    print(f"wrong {np.mean(wrong):.3f}, variance removed {np.mean(removed):.3f}")
    assert np.mean(wrong) == pytest.approx(0.05, abs=0.045)
    assert 0.5 < np.mean(removed) < 0.8
