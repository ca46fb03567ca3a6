"""Plots: a report's pictures as SVG that goes inside a page and takes its colours.

Only names of arms and numbers are in them, which no markup can hide in.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import StringIO
from threading import Lock

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from dynmerge_server.experiments.report import words
from dynmerge_server.experiments.report.report import Report
from dynmerge_server.experiments.report.results import Estimate, Interval, Look, MetricResult

SIZE = (5.2, 2.9)  # inches: text stays legible on a phone
# Drawn in these, which the page's own colours then replace.
INK, SOFT = "#010203", "#040506"
COLORS = {INK: "var(--ink)", SOFT: "var(--soft)"}
ARMS = ("#3b82c4", "#d1702f", "#3a9e6e", "#b05fb0", "#a08a2c", "#c94f5d")
LINES = ("-", "--", ":", "-.")
SPANS = (("days", 86_400.0), ("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))
MOST_ARMS = 6  # whose differences are drawn
NAMESPACES = (
    'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" version="1.1"'
)
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))

_settings = Lock()  # matplotlib's are global


@dataclass(frozen=True, slots=True)
class Plot:
    """A picture, what it shows, and the same in words."""

    title: str
    alt: str
    svg: str


def plots(report: Report) -> list[Plot]:
    """All pictures for which there are numbers."""
    primary = report.metrics[0] if report.metrics and report.metrics[0].role == "primary" else None
    others = [arm for arm in report.arms if arm != report.control]
    made = []
    if primary is not None:
        for index, arm in enumerate(others[:MOST_ARMS]):
            found = [look.differences[index] for look in report.looks]
            if any(found):
                made.append(_difference(report, arm, found, primary.rate))
        if any(each.interval for each in primary.arms):
            made.append(_means(primary))
    if report.looks:
        made.append(_units(report))
    return made


def _difference(report: Report, arm: str, found: Sequence[Estimate | None], rate: bool) -> Plot:
    times, unit = _elapsed(report.looks)
    kept = [(time, each) for time, each in zip(times, found, strict=True) if each]
    last = kept[-1][1]

    def draw(axes: Axes) -> None:
        scale = 100 if rate else 1
        at = [time for time, _ in kept]
        for kind, alpha in (("sequence", 0.2), ("fixed", 0.3)):
            low, high = zip(*(_ends(getattr(each, kind), scale) for _, each in kept), strict=True)
            axes.fill_between(at, low, high, color=ARMS[0], alpha=alpha, linewidth=0, label=kind)
        axes.plot(at, [scale * each.value for _, each in kept], color=ARMS[0], marker=".")
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_xlabel(f"{unit} since the first request")
        axes.set_ylabel("points" if rate else "difference")
        axes.legend(frameon=False, labelcolor=INK, fontsize=8)

    alt = (
        f"Difference of {arm} to {report.control} over {len(kept)} looks; at the last one "
        f"{words.gap(last.value, rate)}, by the sequence {words.span(last.sequence, rate)}, by the "
        f"fixed interval {words.span(last.fixed, rate)}."
    )
    return Plot(f"{arm} against {report.control}, over time", alt, _svg(draw, f"difference-{arm}"))


def _means(metric: MetricResult) -> Plot:
    shown = [each for each in metric.arms if each.mean is not None and each.interval]

    def draw(axes: Axes) -> None:
        scale = 100 if metric.rate else 1
        for place, each in enumerate(shown):
            assert each.mean is not None  # chosen so
            assert each.interval is not None
            low, high = _ends(each.interval, scale)
            axes.plot([low, high], [place, place], color=ARMS[place % len(ARMS)], linewidth=2)
            axes.plot([scale * each.mean], [place], "o", color=ARMS[place % len(ARMS)])
        axes.set_yticks(range(len(shown)), [each.arm for each in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlabel("%" if metric.rate else "mean")

    told = "; ".join(f"{each.arm} {words.number(each.mean, metric.rate)}" for each in shown)
    return Plot("Means, with fixed intervals", f"Means by arm: {told}.", _svg(draw, "means"))


def _units(report: Report) -> Plot:
    times, unit = _elapsed(report.looks)

    def draw(axes: Axes) -> None:
        for index, arm in enumerate(report.arms):
            axes.plot(
                times,
                [look.units[index] for look in report.looks],
                color=ARMS[index % len(ARMS)],
                linestyle=LINES[index // len(ARMS) % len(LINES)],
                label=arm,
            )
        axes.set_ylim(bottom=0)
        axes.set_xlabel(f"{unit} since the first request")
        axes.set_ylabel("units")
        if len(report.arms) <= MOST_ARMS:
            axes.legend(frameon=False, labelcolor=INK, fontsize=8)

    told = "; ".join(f"{a} {n}" for a, n in zip(report.arms, report.units, strict=True))
    return Plot(
        "Units over time", f"Units that had come, by arm; at last {told}.", _svg(draw, "units")
    )


def _elapsed(looks: Sequence[Look]) -> tuple[list[float], str]:
    """Times since the first request, in the unit that suits them."""
    begun = looks[0].time
    whole = looks[-1].time - begun
    unit, seconds = next((each for each in SPANS if whole >= 2 * each[1]), SPANS[-1])
    return [(look.time - begun) / seconds for look in looks], unit


def _ends(interval: Interval, scale: float) -> tuple[float, float]:
    assert interval.low is not None  # of an estimate, both ends are known
    assert interval.high is not None
    return scale * interval.low, scale * interval.high


def _svg(draw: Callable[[Axes], None], name: str) -> str:
    """What `draw` makes, as an element whose names no other picture of the page has."""
    with _settings, mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure = Figure(figsize=SIZE, layout=ConstrainedLayoutEngine())
        axes = figure.add_subplot()
        draw(axes)
        _tidy(axes)
        drawn = StringIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata=NO_METADATA)
    svg = drawn.getvalue()
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None  # matplotlib always writes one
    inside = svg[svg.index(">", box.end()) + 1 :]
    svg = f'<svg {box[0]} {NAMESPACES} aria-hidden="true">{inside}'
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return re.sub("|".join(COLORS), lambda found: COLORS[found[0]], svg)


def _tidy(axes: Axes) -> None:
    axes.tick_params(length=0, labelsize=8, colors=SOFT)
    axes.xaxis.label.set_color(SOFT)
    axes.yaxis.label.set_color(SOFT)
    axes.grid(color=SOFT, alpha=0.25, linewidth=0.6)
    for spine in axes.spines.values():
        spine.set_visible(False)
