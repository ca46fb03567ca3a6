"""Places: the preferences at which methods are measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dynmerge.calibration import draws

CENTRE = "centre"


def places(tasks: int) -> dict[str, Tensor]:
    """The centre, skewed preferences, edges, and one of all kinds; each (tasks,)."""
    mixed = torch.full((tasks,), 0.2 / (tasks - 2))
    mixed[1], mixed[2] = 0.5, 0.3
    return {
        CENTRE: draws.centre(tasks),
        "skewed-first": skewed(tasks, 0),
        "skewed-third": skewed(tasks, 2),
        "edge-first": edge(tasks, 0, 1),
        "edge-third": edge(tasks, 2, 4),
        "mixed": mixed,
    }


def grid_skills(names: Sequence[str]) -> tuple[str, str, str]:
    """The three skills between which fronts are measured: the first, third and fifth."""
    return names[0], names[2], names[4]


def skewed(tasks: int, lead: int, share: float = 0.6) -> Tensor:
    """One skill at `share`, the others alike."""
    rho = torch.full((tasks,), (1 - share) / (tasks - 1))
    rho[lead] = share
    return rho


def edge(tasks: int, first: int, second: int) -> Tensor:
    """Two skills, half and half."""
    rho = torch.zeros(tasks)
    rho[first] = rho[second] = 0.5
    return rho
