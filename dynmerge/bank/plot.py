"""Draw a bank's report: the skills' effective ranks, their overlaps, and where the energy lies."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from dynmerge.bank.inspection import BankReport, ModuleReport, readable, split_name
from dynmerge.errors import BankError

INK, MUTED, BAR, MERGE, EMPTY = "#1f2328", "#656d76", "#4878a8", "#c8553d", "#dfe3e7"
NUMBERS_UP_TO = 12  # tasks, beyond which an overlap's cell has no room for a number
LAYERS_NUMBERED = 40  # beyond this many layers, their cells have no room either
WIDTH = 13.0  # inches
BARS_FROM = 0.45  # of the width
OVERLAP_TITLES = (
    "Overlap of A (what the skills read) minus chance",
    "Overlap of B (what the skills write) minus chance",
)


def check_picture(file: Path) -> None:
    """Raise BankError unless a picture can go to `file`; worth asking before a long inspection."""
    known = Figure().canvas.get_supported_filetypes()
    if file.suffix[1:].lower() not in known:
        raise BankError(f"cannot draw {file}: its ending must be one of {', '.join(known)}")
    if not file.parent.is_dir():
        raise BankError(f"cannot draw {file}: there is no folder {file.parent}")
    if file.is_dir():
        raise BankError(f"cannot draw {file}: it is a folder")
    place = file if file.exists() else file.parent
    if not os.access(place, os.W_OK):
        raise BankError(f"cannot draw {file}: {place} is not writable")


def save_plot(report: BankReport, file: Path) -> None:
    """Draw `report` into `file`, whose ending says the format. Raises BankError if that fails."""
    check_picture(file)
    save_figure(plot_report(report), file)


def save_figure(figure: Figure, file: Path) -> None:
    """Write a figure; the file's ending says the format. Raises BankError if that fails."""
    check_picture(file)
    try:
        figure.savefig(file, dpi=130)
    except OSError as error:
        raise BankError(f"cannot draw {file}: {error.strerror}") from error


def plot_report(report: BankReport) -> Figure:
    """The figure; it belongs to no window and no global state."""
    energy = EnergyMap.of(report.modules)
    heights = [
        0.6 + 0.27 * (len(report.tasks) + 2),
        6.2 if len(report.tasks) > 1 else 0.6,
        1.2 + 0.34 * len(energy.kinds),
    ]
    layout = ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1)
    figure = Figure(figsize=(WIDTH, sum(heights)), layout=layout)
    # Parts of their own, so that the columns of one do not move those of another.
    grid = figure.add_gridspec(3, 1, height_ratios=heights)
    top, middle, bottom = (figure.add_subfigure(grid[row]) for row in range(3))
    top.suptitle(_headline(report), x=0.01, ha="left", fontsize=13, color=INK)
    _draw_tasks(top.subplots(), report)
    _draw_overlaps(middle, report)
    _draw_energy(bottom, energy)
    return figure


@dataclass(frozen=True, slots=True, eq=False)
class EnergyMap:
    """Layer x kind of module: the skills' summed squared norm there, and the summed ranks K."""

    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    energy: NDArray[np.float64]  # (kinds, layers), shares that sum to 1; NaN where there is nothing
    ranks: NDArray[np.int64]  # (kinds, layers)

    @classmethod
    def of(cls, modules: Sequence[ModuleReport]) -> "EnergyMap":
        """Sum over what shares a layer and a kind, such as the experts of one layer."""
        places = [split_name(module.name) for module in modules]
        layers = tuple(dict.fromkeys(layer for layer, _ in places))
        kinds = tuple(dict.fromkeys(kind for _, kind in places))
        energy = np.full((len(kinds), len(layers)), np.nan)
        ranks = np.zeros((len(kinds), len(layers)), dtype=np.int64)
        total = sum(norm**2 for module in modules for norm in module.norms) or 1.0
        for (layer, kind), module in zip(places, modules, strict=True):
            cell = kinds.index(kind), layers.index(layer)
            share = sum(norm**2 for norm in module.norms) / total
            energy[cell] = np.nansum([energy[cell], share])
            ranks[cell] += module.K
        return cls(layers, kinds, energy, ranks)


def _headline(report: BankReport) -> str:
    size = report.bytes
    return (
        f"{_plain(report.base)}: {len(report.tasks)} skill{'s' * (len(report.tasks) != 1)}, "
        f"{len(report.modules)} modules, factors {readable(size.factors)}, "
        f"one merge {readable(size.merge_bf16)} in bf16   ·   bank {report.digest[:12]}"
    )


def _draw_tasks(axes: Axes, report: BankReport) -> None:
    """A table whose last column is a bar: each skill's effective rank, and the uniform merge's."""
    columns = {
        0.0: ["skill", *(task.name for task in report.tasks), "uniform merge"],
        0.18: ["rank", *(", ".join(map(str, task.ranks)) for task in report.tasks)],
        0.28: ["modules", *(str(task.modules) for task in report.tasks)],
        0.36: ["norm", *(f"{task.norm:.3g}" for task in report.tasks)],
        BARS_FROM: ["effective rank (mean over modules)"],
    }
    for x, cells in columns.items():
        for row, cell in enumerate(cells):
            ink = INK if row else MUTED
            axes.text(x, row, _clip(cell, 40), va="center", fontsize=9, color=ink)
    values = [*(task.effective_rank for task in report.tasks), report.merge_effective_rank]
    unit = (0.96 - BARS_FROM) / max([*values, 1.0])
    colors = [BAR] * len(report.tasks) + [MERGE]
    widths = [value * unit for value in values]
    axes.barh(range(1, len(values) + 1), widths, left=BARS_FROM, height=0.62, color=colors)
    for row, (value, width) in enumerate(zip(values, widths, strict=True), start=1):
        end = BARS_FROM + width + 0.005
        axes.text(end, row, f"{value:.2f}", va="center", fontsize=9, color=INK)
    axes.set_xlim(0, 1)
    axes.set_ylim(len(values) + 0.5, -0.5)
    axes.axis("off")


