"""Cells: what was measured, example by example, a line each in the cache.

    python -m study.cells    # what the record has of seeds that the cache knows nothing of

Whoever only adds rows to the study can so go on from the ones that it ships with.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from study.sources import cache_folder

RECORD = Path(__file__).parents[1] / "docs" / "quality-examples.json.gz"


@dataclass(frozen=True, slots=True)
class Cell:
    """One method at one preference on one task: of each example, predictions and right ones.

    `seconds` are CPU-seconds of the method's whole row on this seed, its tuning or training in it,
    but for what was kept of a calibration; `inputs` names what it depends on (study.inputs).
    """

    method: str
    at: str
    task: str
    right: list[int]
    counts: list[int]
    nats: float
    chosen: object
    seconds: float = 0.0
    inputs: str = ""

    @property
    def accuracy(self) -> float:
        """The share of predictions that are right."""
        return sum(self.right) / sum(self.counts)


def write_row(suite: str, seed: int, cells: Sequence[Cell]) -> None:
    """Add one row's cells. In one write, or a row that was cut would count as measured."""
    with cells_file(suite, seed).open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(asdict(cell)) + "\n" for cell in cells))


def cells_file(suite: str, seed: int) -> Path:
    """Where one seed's cells are."""
    folder = cache_folder() / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{suite}-{seed}.jsonl"


def read_cells(suite: str, seed: int) -> list[Cell]:
    """All cells of one seed so far; of a row that was measured several times, the last ones."""
    path = cells_file(suite, seed)
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    cells = [Cell(**json.loads(line)) for line in lines]
    last = {cell.method: cell.inputs for cell in cells}
    found = {(cell.method, cell.at, cell.task): cell for cell in cells}
    return [cell for cell in found.values() if cell.inputs == last[cell.method]]


def restore(record: Path = RECORD) -> list[str]:
    """Put the record's cells into the cache, and name the seeds for which that was done.

    A seed of which the cache has anything stays as it is.
    """
    lines: dict[Path, list[str]] = {}
    for suite, cells in json.loads(gzip.decompress(record.read_bytes())).items():
        for fields in cells:
            path = cells_file(suite, fields.pop("seed"))
            if fields["counts"] == 1:
                fields["counts"] = [1] * len(fields["right"])
            lines.setdefault(path, []).append(json.dumps(asdict(Cell(**fields))) + "\n")
    missing = {path: whole for path, whole in lines.items() if not path.exists()}
    for path, whole in missing.items():
        path.write_text("".join(whole), encoding="utf-8")
    return [path.stem for path in missing]


if __name__ == "__main__":
    print("restored:", ", ".join(restore()) or "nothing, the cache has cells of every seed")
