"""Suite: what was measured on one suite, as estimates that are paired by their resamplings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from dynmerge.evaluation.bootstrap import Estimate, combined, mean, resamplings, share
from dynmerge.merging.demands import BEST
from study.cells import Cell, read_cells
from study.inputs import bench_of
from study.methods import ALL_ROWS
from study.places import CENTRE, places
from study.suites import SUITES

# The row of what dynmerge serves where a bank carries it: BEST[0] of merging/demands.py.
DEFAULT = f"{BEST[0]}-map"
SAMPLES = 2000
ORDER = ("zero-shot", "single", "joint", *ALL_ROWS, "osrm-mean", "osrm-p4")


@dataclass(frozen=True, eq=False)
class Suite:
    """One suite's cells."""

    name: str
    cells: Mapping[tuple[str, str, str, int], Cell]  # method, preference, task, seed

    @classmethod
    def read(cls, name: str) -> Suite:
        """All seeds that were measured.

        Raises ValueError where rows of one seed were of other adapters or saw other examples.
        """
        cells = {
            (cell.method, cell.at, cell.task, seed): cell
            for seed in SUITES[name].seeds
            for cell in read_cells(name, seed)
        }
        counts: dict[str, list[int]] = {}
        benches: dict[int, str] = {}
        for (method, _, task, seed), cell in cells.items():
            if counts.setdefault(task, cell.counts) != cell.counts:
                raise ValueError(f"{name} {seed} {method}: other examples of {task} than before")
            bench = bench_of(cell.inputs)
            if benches.setdefault(seed, bench) != bench:
                raise ValueError(f"{name} {seed} {method}: other adapters or examples than before")
        return cls(name, cells)

    @property
    def seeds(self) -> list[int]:
        """Those with cells."""
        return sorted({seed for *_, seed in self.cells})

    @property
    def tasks(self) -> list[str]:
        """All tasks."""
        return sorted({task for _, _, task, _ in self.cells})

    @property
    def seconds(self) -> float:
        """CPU-seconds of all rows on all seeds: tuning, training and tests."""
        spent = {(method, seed): cell.seconds for (method, _, _, seed), cell in self.cells.items()}
        return sum(spent.values())

    def methods(self, at: str = CENTRE) -> list[str]:
        """Measured at one preference on any seed, in the order of the rows."""
        found = {method for method, where, _, _ in self.cells if where == at}
        known = [name for name in dict.fromkeys(ORDER) if name in found]
        return known + sorted(found - set(known))

    def seeds_of(self, method: str, at: str = CENTRE) -> list[int]:
        """The seeds on which a method was measured on every task."""
        return [
            seed
            for seed in self.seeds
            if all((method, at, task, seed) in self.cells for task in self.tasks)
        ]

    def estimate(self, method: str, task: str, seed: int, at: str = CENTRE) -> Estimate | None:
        """The accuracy, with draws that all methods share."""
        cell = self.cells.get((method, at, task, seed))
        if cell is None:
            return None
        right, counts = torch.tensor(cell.right), torch.tensor(cell.counts)
        return share(right, counts, _draws_of(self.name, task, len(cell.right)))

    def average(self, method: str, seeds: Sequence[int] | None = None) -> Estimate | None:
        """At the centre, over tasks and seeds (by default all), every one alike; None if any is
        missing.
        """
        wanted = self.seeds if seeds is None else seeds
        found = complete(
            [self.estimate(method, task, seed) for task in self.tasks for seed in wanted]
        )
        return mean(found) if found else None

    def weighted(self, method: str, at: str, seed: int) -> Estimate | None:
        """The accuracies at one of `places`, weighted by that preference."""
        rho = places(len(self.tasks))[at]
        shares = [(task, float(w)) for task, w in zip(self.tasks, rho, strict=True) if w]
        found = complete([self.estimate(method, task, seed, at) for task, _ in shares])
        if found is None:
            return None
        weights = torch.tensor([w for _, w in shares], dtype=torch.float64)
        return combined(found, lambda each: (each * weights).sum(-1))

    def everywhere(self, method: str, seed: int) -> Estimate | None:
        """The mean of that over all places."""
        found = complete([self.weighted(method, at, seed) for at in places(len(self.tasks))])
        return mean(found) if found else None


def complete(found: Iterable[Estimate | None]) -> list[Estimate] | None:
    """The same, or None if any is missing."""
    listed = list(found)
    present = [one for one in listed if one is not None]
    return present if len(present) == len(listed) else None


@cache
def _draws_of(suite: str, task: str, examples: int) -> Tensor:
    """The resamplings of one task's examples."""
    return resamplings(examples, SAMPLES, 0, f"{suite} {task}")
