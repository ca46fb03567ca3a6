"""Cells: what was measured, example by example, a line each in the cache."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from study.sources import cache_folder


@dataclass(frozen=True, slots=True)
class Cell:
    """One method at one preference on one task: of each example, predictions and right ones.

    `seconds` are CPU-seconds of the method's whole row on this seed, its tuning or training in it.
    """

    method: str
    at: str
    task: str
    right: list[int]
    counts: list[int]
    nats: float
    chosen: object
    seconds: float = 0.0

    @property
    def accuracy(self) -> float:
        """The share of predictions that are right."""
        return sum(self.right) / sum(self.counts)

    def to_json(self, seconds: float) -> Mapping[str, object]:
        """As one line, with the row's CPU-seconds."""
        return asdict(replace(self, seconds=round(seconds, 1)))


def cells_file(suite: str, seed: int) -> Path:
    """Where one seed's cells are."""
    folder = cache_folder() / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{suite}-{seed}.jsonl"


def read_cells(suite: str, seed: int) -> list[Cell]:
    """All cells of one seed so far."""
    path = cells_file(suite, seed)
    if not path.is_file():
        return []
    lines = path.read_text("utf-8").splitlines()
    return [Cell(**json.loads(line)) for line in lines]
