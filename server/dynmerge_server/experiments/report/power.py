"""Power: what a run of a planned size can find, by the test at its end and by the sequence there.

A sequence that is looked at before may find it earlier: it finds at least as much. Pure.
"""

from dataclasses import dataclass
from math import sqrt

from scipy.optimize import brentq
from scipy.stats import norm
from tea_tasting.aggr import Aggregates
from tea_tasting.metrics import Mean
from tea_tasting.metrics.mean import MeanPowerResult

from dynmerge_server.experiments.report.results import Power
from dynmerge_server.experiments.report.sequence import half_width


@dataclass(frozen=True, slots=True)
class Run:
    """A run as planned: units of the control and of an arm, and the variance between units."""

    control: float
    arm: float
    variance: float
    alpha: float

    @property
    def units(self) -> int:
        """Of both."""
        return round(self.control + self.arm)

    @property
    def error(self) -> float:
        """The standard error that the difference will have."""
        return sqrt(self.variance / self.control + self.variance / self.arm)

    @property
    def wide(self) -> float:
        """How many of those the sequence reaches to either side."""
        return float(half_width(1.0, self.control + self.arm, self.alpha))


def plan(
    arm: str, run: Run, baseline: float, power: float, effect: float | None, planned: bool
) -> Power:
    """What the run finds: differences with this power, and this difference with which power."""
    return Power(
        arm,
        run.units,
        planned,
        baseline,
        run.alpha,
        power,
        fixed_effect(run, power),
        sequence_effect(run, power),
        effect,
        None if effect is None else fixed_power(run, effect),
        None if effect is None else sequence_power(run, effect),
    )


def fixed_power(run: Run, effect: float) -> float:
    """Of Welch's test at the end to find `effect`."""
    found = _solved(run, "power", effect_size=effect)
    return float(found.power)


def fixed_effect(run: Run, power: float) -> float:
    """The smallest difference that Welch's test finds with this power."""
    found = _solved(run, "effect_size", power=power)
    return float(found.effect_size)


def sequence_power(run: Run, effect: float) -> float:
    """Of the sequence to exclude 0 at the end."""
    shift = abs(effect) / run.error
    return float(norm.sf(run.wide - shift) + norm.cdf(-run.wide - shift))


def sequence_effect(run: Run, power: float) -> float:
    """The smallest difference that the sequence finds by the end with this power."""
    most = run.error * (run.wide + norm.isf(1e-9))
    return float(brentq(lambda effect: sequence_power(run, effect) - power, 0.0, most))


def _solved(run: Run, parameter: str, **given: float) -> MeanPowerResult:
    test = Mean("now", alpha=run.alpha, ratio=run.arm / run.control, n_obs=run.units, **given)
    # Of the data it takes the variance; the rest is not used, though asked for.
    data = Aggregates(run.units, {"now": 1.0}, {"now": run.variance})
    return test.solve_power_from_aggregates(data, parameter)[0]
