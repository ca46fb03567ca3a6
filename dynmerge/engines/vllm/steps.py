"""Runs: which rows of which tables the tokens of one forward pass need, found once for all layers.

vLLM says a merge's number for every token. Tokens of a request are neighbours, so that a batch is a
few runs.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens [start, stop) under one row."""

    start: int
    stop: int
    row: int


@dataclass(frozen=True, slots=True, eq=False)
class Assignment:
    """One table's part of a step: what the host decides by, and what gathers on the device."""

    runs: tuple[Run, ...]
    index: npt.NDArray[np.int64]  # (tokens,), NOWHERE where a token has no row in this table


NOWHERE = -1


def assign(numbers: Sequence[int], places: Mapping[int, tuple[Key, int]]) -> dict[Key, Assignment]:
    """Each needed table's assignment.

    `numbers` (tokens,) are merges' numbers, 0 and below the base model; `places` has each one's
    (table, row).
    """
    tokens = np.asarray(numbers, dtype=np.int64)
    if not len(tokens):
        return {}
    starts = np.flatnonzero(np.diff(tokens, prepend=tokens[:1] - 1))
    stops = np.append(starts[1:], len(tokens))
    by_table: dict[Key, list[Run]] = {}
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        number = int(tokens[start])
        if number > 0:
            table, row = places[number]
            by_table.setdefault(table, []).append(Run(start, stop, row))
    return {table: _assignment(runs, len(tokens)) for table, runs in by_table.items()}


def _assignment(runs: list[Run], tokens: int) -> Assignment:
    index = np.full(tokens, NOWHERE, dtype=np.int64)
    for run in runs:
        index[run.start : run.stop] = run.row
    return Assignment(tuple(runs), index)
