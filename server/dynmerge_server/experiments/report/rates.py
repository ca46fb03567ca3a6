"""Rates: how high or low a share surely is, at every look and however rare, by no approximation.

The evidence against a rate is a likelihood ratio whose other rates are drawn from a beta
distribution around it. Where the rate is the true one it is a martingale (Robbins 1970), so that it
ever exceeds 1 / alpha with a chance of at most alpha. So it does for numbers between 0 and 1 with
that mean (Waudby-Smith and Ramdas 2024, arXiv:2010.09686). Pure, and in need of no library.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, lgamma, log

TIGHTEST_AT = 200  # units: about as many as the beta distribution counts for
STEPS = 30  # of a bisection, which leave a thousandth of a millionth
NARROWED = 26  # steps of a golden-section search, which leave a few millionths
GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True, slots=True)
class Rate:
    """A share of units, as how many are 1 and how many 0; fractions are parts of units."""

    ones: float
    zeros: float

    @property
    def value(self) -> float:
        """The share."""
        return self.ones / (self.ones + self.zeros)

    def evidence(self, rate: float) -> float:
        """Against that rate, as a logarithm. It is convex in the rate."""
        if not 0 < rate < 1:
            return inf if (self.zeros if rate >= 1 else self.ones) else 0.0
        # A part of one unit only would not be convex; as a whole it says less against any rate.
        ones, zeros = (max(each, 1.0) if each else 0.0 for each in (self.ones, self.zeros))
        one, zero = TIGHTEST_AT * rate, TIGHTEST_AT * (1 - rate)
        drawn = _log_beta(one + ones, zero + zeros) - _log_beta(one, zero)
        return drawn - ones * log(rate) - zeros * log(1 - rate)

    @property
    def turned(self) -> "Rate":
        """The share of the others."""
        return Rate(self.zeros, self.ones)


def least(found: Rate, alpha: float) -> float:
    """What the rate is not below; that is wrong at most `alpha` of the time, at every look."""
    return _edge(found.evidence, 0.0, found.value, -log(alpha))


def most(found: Rate, alpha: float) -> float:
    """What the rate is not above, in the same sense."""
    return 1 - least(found.turned, alpha)


def least_gap(one: Rate, other: Rate, alpha: float) -> float:
    """What the first rate less the second is not below, in the same sense."""

    def evidence(gap: float) -> float:
        """Against both rates, where they are those with this gap that they fit best."""
        return _lowest(
            lambda rate: one.evidence(rate + gap) + other.evidence(rate),
            max(0.0, -gap),
            min(1.0, 1.0 - gap),
        )

    return _edge(evidence, -1.0, one.value - other.value, -log(alpha))


def _edge(evidence: Callable[[float], float], low: float, high: float, enough: float) -> float:
    """The lowest of what there is not enough evidence against; from `high` down it grows."""
    if evidence(low) < enough:
        return low
    for _ in range(STEPS):
        middle = (low + high) / 2
        if evidence(middle) < enough:
            high = middle
        else:
            low = middle
    return low


def _lowest(height: Callable[[float], float], low: float, high: float) -> float:
    """The least value of a convex function, by golden-section search."""
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    at_left, at_right = height(left), height(right)
    for _ in range(NARROWED):
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - GOLDEN * (high - low)
            at_left = height(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + GOLDEN * (high - low)
            at_right = height(right)
    return min(at_left, at_right)


def _log_beta(one: float, other: float) -> float:
    return lgamma(one) + lgamma(other) - lgamma(one + other)
