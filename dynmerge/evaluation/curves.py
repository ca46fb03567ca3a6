"""Draw an evaluation: what preferences do to each skill, and which merges no other one beats."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from math import ceil, isfinite

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from dynmerge.bank.plot import INK, MUTED
from dynmerge.evaluation.bootstrap import Interval
from dynmerge.evaluation.results import MergeEntry, Results

COLUMNS = 3
PANEL = (4.2, 3.4)  # inches
PAIRED_UP_TO = 4  # skills, beyond which pairs of them are too many panels
MARKERS = "osD^vP*X"

Point = tuple[Interval, Interval]


def draw_curves(results: Results) -> Figure:
    """By skill: its normalised accuracy over its share of the preference, a line per method.

    Merges by raw weights have no share, and are left out.
    """
    figure, panels = _panels(len(results.tasks), "share of the preference")
    for panel, (skill, axes) in enumerate(zip(results.tasks, panels, strict=False)):
        for look, (method, merges) in enumerate(_by_method(results).items()):
            points = sorted(
                (
                    (merge.shares.get(skill, 0.0), merge.skills[skill].normalised)
                    for merge in merges
                    if merge.shares is not None
                ),
                key=lambda point: point[0],
            )
            _draw_curve(axes, points, method, look)
        axes.axhline(1, color=MUTED, linewidth=0.8, linestyle=":")
        axes.set_xlim(-0.04, 1.04)
        _title(axes, f"{skill}: accuracy over its own adapter's")
        if panel == 0:
            axes.legend(fontsize=8, frameon=False)
    return figure


def draw_front(results: Results) -> Figure:
    """Merges as points, for each pair of skills; for more than a few, the worst over the mean.

    Filled: on the Pareto front over all skills.
    """
    skills = list(results.tasks)
    paired = 2 <= len(skills) <= PAIRED_UP_TO
    pairs = list(combinations(skills, 2)) if paired else [("mean of skills", "worst skill")]
    figure, panels = _panels(len(pairs), "")
    for panel, ((across, up), axes) in enumerate(zip(pairs, panels, strict=False)):
        for look, (method, merges) in enumerate(_by_method(results).items()):
            points = [
                _of_skills(merge, across, up) if paired else _of_all(merge) for merge in merges
            ]
            _draw_points(axes, points, [merge.on_front for merge in merges], method, look)
        axes.axhline(1, color=MUTED, linewidth=0.8, linestyle=":")
        axes.axvline(1, color=MUTED, linewidth=0.8, linestyle=":")
        axes.set_xlabel(across, fontsize=9, color=INK)
        axes.set_ylabel(up, fontsize=9, color=INK)
        if panel == 0:
            _title(axes, "Accuracy over own adapters'; filled: Pareto front")
            axes.legend(fontsize=8, frameon=False)
    return figure


def _draw_curve(
    axes: Axes, points: Sequence[tuple[float, Interval]], method: str, look: int
) -> None:
    """Every merge with its interval; a line through the means at equal shares."""
    finite = [(share, found) for share, found in points if isfinite(found.value)]
    by_share: dict[float, list[float]] = {}
    for share, found in finite:
        by_share.setdefault(share, []).append(found.value)
    means = [sum(values) / len(values) for values in by_share.values()]
    color = _color(look)
    axes.plot(list(by_share), means, color=color, linewidth=1.2, label=method)
    shift = 0.006 * look  # so that the methods' intervals do not hide each other
    for share, found in finite:
        axes.errorbar(
            share + shift,
            found.value,
            yerr=[[_reach(found.value - found.low)], [_reach(found.high - found.value)]],
            color=color,
            marker=_marker(look),
            markersize=4,
            linewidth=0.7,
        )


def _draw_points(
    axes: Axes, points: Sequence[Point], front: Sequence[bool], method: str, look: int
) -> None:
    color = _color(look)
    for label, filled in ((method, True), (None, False)):
        chosen = [point for point, best in zip(points, front, strict=True) if best is filled]
        x, y = ([pair[side].value for pair in chosen] for side in (0, 1))
        axes.plot(
            x,
            y,
            linestyle="none",
            marker=_marker(look),
            markersize=6,
            color=color,
            markerfacecolor=color if filled else "none",
            label=label,
        )
    for across, up in points:
        axes.plot([across.low, across.high], [up.value] * 2, color=color, linewidth=0.5, alpha=0.5)
        axes.plot([across.value] * 2, [up.low, up.high], color=color, linewidth=0.5, alpha=0.5)


def _reach(length: float) -> float:
    return max(length, 0.0) if isfinite(length) else 0.0


def _of_skills(merge: MergeEntry, across: str, up: str) -> Point:
    return merge.skills[across].normalised, merge.skills[up].normalised


def _of_all(merge: MergeEntry) -> Point:
    return merge.average, min(
        (skill.normalised for skill in merge.skills.values()), key=lambda found: found.value
    )


def _by_method(results: Results) -> Mapping[str, list[MergeEntry]]:
    groups: dict[str, list[MergeEntry]] = {}
    for merge in results.merges:
        groups.setdefault(merge.method, []).append(merge)
    return groups


def _panels(count: int, below: str) -> tuple[Figure, list[Axes]]:
    """A figure that belongs to no window, and its panels."""
    columns = min(count, COLUMNS)
    rows = ceil(count / columns)
    figure = Figure(
        figsize=(max(PANEL[0] * columns, 6.0), PANEL[1] * rows),
        layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1),
    )
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in panels[count:]:
        spare.axis("off")
    for axes in panels[:count]:
        axes.tick_params(length=0, labelsize=8)
        axes.set_xlabel(below, fontsize=8, color=MUTED)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure, panels[:count]


def _color(look: int) -> object:
    return mpl.colormaps["tab10"](look % 10)


def _marker(look: int) -> str:
    return MARKERS[look % len(MARKERS)]


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=10, color=INK, loc="left")
