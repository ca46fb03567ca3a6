"""Figures: a bank's diagnostics drawn as the papers draw theirs (Pico's and TARA's figures 2-5)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from dynmerge.bank.inspection import Overlap, split_name
from dynmerge.bank.plot import BAR, INK, MERGE, MUTED, WIDTH, check_picture, save_figure
from dynmerge.diagnostics.bank import ALL, Change, Diagnostics, Spectrum
from dynmerge.diagnostics.sensitivity import Sensitivity

PALE = "#b8cbdd"
HEIGHT = 4.2  # inches of one row
NUMBERS_UP_TO = 12  # preferences, beyond which a cell has no room for a number


def save_figures(found: Diagnostics, sensitivity: Sensitivity | None, file: Path) -> None:
    """Draw into `file`, whose ending says the format. Raises BankError if that fails."""
    check_picture(file)
    save_figure(draw_figures(found, sensitivity), file)


def draw_figures(found: Diagnostics, sensitivity: Sensitivity | None = None) -> Figure:
    """The figure; it belongs to no window and no global state."""
    parts = [_draw_overlap_and_coverage, _draw_spectra] if found.kinds else [_draw_nothing]
    rows = len(parts) + (sensitivity is not None)
    layout = ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1)
    figure = Figure(figsize=(WIDTH, HEIGHT * rows), layout=layout)
    grid = figure.add_gridspec(rows, 1)
    places = [figure.add_subfigure(grid[row]) for row in range(rows)]
    for draw, place in zip(parts, places, strict=False):
        draw(place, found)
    if sensitivity is not None:
        _draw_sensitivity(places[-1], sensitivity)
    return figure


def _draw_nothing(figure: SubFigure, found: Diagnostics) -> None:
    axes = figure.subplots()
    axes.axis("off")
    axes.text(0, 0.5, "No module is changed by more than one skill.", color=MUTED, va="center")


def _draw_overlap_and_coverage(figure: SubFigure, found: Diagnostics) -> None:
    overlap, coverage = figure.subplots(1, 2)
    pairs = [(kind.name, kind.asymmetry) for kind in found.kinds if kind.asymmetry]
    _draw_bars(
        overlap,
        [name for name, _ in pairs],
        {
            "A (reads)": (PALE, [item.A.measured for _, item in pairs]),
            "B (writes)": (BAR, [item.B.measured for _, item in pairs]),
        },
    )
    _mark_chance(overlap, [(item.A, item.B) for _, item in pairs])
    _title(overlap, "Overlap, mean over pairs of skills; dashes: chance, r / d")
    kinds = found.kinds
    _draw_bars(
        coverage,
        [kind.name for kind in kinds],
        {
            "sum over skills": (MUTED, [kind.coverage.independent for kind in kinds]),
            "rank-1 stack, as trained": (PALE, [kind.coverage.rank_one for kind in kinds]),
            "rank-1 stack, singular": (BAR, [kind.coverage.singular for kind in kinds]),
            "dense stack": (MERGE, [kind.coverage.dense for kind in kinds]),
        },
    )
    _title(coverage, "Effective rank: what stacking keeps of the skills' sum")


def _draw_bars(
    axes: Axes, names: Sequence[str], series: dict[str, tuple[str, list[float]]]
) -> None:
    """Groups of bars, one group for each name."""
    places, width = np.arange(len(names)), 0.8 / len(series)
    for index, (label, (color, heights)) in enumerate(series.items()):
        offset = (index - (len(series) - 1) / 2) * width
        axes.bar(places + offset, heights, width, color=color, label=label)
    axes.set_xticks(places, [name.rpartition(".")[2] for name in names])
    axes.legend(fontsize=8, frameon=False)
    _tidy(axes)


def _mark_chance(axes: Axes, pairs: Sequence[tuple[Overlap, Overlap]]) -> None:
    for place, (A, B) in enumerate(pairs):
        axes.hlines(A.chance, place - 0.4, place, color=INK, linestyle="--", linewidth=1)
        axes.hlines(B.chance, place, place + 0.4, color=INK, linestyle="--", linewidth=1)


def _draw_spectra(figure: SubFigure, found: Diagnostics) -> None:
    """Over all kinds: cumulative energy of B_all, and singular values of it and of the merge."""
    whole = next(kind for kind in found.kinds if kind.name == ALL)
    cumulative, stacked, merged = figure.subplots(1, 3)
    for label, color, spectrum in _both(whole.stacked):
        share = 100 * np.cumsum(spectrum.energies)
        cumulative.plot(np.arange(1, len(share) + 1), share, color=color, label=label)
    cumulative.set_ylim(0, 102)
    _title(cumulative, "Energy of all B in the first k directions, %")
    _draw_values(stacked, whole.stacked)
    _title(stacked, "Singular values of all B")
    _draw_values(merged, whole.merged)
    _title(merged, "Singular values of the merge (equal shares)")
    for axes in (cumulative, stacked, merged):
        axes.legend(fontsize=8, frameon=False)
        axes.set_xlabel("direction, mean over modules", fontsize=8, color=MUTED)
        _tidy(axes)


def _both(change: Change) -> list[tuple[str, str, Spectrum]]:
    return [("before Pico", MERGE, change.before), ("after Pico", BAR, change.after)]


def _draw_values(axes: Axes, change: Change) -> None:
    for label, color, spectrum in _both(change):
        told = f"{label}: omax {spectrum.omax:.2f}, rank {spectrum.effective_rank:.1f}"
        places = np.arange(1, len(spectrum.values) + 1)
        axes.semilogy(places, spectrum.values, color=color, label=told)


def _draw_sensitivity(figure: SubFigure, found: Sensitivity) -> None:
    jacobian, misalignment = figure.subplots(1, 2)
    layers, table = by_layer(found)
    image = jacobian.imshow(table, cmap="YlGnBu", aspect="auto")
    jacobian.set_yticks(range(len(found.skills)), found.skills)
    step = max(1, len(layers) // 16)
    jacobian.set_xticks(range(0, len(layers), step), layers[::step])
    jacobian.set_xlabel("layer", fontsize=8, color=MUTED)
    figure.colorbar(image, ax=jacobian, pad=0.01)
    kappa = "infinite" if found.condition is None else f"{found.condition:.3g}"
    _title(jacobian, f"|| d f_i / d phi || ({found.objective}); condition number {kappa}")
    values = np.array(found.misalignment)
    image = misalignment.imshow(values, cmap="YlGnBu", vmin=0, vmax=1)
    places = range(len(found.preferences))
    misalignment.set_xticks(places, found.preferences, rotation=90)
    misalignment.set_yticks(places, found.preferences)
    if len(found.preferences) <= NUMBERS_UP_TO:
        for (row, column), value in np.ndenumerate(values):
            ink = "white" if value > 0.6 else INK
            text = f"{value:.2f}"
            misalignment.text(column, row, text, ha="center", va="center", fontsize=8, color=ink)
    figure.colorbar(image, ax=misalignment, pad=0.01)
    _title(misalignment, "Misalignment xi between preferences")
    for axes in (jacobian, misalignment):
        _tidy(axes)


def by_layer(found: Sensitivity) -> tuple[list[str], NDArray[np.float64]]:
    """The layers, and the norms (skills, layers) of J over all modules of each."""
    owners = [split_name(module)[0] for module in found.modules]
    layers = list(dict.fromkeys(owners))
    squares = np.square(np.array(found.norms))
    columns = [squares[:, [owner == layer for owner in owners]].sum(axis=1) for layer in layers]
    return layers, np.sqrt(np.stack(columns, axis=1))


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=10, color=INK, loc="left")


def _tidy(axes: Axes) -> None:
    axes.tick_params(length=0, labelsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)
