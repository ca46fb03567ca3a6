"""Numbers at the ends of what a log can hold: still right, or said to be unknown."""

import numpy as np
import pytest
from scipy import stats

from dynmerge_server.experiments.report.compare import compare
from dynmerge_server.experiments.report.samples import LARGEST, sample

NOTHING = np.full(500, np.nan)
RNG = np.random.default_rng(1)


def test_units_that_answer_as_they_did_before_are_compared_without_the_time_before() -> None:
    now = RNG.normal(0, 1, (2, 300)) + np.array([[0], [1.0]])
    found = compare("B", *(sample(each, each, 0.0) for each in now), 0.05)
    assert found.variance_removed is None
    assert found.difference is not None
    welch = stats.ttest_ind(now[1], now[0], equal_var=False).confidence_interval()
    assert found.difference.fixed.low == pytest.approx(welch.low)
    assert found.difference.fixed.high == pytest.approx(welch.high)


@pytest.mark.parametrize("size", [0.0, 1e9, 1e12, -1e12])
def test_a_difference_keeps_its_digits_beside_large_means(size: float) -> None:
    now = np.round(RNG.normal(0, 1, (2, 500)), 2) + size
    now[1] += 1.25
    found = compare("B", *(sample(each, NOTHING, 0.0) for each in now), 0.05)
    assert found.difference is not None
    near = now - size
    welch = stats.ttest_ind(near[1], near[0], equal_var=False).confidence_interval()
    assert found.difference.value == pytest.approx(near[1].mean() - near[0].mean(), abs=1e-3)
    assert found.difference.fixed.low == pytest.approx(welch.low, abs=1e-3)
    assert found.difference.fixed.high == pytest.approx(welch.high, abs=1e-3)


def test_numbers_too_large_to_multiply_are_unknown() -> None:
    now = RNG.normal(0, 1, (2, 500)) * LARGEST
    found = compare("B", *(sample(each, NOTHING, 0.0) for each in now), 0.05)
    assert found.difference is None
    assert found.too_few is not None
    now = np.clip(now, -LARGEST, LARGEST)
    assert compare("B", *(sample(each, NOTHING, 0.0) for each in now), 0.05).difference is not None
