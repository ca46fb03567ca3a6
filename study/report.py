"""Report: the study's cells -> docs/quality.json, its example-by-example record, and the tables of
docs/quality.md.

    python -m study.report

Nothing is chosen here: it reads what `study.run` measured.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from dynmerge.evaluation.bootstrap import (
    Estimate,
    Interval,
    combined,
    difference,
    mean,
    resamplings,
    share,
)
from dynmerge.evaluation.front import hypervolume, monotonicity
from dynmerge.evaluation.simplex import even_grid
from dynmerge.merging.demands import BEST
from study.cells import Cell, read_cells
from study.methods import ROWS
from study.places import CENTRE, grid_skills, places
from study.run import FIRST, GRID, GRID_ROWS, GRID_STEPS, SUITES

DOCS = Path(__file__).parents[1] / "docs"
# The row of what dynmerge serves where a bank carries it: BEST[0] of merging/demands.py.
DEFAULT = f"{BEST[0]}-map"
SAMPLES = 2000
ALIASES = {"default": DEFAULT}

Key = tuple[str, str, int]  # method, task, seed


@dataclass(frozen=True, eq=False)
class Suite:
    """One suite's cells at one place, as paired estimates."""

    name: str
    cells: Mapping[tuple[str, str, str, int], Cell]  # method, preference, task, seed

    @classmethod
    def read(cls, name: str) -> Suite:
        """All seeds that were measured."""
        return cls(
            name,
            {
                (cell.method, cell.at, cell.task, seed): cell
                for seed in SUITES[name]
                for cell in read_cells(name, seed)
            },
        )

    @property
    def seeds(self) -> list[int]:
        """Those with cells."""
        return sorted({seed for *_, seed in self.cells})

    @property
    def tasks(self) -> list[str]:
        """All tasks."""
        return sorted({task for _, _, task, _ in self.cells})

    def methods(self, at: str = CENTRE) -> list[str]:
        """Measured at one preference on every seed, in the order of the rows."""
        found = {method for method, where, _, _ in self.cells if where == at}
        order = ["zero-shot", "single", "joint", *ROWS, "osrm-mean", "osrm-p4"]
        known = [name for name in dict.fromkeys(order) if name in found]
        return known + sorted(found - set(known))

    def estimate(self, method: str, task: str, seed: int, at: str = CENTRE) -> Estimate | None:
        """The accuracy, with draws that all methods share."""
        cell = self.cells.get((method, at, task, seed))
        if cell is None:
            return None
        right, counts = torch.tensor(cell.right), torch.tensor(cell.counts)
        return share(right, counts, draws_of(self.name, task, len(cell.right)))

    def average(self, method: str, at: str = CENTRE) -> Estimate | None:
        """Over tasks and seeds, every one alike."""
        found = [
            self.estimate(method, task, seed, at) for task in self.tasks for seed in self.seeds
        ]
        present = [one for one in found if one is not None]
        return mean(present) if len(present) == len(found) and found else None


@cache
def draws_of(suite: str, task: str, examples: int) -> Tensor:
    """The resamplings of one task's examples."""
    return resamplings(examples, SAMPLES, 0, f"{suite} {task}")


def main() -> None:
    """Write everything."""
    suites = [suite for suite in map(Suite.read, SUITES) if suite.cells]
    quality = {suite.name: quality_of(suite) for suite in suites}
    (DOCS / "quality.json").write_text(json.dumps(quality, indent=1) + "\n", "utf-8")
    (DOCS / "quality-preferences.json").write_text(
        json.dumps({suite.name: preferences_of(suite) for suite in suites}, indent=1) + "\n",
        "utf-8",
    )
    examples = {suite.name: examples_of(suite) for suite in suites}
    packed = gzip.compress(json.dumps(examples, separators=(",", ":")).encode(), mtime=0)
    (DOCS / "quality-examples.json.gz").write_bytes(packed)
    page = DOCS / "quality.md"
    text = page.read_text("utf-8") if page.is_file() else ""
    for suite in suites:
        for name, table in (
            ("methods", methods_table(suite)),
            ("preferences", preferences_table(suite)),
            ("fronts", fronts_table(suite)),
            ("aims", aims_table(suite)),
        ):
            text = replaced(text, f"{suite.name}-{name}", table)
    page.write_text(text, "utf-8")


def replaced(text: str, name: str, table: str) -> str:
    """The page with what stands between the marks of `name` put anew; at its end without marks."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    block = f"{begin}\n{table}\n{end}"
    if begin not in text:
        return f"{text.rstrip()}\n\n{block}\n"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return before + block + after


def quality_of(suite: Suite) -> dict[str, object]:
    """Method -> task -> seed -> accuracy and interval, at the uniform preference."""
    names = {name: name for name in suite.methods()} | ALIASES
    return {
        name: {
            task: {
                str(seed): stated(found)
                for seed in suite.seeds
                if (found := suite.estimate(method, task, seed)) is not None
            }
            for task in suite.tasks
        }
        for name, method in names.items()
        if method in suite.methods()
    }


def stated(estimate: Estimate) -> dict[str, object]:
    """As it is written down."""
    interval = estimate.interval()
    return {
        "accuracy": round(interval.value, 5),
        "interval": [round(interval.low, 5), round(interval.high, 5)],
    }


def preferences_of(suite: Suite) -> dict[str, object]:
    """Method -> preference -> task -> seed -> accuracy, away from the centre too."""
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for (method, at, task, seed), cell in suite.cells.items():
        place = found.setdefault(method, {}).setdefault(at, {}).setdefault(task, {})
        place[str(seed)] = round(cell.accuracy, 5)
    return {method: places for method, places in found.items() if set(places) != {CENTRE}}


def examples_of(suite: Suite) -> list[dict[str, object]]:
    """Every cell, example by example."""
    return [
        {
            "method": method,
            "at": at,
            "task": task,
            "seed": seed,
            "right": cell.right,
            "counts": cell.counts if max(cell.counts) > 1 else 1,
            "chosen": cell.chosen,
        }
        for (method, at, task, seed), cell in suite.cells.items()
    ]


def methods_table(suite: Suite) -> str:
    """Accuracy at the uniform preference: each task's mean over seeds, and the average."""
    seeds = len(suite.seeds)
    head = ["method", "data", *suite.tasks, f"average of {seeds} seeds", "over tuned"]
    rows = []
    tuned = suite.average("tuned")
    for method in suite.methods():
        average = suite.average(method)
        if average is None:
            continue
        by_task = [task_mean(suite, method, task) for task in suite.tasks]
        over = signed(difference(average, tuned).interval()) if tuned is not None else ""
        data = ROWS[method].data if method in ROWS else ""
        rows.append([method, data, *by_task, brackets(average.interval()), over])
    return markdown(head, rows)


