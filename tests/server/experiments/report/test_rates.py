"""Bounds on rates: what they promise by simulation, and what they are by brute force."""

from math import exp, log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.integrate import quad
from scipy.special import betaln
from scipy.stats import beta

from dynmerge_server.experiments.report.rates import (
    TIGHTEST_AT,
    Rate,
    least,
    least_gap,
    most,
)

EXPERIMENTS, LOOKS, PER_LOOK = 2000, 30, 100
N = PER_LOOK * np.arange(1, LOOKS + 1)
RARE = (0.002, 0.01, 0.02)
Floats = NDArray[np.float64]
counts = st.integers(0, 400)


def cumulated(rng: np.random.Generator, rate: float, experiments: int = EXPERIMENTS) -> Floats:
    """How many are 1 at each look: (experiments, looks)."""
    ones: Floats = rng.binomial(PER_LOOK, rate, (experiments, LOOKS)).cumsum(axis=1) * 1.0
    return ones


def evidence(ones: Floats, rate: Floats | float) -> Floats:
    """The same as Rate's, of all looks at once."""
    one, zero = TIGHTEST_AT * np.asarray(rate), TIGHTEST_AT * (1 - np.asarray(rate))
    zeros = N - ones
    drawn = betaln(one + ones, zero + zeros) - betaln(one, zero)
    found: Floats = drawn - ones * np.log(rate) - zeros * np.log1p(-np.asarray(rate))
    return found


@pytest.mark.parametrize(("ones", "zeros", "rate"), [(3, 40, 0.02), (20, 20, 0.3), (0, 90, 0.01)])
def test_evidence_is_a_likelihood_ratio_averaged_over_other_rates(
    ones: int, zeros: int, rate: float
) -> None:
    def ratio(other: float) -> float:
        there = beta.pdf(other, TIGHTEST_AT * rate, TIGHTEST_AT * (1 - rate))
        return float(there * (other / rate) ** ones * ((1 - other) / (1 - rate)) ** zeros)

    expected, _ = quad(ratio, 0, 1, points=[rate, 2 * rate, 0.5], limit=200)
    assert Rate(ones, zeros).evidence(rate) == pytest.approx(log(expected), rel=1e-5)


def test_evidence_against_the_true_rate_stays_as_it_is_on_average() -> None:
    """A martingale, also for numbers between 0 and 1, for which it is at most one."""
    for chances in ({0.0: 0.7, 1.0: 0.3}, {0.0: 0.5, 0.4: 0.25, 0.8: 0.25}):
        truth = sum(number * chance for number, chance in chances.items())
        now, then = Rate(7, 30), 0.0
        for number, chance in chances.items():
            then += chance * exp(Rate(7 + number, 31 - number).evidence(truth))
        if len(chances) == 2:
            assert then == pytest.approx(exp(now.evidence(truth)))
        else:
            assert then < exp(now.evidence(truth))


@given(counts, counts.filter(bool), st.floats(1e-6, 0.2))
def test_the_rate_is_inside_and_nothing_between_the_bounds_is_refuted(
    ones: int, zeros: int, alpha: float
) -> None:
    found = Rate(ones, zeros)
    low, high = least(found, alpha), most(found, alpha)
    assert 0 <= low <= found.value <= high <= 1
    inside = [low + (high - low) * part for part in np.linspace(0.001, 0.999, 20)]
    assert all(found.evidence(rate) < -log(alpha) + 1e-6 for rate in inside)
    outside = [*np.linspace(0, low, 9)[1:-1], *np.linspace(high, 1, 9)[1:-1]]
    outside = [rate for rate in outside if 0 < rate < 1]
    assert all(found.evidence(rate) > -log(alpha) - 1e-6 for rate in outside)


@settings(deadline=None, max_examples=25)
@given(counts, counts.filter(bool), counts, counts.filter(bool), st.floats(1e-4, 0.2))
def test_the_gap_is_that_of_a_search_over_all_pairs_of_rates(
    ones: int, zeros: int, others: int, rest: int, alpha: float
) -> None:
    one, other = Rate(ones, zeros), Rate(others, rest)
    grid = np.unique(np.concatenate([np.linspace(0, 1, 301), np.logspace(-5, -2, 60)]))
    first = np.array([one.evidence(rate) for rate in grid])
    second = np.array([other.evidence(rate) for rate in grid])
    kept = first[:, None] + second[None, :] < -log(alpha)
    gaps = (grid[:, None] - grid[None, :])[kept]
    found = least_gap(one, other, alpha)
    assert found <= one.value - other.value
    if len(gaps):
        assert found == pytest.approx(gaps.min(), abs=0.01)
        assert found <= gaps.min() + 1e-9


@given(st.floats(0.01, 0.99), st.floats(100, 1e4))
def test_a_part_of_a_unit_says_less_than_a_whole_one(part: float, zeros: float) -> None:
    assert most(Rate(part, zeros), 0.05) == pytest.approx(most(Rate(1, zeros), 0.05), rel=1e-4)
    assert least(Rate(part, zeros), 0.05) == 0


@pytest.mark.parametrize("alpha", [0.05, 0.05 / 6])
@pytest.mark.parametrize("rate", [*RARE, 0.05, 0.5])
def test_a_bound_is_ever_wrong_in_alpha_at_most(rate: float, alpha: float) -> None:
    ones = cumulated(np.random.default_rng(3), rate)
    refuted = evidence(ones, rate) >= -log(alpha)
    above = (refuted & (ones / N > rate)).any(axis=1).mean()
    below = (refuted & (ones / N < rate)).any(axis=1).mean()
    print(f"rate {rate}, alpha {alpha:.4f}: above {above:.4f}, below {below:.4f}")
    assert above + below <= alpha


@pytest.mark.parametrize(("control", "gap"), [*((rate, 0.0) for rate in RARE), (0.01, 0.02)])
def test_a_bound_on_a_gap_is_ever_wrong_in_5_percent_at_most(control: float, gap: float) -> None:
    rng = np.random.default_rng(4)
    one, other = cumulated(rng, control + gap), cumulated(rng, control)
    # Refuted are all rates with this gap: those that fit best are near those that there are.
    grid = np.geomspace(control / 30, control * 30, 120)
    fits = np.min([evidence(one, rate + gap) + evidence(other, rate) for rate in grid], axis=0)
    wrong = ((fits >= -log(0.05)) & ((one - other) / N > gap)).any(axis=1).mean()
    print(f"gap {gap} on {control}: {wrong:.4f}")
    assert wrong <= 0.05


def test_a_bound_is_no_farther_than_one_that_trusts_the_variance() -> None:
    """At most a fifth, where that may be trusted."""
    from dynmerge_server.experiments.report.sequence import one_sided_width

    for units in (100, 1000, 5000, 50_000):
        found = Rate(0.3 * units, 0.7 * units)
        width = float(one_sided_width((0.21 / units) ** 0.5, float(units), 0.05))
        assert found.value - least(found, 0.05) < 1.25 * width
