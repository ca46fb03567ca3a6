"""Words: a report's numbers as people read them, the same in a terminal and on a page."""

from datetime import datetime, timezone

from dynmerge_server.experiments.report.results import (
    Comparison,
    Estimate,
    Interval,
    MetricResult,
    Pairs,
    Power,
    SampleRatio,
)

NOTHING = "-"


def plain(text: str) -> str:
    """`text` without what a terminal or a browser would obey instead of show."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def when(time: float) -> str:
    """A time in UTC, to the minute."""
    return datetime.fromtimestamp(time, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def number(value: float | None, rate: bool) -> str:
    """A mean: of a rate in per cent."""
    if value is None:
        return NOTHING
    return f"{value:.2%}" if rate else f"{value:.4g}"


def gap(value: float | None, rate: bool) -> str:
    """A difference: of rates in points, the hundredth part of 1."""
    if value is None:
        return NOTHING
    return f"{100 * value:+.2f} points" if rate else f"{value:+.4g}"


def span(interval: Interval | None, rate: bool) -> str:
    """Both ends of an interval, a rate's in points."""
    if interval is None:
        return NOTHING
    ends = (interval.low, interval.high)
    shown = [NOTHING if end is None else _end(end, rate) for end in ends]
    return f"[{shown[0]}, {shown[1]}]"


def percents(estimate: Estimate | None) -> str:
    """A relative difference with the interval of its sequence."""
    if estimate is None:
        return NOTHING
    return f"{estimate.value:+.2%} {span(estimate.sequence, True)} %"


def tests(comparison: Comparison, rate: bool) -> tuple[str, str, str, str, str]:
    """The sequence and its p, the fixed interval and its p, and the relative difference.

    Where there are too few units nothing but the fixed interval is shown, which decides nothing.
    """
    found = comparison.difference
    if found is None:
        return (NOTHING,) * 5
    if comparison.too_few:
        return NOTHING, NOTHING, span(found.fixed, rate), NOTHING, NOTHING
    fixed_p = comparison.fixed_p if comparison.adjusted_p is None else comparison.adjusted_p
    return (
        span(found.sequence, rate),
        p(comparison.sequence_p),
        span(found.fixed, rate),
        p(fixed_p),
        percents(comparison.relative),
    )


def corrected(metric: MetricResult) -> str:
    """What intervals and p-values allow for, in a sentence."""
    shared = "all arms" if metric.role == "primary" else "all exploratory metrics and arms"
    return (
        f"Each interval holds with {level(metric)}, so that those of {shared} together hold as the "
        "experiment asks; p-values allow for that and are to be compared with its alpha."
    )


def p(value: float | None) -> str:
    """A p-value."""
    if value is None:
        return NOTHING
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}"


def share(value: float | None) -> str:
    """A share in per cent."""
    return NOTHING if value is None else f"{value:.1%}"


def level(metric: MetricResult) -> str:
    """How sure the metric's intervals are."""
    return f"{1 - metric.alpha:.4g}"


def ratio(found: SampleRatio) -> str:
    """Whether units are as the weights promise, in a sentence."""
    if found.p is None:
        return "Sample ratio: nothing to test yet."
    told = "MISMATCH" if found.red else "as the weights say"
    return f"Sample ratio: {told} (chi-square, p {p(found.p)})."


def remark(comparison: Comparison) -> str:
    """What else there is to say of a comparison."""
    said = [comparison.too_few] if comparison.too_few else []
    if comparison.variance_removed is not None:
        said.append(f"{comparison.variance_removed:.0%} of the variance removed by the time before")
    return "; ".join(said)


def power(found: Power, rate: bool) -> str:
    """What a run finds, in a sentence."""
    run = "The planned run" if found.planned else "A run as large as this one"
    told = (
        f"{run} of {found.units} units finds, in {found.arm}, a difference of "
        f"{gap(found.smallest_fixed, rate)} by one look at its end and of "
        f"{gap(found.smallest_sequence, rate)} by the sequence, with power {found.power:.0%}."
    )
    if found.effect is None:
        return told
    return (
        f"{told} The planned difference of {gap(found.effect, rate)} is found with power "
        f"{share(found.fixed)} and {share(found.sequence)}."
    )


def _end(value: float, rate: bool) -> str:
    return f"{100 * value:.2f}" if rate else f"{value:.4g}"


def voters(pairs: Pairs) -> str:
    """How many votes there are, and whose."""
    told = f"{pairs.votes} votes of {pairs.units} units, {pairs.ties} of them ties"
    return f"{told}; {pairs.without_unit} named no unit" if pairs.without_unit else told


def of_pairs(pairs: Pairs) -> list[str]:
    """What else there is to say of votes."""
    if pairs.trouble:
        return [f"No strengths yet: {pairs.trouble}."]
    alike = " and take votes as independent: too few units voted to know better."
    if pairs.without_unit:
        alike = " and do not allow for votes that named no unit being one person's."
    elif pairs.clustered:
        alike = ", and allow for votes of one unit being alike."
    first, ends = pairs.first_shown, pairs.first_shown_interval
    return [
        f"Of equals, the first shown wins {share(first)} of the time, {span(ends, True)} %.",
        f"Strengths are log-odds against the control; intervals hold for one look{alike}",
    ]