def task_mean(suite: Suite, method: str, task: str) -> str:
    """The mean over seeds."""
    found = [suite.estimate(method, task, seed) for seed in suite.seeds]
    values = [one.value for one in found if one is not None]
    return f"{sum(values) / len(values):.3f}"


def preferences_table(suite: Suite) -> str:
    """Preference-weighted accuracy of what is measured away from the centre, first seed."""
    seed = FIRST[suite.name]
    weights = preference_weights(suite)
    rows = []
    for method in suite.methods("mixed"):
        row = [method]
        for at in weights:
            found = [
                (weights[at][task], suite.cells.get((method, at, task, seed)))
                for task in suite.tasks
            ]
            if any(weight and one is None for weight, one in found):
                row.append("")
                continue
            value = sum(weight * one.accuracy for weight, one in found if one is not None)
            row.append(f"{value:.3f}")
        rows.append(row)
    return markdown(["method", *weights], rows)


def preference_weights(suite: Suite) -> dict[str, dict[str, float]]:
    """Preference -> task -> weight."""
    return {
        at: dict(zip(suite.tasks, rho.tolist(), strict=True))
        for at, rho in places(len(suite.tasks)).items()
    }


def aims_table(suite: Suite) -> str:
    """The aims that the study was held to, and what was found."""
    rows = []
    for words, first, second in (
        ("Pico over the mean", "pico", "mean"),
        ("mean with its norm restored over the mean", "mean-gamma", "mean"),
        ("Pico over tuned Task Arithmetic", "pico", "tuned"),
        ("tuned Pico over tuned Task Arithmetic", "pico-tuned", "tuned"),
        ("the default over tuned Task Arithmetic", DEFAULT, "tuned"),
        ("TARA-A's map over one weight per task and module's", "tara-a-map", "adamerging-map"),
        ("TARA-B's map over it", "tara-b-map", "adamerging-map"),
        ("the free core's map over it", "core-map", "adamerging-map"),
        ("TARA-A over it, both for the centre alone", "tara-a-distil", "adamerging-distil"),
        ("TARA-A by entropy over tuned", "tara-a-entropy", "tuned"),
    ):
        pair = suite.average(first), suite.average(second)
        if pair[0] is not None and pair[1] is not None:
            rows.append([words, signed(difference(pair[0], pair[1]).interval())])
    for method in (DEFAULT, "adamerging-map", "core-map", "tara-a-distil", "core-distil"):
        closed = gap_closed(suite, method)
        if closed is not None:
            rows.append(
                [f"share of the gap from tuned to single that {method} closes", brackets(closed)]
            )
    return markdown(["question", "points of accuracy, or share, with the 95 % interval"], rows)


def fronts_table(suite: Suite) -> str:
    """What each method's grid of preferences reaches: its hypervolume, and how monotone it is."""
    seed, skills = FIRST[suite.name], grid_skills(suite.tasks)
    grid = even_grid(skills, GRID_STEPS)
    rows, first = [], None
    for name in GRID_ROWS:
        found = [
            {skill: suite.estimate(f"{GRID}{name}", skill, seed, str(one)) for skill in skills}
            for one in grid
        ]
        if any(one is None for point in found for one in point.values()):
            continue
        points = [{skill: one for skill, one in point.items() if one} for point in found]
        volume, steps = hypervolume(points), monotonicity(grid, points)
        over = "" if first is None else signed(difference(volume, first).interval())
        first = first or volume
        within = f"{steps.within}/{steps.steps}"
        rows.append([name, brackets(volume.interval()), over, within, f"{steps.as_measured}"])
    head = [
        "method",
        "hypervolume",
        "over the first (x 100)",
        "steps that keep it, within",
        "as measured",
    ]
    return markdown(head, rows)


def gap_closed(suite: Suite, method: str) -> Interval | None:
    """(method - tuned) / (single - tuned)."""
    found = [suite.average(name) for name in (method, "tuned", "single")]
    if any(one is None for one in found):
        return None
    present = [one for one in found if one is not None]
    ratio: Callable[[Tensor], Tensor] = lambda all: (  # noqa: E731 - one expression of three
        (all[..., 0] - all[..., 1]) / (all[..., 2] - all[..., 1])
    )
    return combined(present, ratio).interval()


def brackets(interval: Interval) -> str:
    """`.812 [.801, .823]`."""
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def signed(interval: Interval) -> str:
    """A difference, in points."""
    value, low, high = (100 * x for x in (interval.value, interval.low, interval.high))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


if __name__ == "__main__":
    main()
