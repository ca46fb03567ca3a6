"""Samples: the units of one arm, added up: all that comparisons need of them. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tea_tasting.aggr import Aggregates

from dynmerge_server.experiments.report.source import Floats
from dynmerge_server.experiments.report.table import Column, Table

MIN_UNITS = 100  # of an arm, before what holds of large numbers is taken to hold
LARGEST = 1e50  # numbers beyond which products of them have no end
MIN_EACH = 5  # units with 0 and with 1, of an arm and a rate


@dataclass(frozen=True, slots=True)
class Sample:
    """One arm's numbers of one metric."""

    data: Aggregates  # of `now`, and of `before`
    rate: bool  # all are 0 or 1
    with_before: int

    @property
    def units(self) -> int:
        """How many."""
        return int(self.data.count())

    @property
    def mean(self) -> float:
        """Of all units."""
        return float(self.data.mean("now"))

    @property
    def variance(self) -> float:
        """Between units."""
        return float(self.data.var("now"))

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        return float(np.sqrt(self.variance / self.units))

    @property
    def rarer(self) -> int:
        """Of a rate: how many units have the number, 0 or 1, that fewer have."""
        ones = round(self.mean * self.units)
        return min(ones, self.units - ones)


def sample(now: Floats, before: Floats, usual: float) -> Sample | None:
    """Add up an arm's units. One without a time before is taken to have had the `usual` one.

    None where fewer than 2 have a number, or the numbers are too large to be added.
    """
    there = ~np.isnan(now)
    now, before = now[there], before[there]
    filled = np.where(np.isnan(before), usual, before)
    if len(now) < 2 or max(np.abs(now).max(), np.abs(filled).max()) > LARGEST:
        return None
    means, spread = (float(now.mean()), float(filled.mean())), np.cov(now, filled)
    data = Aggregates(
        len(now),
        {"now": means[0], "before": means[1]},
        {"now": float(spread[0, 0]), "before": float(spread[1, 1])},
        {("now", "before"): float(spread[0, 1])},
    )
    return Sample(data, bool(np.all((now == 0) | (now == 1))), int(np.sum(~np.isnan(before))))


def samples(table: Table, column: Column, units: int | None = None) -> tuple[Sample | None, ...]:
    """Each arm's, of the first `units` that came."""
    arm, now, before = table.arm[:units], column.now[:units], column.before[:units]
    known = before[~np.isnan(before)]
    with np.errstate(over="ignore"):
        usual = float(known.mean()) if len(known) else 0.0
    chosen = [arm == index for index in range(len(table.arms))]
    return tuple(sample(now[each], before[each], usual) for each in chosen)


def too_few(pair: Sequence[Sample | None]) -> str | None:
    """Why nothing can be said of these yet."""
    there = [each for each in pair if each is not None]
    if len(there) < len(pair):
        return "fewer than 2 units of an arm have this metric, or its numbers are too large to add"
    least = min(each.units for each in there)
    if least < MIN_UNITS:
        return f"{least} units of an arm have this metric, and {MIN_UNITS} are needed"
    if all(each.rate for each in there) and (rarer := min(each.rarer for each in there)) < MIN_EACH:
        return f"{rarer} units of an arm differ from its others, and {MIN_EACH} have to"
    if all(each.variance == 0 for each in there):
        return "all units have the same number"
    return None
