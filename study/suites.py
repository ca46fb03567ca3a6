"""Suites: which rows are measured on which seeds, and where. Knows no models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from study.methods import ALL_ROWS, FORM_ROWS, ROWS, UNLABELLED

REFERENCES = ("tara-a-for-each", "core-for-each")  # optimised for each preference alone
GRID, GRID_STEPS = "grid:", 4  # fronts between three skills
GRIDS = tuple(
    f"{GRID}{row}" for row in ("mean", "linear-p4", "adamerging-rho-scaled", "tara-a-map")
)
OTHER_BANKS = ("joint", "osrm-single", "osrm-mean", "osrm-p4")  # adapters trained another way
# One question each: what would another setting have gained?
SETTINGS = (
    *("gauss-newton", "tara-a-tchebycheff", "tara-a-published-250", "tara-b-map"),
    *FORM_ROWS,
)
# A generative row costs fifty encoder's.
GENERATIVE = (
    *("zero-shot", "mean", "mean-gamma", "linear-p4", "ratio-start", "tuned", "s-only", "pico"),
    *("pico-tuned", "tsv-m-p6", "adamerging-map", "tara-a-map", "core-map"),
)


@dataclass(frozen=True, slots=True)
class Scope:
    """One suite: rows measured on every seed, and on the first alone; of the latter's, `away` also
    at preferences other than the uniform one. `texts` is what it has for unlabelled text.
    """

    seeds: tuple[int, ...]
    every: tuple[str, ...]
    once: tuple[str, ...]
    away: frozenset[str]
    texts: str

    def rows(self, seed: int) -> tuple[str, ...]:
        """Those of one seed, in the order in which they are measured."""
        return (*self.every, *self.once) if seed == self.seeds[0] else self.every


SUITES: Mapping[str, Scope] = {
    "encoder": Scope(
        seeds=(0, 1, 2),
        every=("single", *(name for name in ROWS if name not in SETTINGS), *OTHER_BANKS),
        once=(*SETTINGS, *REFERENCES, *GRIDS),
        away=frozenset(name for name, row in ALL_ROWS.items() if row.away),
        texts=UNLABELLED,
    ),
    "generative": Scope(
        seeds=(20, 21, 22),
        every=("single", *GENERATIVE),
        once=(*(name for name in ROWS if name not in (*GENERATIVE, *SETTINGS)), *OTHER_BANKS),
        away=frozenset(("mean", "tuned", "adamerging-map", "tara-a-map", "core-map")),
        texts="prompts with answers",
    ),
}
