"""Simplex: preferences to try: each skill alone, equal shares, and an even grid between skills."""

from collections.abc import Iterator, Sequence

from dynmerge.errors import ConfigError
from dynmerge.preference import GRID, Preference

GRID_SKILLS = (2, 3)


def corners(skills: Sequence[str]) -> list[Preference]:
    """Every skill alone."""
    return [Preference.of({skill: 1.0}) for skill in skills]


def uniform(skills: Sequence[str]) -> Preference:
    """Equal shares of all."""
    return Preference.of(dict.fromkeys(skills, 1.0))


def even_grid(skills: Sequence[str], steps: int) -> list[Preference]:
    """All preferences for two or three skills whose shares are multiples of 1 / steps.

    Raises ConfigError for another number of skills, or steps that preferences' thousandths
    cannot keep even.
    """
    if len(skills) not in GRID_SKILLS:
        raise ConfigError(f"a grid is over two or three skills; here are {len(skills)}")
    if steps < 1 or GRID % steps:
        even = ", ".join(str(number) for number in range(1, 51) if GRID % number == 0)
        raise ConfigError(f"a grid of {steps} steps is not even in thousandths; take one of {even}")
    return [
        Preference.of(dict(zip(skills, shares, strict=True)))
        for shares in _compositions(steps, len(skills))
    ]


def _compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write `total` as an ordered sum of `parts` numbers, the first ones largest."""
    if parts == 1:
        yield (total,)
        return
    for first in range(total, -1, -1):
        for rest in _compositions(total - first, parts - 1):
            yield (first, *rest)
