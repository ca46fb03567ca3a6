"""Cells: what was measured, example by example, a line each in the cache."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from study.sources import cache_folder


@dataclass(frozen=True, slots=True)
class Cell:
    """One method at one preference on one task: of each example, predictions and right ones."""

    method: str
    at: str
    task: str
    right: list[int]
    counts: list[int]
    nats: float
    chosen: object

    @property
    def accuracy(self) -> float:
        """The share of predictions that are right."""
        return sum(self.right) / sum(self.counts)

    def to_json(self, seconds: float) -> Mapping[str, object]:
        """As one line, with the row's CPU-seconds."""
        return {**asdict(self), "seconds": round(seconds, 1)}


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
    return [_cell(json.loads(line)) for line in lines]


def _cell(fields: dict[str, Any]) -> Cell:
    fields.pop("seconds")
    return Cell(**fields)
