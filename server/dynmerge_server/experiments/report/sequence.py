"""The asymptotic confidence sequence: intervals and p-values that hold at every look, however many.

Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas 2023 (arXiv:2103.06476), with the tuning that
GrowthBook's gbstats has. Numbers or arrays alike. Pure; knows no experiments and no log.
"""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Numbers = TypeVar("Numbers", float, NDArray[np.float64])

TIGHTEST_AT = 5000  # units, of all that are compared; N* in the paper


def rho(alpha: float) -> float:
    """The width of the mixture that is tightest at TIGHTEST_AT units (eq. 161)."""
    doubt = -2 * np.log(alpha)
    return float(np.sqrt((doubt + np.log(1 + doubt)) / TIGHTEST_AT))


def half_width(error: Numbers, units: Numbers, alpha: float) -> Numbers:
    """From the estimate to either end of its interval (eq. 9).

    `error` is the estimate's standard error, `units` how many it is of, in all arms together.
    """
    grown = units * rho(alpha) ** 2 + 1
    doubt = np.log(np.sqrt(grown) / alpha)
    return error * np.sqrt(2 * grown * doubt / (units * rho(alpha) ** 2))  # type: ignore[no-any-return]


def one_sided_width(error: Numbers, units: Numbers, alpha: float) -> Numbers:
    """From the estimate to a bound on one side only, which is nearer (the paper's appendix B.1)."""
    squared = rho(2 * alpha) ** 2
    grown = units * squared + 1
    doubt = np.log(1 + np.sqrt(grown) / (2 * alpha))
    return error * np.sqrt(2 * grown * doubt / (units * squared))  # type: ignore[no-any-return]


def p_value(estimate: Numbers, error: Numbers, units: Numbers, alpha: float) -> Numbers:
    """Of no difference, valid at every look (eq. 155); below `alpha` if the interval excludes 0."""
    squared = rho(alpha) ** 2
    grown = units * squared + 1
    evidence = units * squared * (estimate / error) ** 2 / (2 * grown)
    return np.exp(np.minimum(np.log(grown) / 2 - evidence, 0.0))  # type: ignore[no-any-return]
