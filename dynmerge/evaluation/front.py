"""Front: what the preferences of one method reach together, as points of accuracy per skill."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import moocore
import numpy as np
import torch
from torch import Tensor

from dynmerge.evaluation.bootstrap import LEVEL, Estimate, difference
from dynmerge.preference import Preference

# By skill, how right a preference's merge is.
Point = Mapping[str, Estimate]


def dominated_volume(points: Tensor, reference: Tensor) -> float:
    """The hypervolume that points (n, skills) dominate above `reference` (skills,); exact.

    NaN where a point is none; infinite where one above it in every skill is infinite in some. By
    moocore (López-Ibáñez et al.), the field's own library.
    """
    if points.isnan().any():
        return math.nan
    above = points[(points > reference).all(-1)]  # the others dominate nothing
    if above.isinf().any():
        return math.inf
    if not len(above):
        return 0.0
    volume = moocore.hypervolume(above.double().numpy(), ref=reference.numpy(), maximise=True)
    return float(volume)


def hypervolume(points: Sequence[Point], reference: float = 0.0) -> Estimate:
    """The hypervolume of a front above the same `reference` in every skill, and its resamplings."""
    values, draws = _values(points), _draws(points)
    corner = torch.full((values.shape[1],), reference, dtype=torch.float64)
    volumes = [dominated_volume(draw, corner) for draw in draws]
    return Estimate(dominated_volume(values, corner), torch.tensor(volumes, dtype=torch.float64))


def on_front(points: Sequence[Point]) -> list[bool]:
    """Which points no other one is better than in some skill and as good in all."""
    found = moocore.is_nondominated(_values(points).numpy(), maximise=True, keep_weakly=True)
    return [bool(kept) for kept in np.asarray(found)]


@dataclass(frozen=True, slots=True)
class Monotonicity:
    """Of the steps between neighbouring preferences that give a skill more, those that keep it.

    `as_measured` counts what was measured; `within` lets a step fall as far as its interval allows.
    """

    steps: int
    as_measured: int
    within: int


def monotonicity(
    preferences: Sequence[Preference], points: Sequence[Point], level: float = LEVEL
) -> Monotonicity:
    """Over every step that takes a share from one skill and gives it to another."""
    measured = within = total = 0
    for low, high, skill in steps(preferences, list(points[0])):
        change = difference(points[high][skill], points[low][skill])
        total += 1
        measured += change.value >= 0
        within += change.interval(level).high >= 0
    return Monotonicity(total, measured, within)


def steps(preferences: Sequence[Preference], skills: Sequence[str]) -> list[tuple[int, int, str]]:
    """(from, to, skill): neighbours that differ in two skills, the one named getting more.

    Neighbours have no other preference between them on their line. Raw weights are on none.
    """
    found = []
    for gains in skills:
        for pays in skills:
            if gains == pays:
                continue
            lines: dict[tuple[tuple[str, int], ...], list[tuple[int, int]]] = {}
            for index, preference in enumerate(preferences):
                if preference.is_raw:
                    continue
                shares = dict(preference.thousandths)
                share, other = shares.pop(gains, 0), shares.pop(pays, 0)
                line = (*sorted(shares.items()), ("both", share + other))
                lines.setdefault(line, []).append((share, index))
            for along in lines.values():
                ordered = sorted(along)
                found += [
                    (low, high, gains)
                    for (less, low), (more, high) in pairwise(ordered)
                    if less < more
                ]
    return found


def _values(points: Sequence[Point]) -> Tensor:
    """(n, skills)."""
    return torch.tensor(
        [[estimate.value for estimate in point.values()] for point in points], dtype=torch.float64
    )


def _draws(points: Sequence[Point]) -> Tensor:
    """(samples, n, skills)."""
    stacked = [torch.stack([one.draws for one in point.values()], dim=-1) for point in points]
    return torch.stack(stacked, dim=1)
