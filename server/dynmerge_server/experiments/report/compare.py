"""Compare: metrics between arms: means, differences, and intervals of both kinds.

Libraries do the statistics but for the sequence. Pure; knows no log.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import exp, log

from scipy import stats
from statsmodels.stats.proportion import proportion_confint
from tea_tasting.aggr import Aggregates
from tea_tasting.experiment import ExperimentResult
from tea_tasting.metrics import Mean
from tea_tasting.metrics.mean import MeanResult
from tea_tasting.multiplicity import adjust_fwer

from dynmerge_server.experiments.report.results import (
    ArmMean,
    Comparison,
    Estimate,
    Interval,
    MetricResult,
    Role,
)
from dynmerge_server.experiments.report.samples import Sample, samples, too_few
from dynmerge_server.experiments.report.sequence import half_width, p_value
from dynmerge_server.experiments.report.table import Column, Table

MIN_BEFORE = 100  # units of two arms with a time before, for it to be taken into account
FAR = 3.0  # standard errors that a mean is above 0 for a ratio to it to mean anything
FINEST = 1e9  # and beyond which a ratio has no digits left for its interval
LEAST_LEFT = 1e-9  # of the variance, for the time before to have explained the rest
ONE_ERROR = 2 * float(stats.norm.cdf(1)) - 1  # of a normal distribution, within a standard error

Pair = tuple[Sample, Sample]  # the control, and another arm


def primary_result(table: Table, column: Column, alpha: float) -> MetricResult:
    """The primary metric: all its sequences together are wrong at most `alpha` of the time."""
    others = len(table.arms) - 1
    return _corrected(_result(table, column, "primary", alpha / others), others)


def exploratory_results(
    table: Table, columns: Sequence[Column], alpha: float
) -> tuple[MetricResult, ...]:
    """Other metrics: so are the sequences of all of them, and their adjusted p-values (Holm)."""
    shared = (len(table.arms) - 1) * max(len(columns), 1)
    results = [_result(table, column, "exploratory", alpha / shared) for column in columns]
    return tuple(_corrected(each, shared) for each in adjusted(results))


def compare(name: str, control: Sample | None, arm: Sample | None, alpha: float) -> Comparison:
    """An arm against the control, each interval wrong at most `alpha` of the time.

    Its p-values are of one comparison alone.
    """
    units = sum(each.units for each in (control, arm) if each)
    why = too_few((control, arm))
    if control is None or arm is None or control.variance + arm.variance == 0:
        return Comparison(name, units, why or "all units have the same number")
    pair = control, arm
    covariate = _covariate(pair)
    found, error = _absolute(pair, covariate, alpha)
    raw = control.error**2 + arm.error**2
    return Comparison(
        name,
        units,
        why,
        _estimate(found, error, units, alpha),
        _relative(pair, covariate, units, alpha),
        found.pvalue,
        sequence_p=float(p_value(found.effect_size, error, float(units), alpha)),
        variance_removed=1 - error**2 / raw if covariate else None,
    )


def difference(control: Sample | None, arm: Sample | None, alpha: float) -> Estimate | None:
    """The difference alone; None where there are too few units."""
    if control is None or arm is None or too_few((control, arm)):
        return None
    pair = control, arm
    found, error = _absolute(pair, _covariate(pair), alpha)
    return _estimate(found, error, control.units + arm.units, alpha)


def adjusted(results: Sequence[MetricResult]) -> tuple[MetricResult, ...]:
    """The same with p-values by Holm over all that are there."""
    raw = {
        f"{each.arm} {result.name}": {"pvalue": each.fixed_p}
        for result in results
        for each in result.comparisons
        if each.fixed_p is not None
    }
    # Whatever metrics have to do with each other: Bonferroni's in steps down, which is Holm's.
    found = adjust_fwer(ExperimentResult(raw), arbitrary_dependence=True, method="bonferroni")
    by_name = {name: each["pvalue_adj"] for tests in found.values() for name, each in tests.items()}
    return tuple(
        replace(
            result,
            comparisons=tuple(
                replace(each, adjusted_p=by_name.get(f"{each.arm} {result.name}"))
                for each in result.comparisons
            ),
        )
        for result in results
    )


def _corrected(result: MetricResult, shared: int) -> MetricResult:
    """With p-values below all of alpha where intervals, each at a part of it, exclude 0.

    None where there are too few units for any to hold.
    """

    def times(p: float | None, comparison: Comparison) -> float | None:
        return None if p is None or comparison.too_few else min(shared * p, 1.0)

    return replace(
        result,
        comparisons=tuple(
            replace(
                each,
                fixed_p=times(each.fixed_p, each),
                adjusted_p=None if each.too_few else each.adjusted_p,
                sequence_p=times(each.sequence_p, each),
            )
            for each in result.comparisons
        ),
    )


def _result(table: Table, column: Column, role: Role, alpha: float) -> MetricResult:
    arms = samples(table, column)
    there = [each for each in arms if each is not None]
    rate = bool(there) and all(each.rate for each in there)
    others = [index for index in range(len(arms)) if index != table.control]
    return MetricResult(
        column.metric.name,
        role,
        column.metric.better,
        rate,
        alpha,
        tuple(_mean(table, column, index, arms[index], rate, alpha) for index in range(len(arms))),
        tuple(compare(table.arms[i], arms[table.control], arms[i], alpha) for i in others),
        _trouble(column),
    )


def _trouble(column: Column) -> str | None:
    if not column.words or column.answered.any():
        return None
    return f"{column.metric.outcome} has words as values; a metric needs numbers or booleans"


def _mean(
    table: Table, column: Column, index: int, found: Sample | None, rate: bool, alpha: float
) -> ArmMean:
    answered = column.answered[table.arm == index]
    share = float(answered.mean()) if len(answered) else 0.0
    name = table.arms[index]
    if found is None:
        return ArmMean(name, 0, share, None, None)
    if rate:
        low, high = proportion_confint(
            round(found.mean * found.units), found.units, alpha, method="wilson"
        )
    else:
        width = found.error * float(stats.t.isf(alpha / 2, found.units - 1))
        low, high = found.mean - width, found.mean + width
    return ArmMean(name, found.units, share, found.mean, Interval(float(low), float(high)))


def _covariate(pair: Pair) -> str | None:
    """What the time before is called where it is of use: known of many, and not the same again."""
    enough = sum(each.with_before for each in pair) >= MIN_BEFORE
    before = sum(each.data.var("before") for each in pair)
    if not enough or not before:
        return None
    slope = sum(each.data.cov("now", "before") for each in pair) / before
    left = sum(each.variance for each in pair) - slope**2 * before
    return "before" if left > LEAST_LEFT * sum(each.variance for each in pair) else None


def _absolute(pair: Pair, covariate: str | None, alpha: float) -> tuple[MeanResult, float]:
    """The difference by Welch's test, and its standard error.

    Both means are moved to somewhat above 0, as tea-tasting divides by them; a difference stays,
    and so do its digits where means are large beside it.
    """
    control, arm = pair
    apart = abs(arm.mean - control.mean) + sum(each.variance**0.5 for each in pair)
    lift = 3 * apart - control.mean
    lifted = [_lifted(each.data, lift) for each in pair]
    found = Mean("now", covariate, confidence_level=1 - alpha, equal_var=False, use_t=True)
    near = Mean("now", covariate, confidence_level=ONE_ERROR, equal_var=False, use_t=False)
    one = near.analyze_aggregates(*lifted)
    error = (one.effect_size_ci_upper - one.effect_size_ci_lower) / 2
    return found.analyze_aggregates(*lifted), error


def _lifted(data: Aggregates, lift: float) -> Aggregates:
    means = {**data.mean_, "now": data.mean("now") + lift}
    return Aggregates(data.count(), means, data.var_, data.cov_)


def _estimate(found: MeanResult, error: float, units: int, alpha: float) -> Estimate:
    value = found.effect_size
    width = float(half_width(error, float(units), alpha))
    fixed = Interval(found.effect_size_ci_lower, found.effect_size_ci_upper)
    return Estimate(value, fixed, Interval(value - width, value + width))


def _relative(pair: Pair, covariate: str | None, units: int, alpha: float) -> Estimate | None:
    """On the logarithm of the ratio, for both intervals."""
    if any(not FAR * each.error < each.mean < FINEST * each.error for each in pair):
        return None
    data = [each.data for each in pair]
    found = Mean("now", covariate, confidence_level=1 - alpha, equal_var=False, use_t=True)
    near = Mean("now", covariate, confidence_level=ONE_ERROR, equal_var=False, use_t=False)
    ratio, one = found.analyze_aggregates(*data), near.analyze_aggregates(*data)
    value = ratio.rel_effect_size
    error = log((1 + one.rel_effect_size_ci_upper) / (1 + value))
    wide = exp(half_width(error, float(units), alpha))
    return Estimate(
        value,
        Interval(ratio.rel_effect_size_ci_lower, ratio.rel_effect_size_ci_upper),
        Interval((1 + value) / wide - 1, (1 + value) * wide - 1),
    )