def _draw_overlaps(figure: SubFigure, report: BankReport) -> None:
    """Two heat maps on one diverging scale, symmetric about chance."""
    if len(report.tasks) == 1:
        axes = figure.subplots()
        axes.axis("off")
        axes.text(0, 0.5, "Overlap: one skill, so no pairs.", color=MUTED, va="center")
        return
    tables = [excess_table(report, factor) for factor in ("A", "B")]
    limit = max([0.01, *(float(np.nanmax(np.abs(table), initial=0.0)) for table in tables)])
    scale = ScalarMappable(Normalize(-limit, limit), "RdBu_r")
    both = figure.subplots(1, 2)
    for axes, table, title in zip(both, tables, OVERLAP_TITLES, strict=True):
        _draw_overlap(axes, report, table, scale)
        axes.set_title(title, fontsize=10, color=INK, loc="left")
    bar = figure.colorbar(scale, ax=both, shrink=0.8, pad=0.01)
    bar.ax.tick_params(labelsize=8)
    bar.set_label(
        "0: no more alike than random subspaces; grey: no module in common", fontsize=8, color=MUTED
    )


def excess_table(report: BankReport, factor: str) -> NDArray[np.float64]:
    """(tasks, tasks) of overlap minus chance in `A` or `B`; NaN on the diagonal and if unshared."""
    place = {task.name: index for index, task in enumerate(report.tasks)}
    table = np.full((len(place), len(place)), np.nan)
    for pair in report.pairs:
        overlap = pair.A if factor == "A" else pair.B
        if overlap is not None:
            first, second = place[pair.first], place[pair.second]
            table[first, second] = table[second, first] = overlap.excess
    return table


def _draw_overlap(
    axes: Axes, report: BankReport, table: NDArray[np.float64], scale: ScalarMappable
) -> None:
    names = [_clip(task.name) for task in report.tasks]
    axes.set_facecolor(EMPTY)
    low, high = scale.get_clim()
    axes.imshow(table, cmap=scale.cmap, vmin=low, vmax=high)
    size = 9 if len(names) <= NUMBERS_UP_TO else 7
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    _tidy(axes)
    if len(names) <= NUMBERS_UP_TO:
        texts = {
            cell: f"{value:+.3f}" for cell, value in np.ndenumerate(table) if not np.isnan(value)
        }
        _write_cells(axes, texts, _dark(table, scale), fontsize=10 if len(names) <= 8 else 7)


def _draw_energy(figure: SubFigure, energy: EnergyMap) -> None:
    """Where the skills change the model most; in each cell, the summed ranks K."""
    axes = figure.subplots()
    share = 100 * energy.energy
    scale = ScalarMappable(Normalize(0, max(float(np.nanmax(share)), 1e-9)), "YlGnBu")
    axes.set_facecolor(EMPTY)
    low, high = scale.get_clim()
    axes.imshow(share, cmap=scale.cmap, vmin=low, vmax=high, aspect="auto")
    axes.set_yticks(range(len(energy.kinds)), [_clip(kind, 28) for kind in energy.kinds])
    step = max(1, len(energy.layers) // LAYERS_NUMBERED)
    axes.set_xticks(range(0, len(energy.layers), step), energy.layers[::step])
    axes.tick_params(labelsize=8)
    axes.set_xlabel("layer", fontsize=9, color=MUTED)
    title = "Energy: % of all the skills' squared norm, by module"
    _tidy(axes)
    if len(energy.layers) <= LAYERS_NUMBERED:
        title += " (the number is the summed ranks K)"
        texts = {cell: str(rank) for cell, rank in np.ndenumerate(energy.ranks) if rank}
        _write_cells(axes, texts, _dark(share, scale), fontsize=7)
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    bar = figure.colorbar(scale, ax=axes, pad=0.01)
    bar.ax.tick_params(labelsize=8)


def _write_cells(
    axes: Axes, texts: Mapping[tuple[int, ...], str], dark: NDArray[np.bool_], fontsize: int
) -> None:
    for (row, column), text in texts.items():
        ink = "white" if dark[row, column] else INK
        axes.text(column, row, text, ha="center", va="center", fontsize=fontsize, color=ink)


def _dark(values: NDArray[np.float64], scale: ScalarMappable) -> NDArray[np.bool_]:
    """Where a cell's colour is dark enough to need white text."""
    rgb = scale.to_rgba(np.nan_to_num(values))[..., :3]
    return np.asarray(rgb @ np.array([0.299, 0.587, 0.114]) < 0.5)


def _tidy(axes: Axes) -> None:
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _clip(text: str, width: int = 20) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _plain(text: str) -> str:
    """`text` without what matplotlib would read as mathematics or has no glyph for."""
    return _clip(text.encode("ascii", "replace").decode().replace("$", "?"), 60)
