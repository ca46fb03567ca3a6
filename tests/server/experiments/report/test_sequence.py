"""The confidence sequence against published figures, and against what it promises."""

from math import sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from dynmerge_server.experiments.report.sequence import (
    half_width,
    one_sided_width,
    p_value,
)

# Computed with gbstats 0.8.0: SequentialTwoSidedTTest on two statistics, absolute difference.
# alpha, units of each arm, difference, its variance, both ends, p-value.
GBSTATS = [
    (0.05, (1000, 1000), 0.03, 0.0002031, -0.014517962102267787, 0.07451796210226778,
     0.37893150758579747),
    (0.01, (700, 300), 60 / 300 - 100 / 700, 0.0007082604470359573, -0.04564581361326521,
     0.15993152789897952, 0.3641938616837977),
    (0.05, (20000, 20000), 0.01, 9.395e-06, 0.00015433015487477213, 0.019845669845125216,
     0.04258703044650978),
    (0.05, (400, 350), 0.6, 0.03191618013515163, -0.030799520383413603, 1.230799520383413,
     0.0690458739489006),
]  # fmt: skip

levels = st.floats(1e-6, 0.4)
errors = st.floats(1e-6, 1e6)
numbers = st.integers(2, 10**8)


@pytest.mark.parametrize(("alpha", "units", "gap", "variance", "low", "high", "p"), GBSTATS)
def test_the_sequence_is_that_of_gbstats(
    alpha: float,
    units: tuple[int, int],
    gap: float,
    variance: float,
    low: float,
    high: float,
    p: float,
) -> None:
    error, n = sqrt(variance), float(sum(units))
    width = half_width(error, n, alpha)
    assert (gap - width, gap + width) == pytest.approx((low, high))
    assert p_value(gap, error, n, alpha) == pytest.approx(p)


@given(errors, numbers, levels)
def test_it_is_wider_than_an_interval_for_one_look(error: float, n: int, alpha: float) -> None:
    assert half_width(error, float(n), alpha) > norm.isf(alpha / 2) * error
    assert one_sided_width(error, float(n), alpha) > norm.isf(alpha) * error


@given(numbers, numbers, levels)
def test_it_narrows_as_units_come(n: int, more: int, alpha: float) -> None:
    few, many = float(n), float(n + more)
    assert half_width(1 / sqrt(many), many, alpha) < half_width(1 / sqrt(few), few, alpha)
    assert one_sided_width(1 / sqrt(many), many, alpha) < one_sided_width(1 / sqrt(few), few, alpha)


@given(st.floats(-1e3, 1e3), st.floats(0.1, 100), numbers, levels)
def test_p_is_below_alpha_where_the_interval_excludes_0(
    gap: float, error: float, n: int, alpha: float
) -> None:
    excludes = abs(gap) / half_width(error, float(n), alpha)
    if abs(excludes - 1) > 1e-6:
        assert (p_value(gap, error, float(n), alpha) < alpha) == (excludes > 1)


@given(errors, st.integers(100, 10**8), st.floats(1e-6, 0.05))
def test_a_bound_on_one_side_is_nearer_than_an_interval_on_both(
    error: float, n: int, alpha: float
) -> None:
    assert one_sided_width(error, float(n), alpha) < half_width(error, float(n), alpha)


def test_numbers_and_arrays_are_treated_alike() -> None:
    n = np.array([100.0, 1000.0])
    found = half_width(1 / np.sqrt(n), n, 0.05)
    assert found == pytest.approx([half_width(1 / sqrt(each), each, 0.05) for each in n])
