"""Buckets: a unit's place in [0, 1), and the arm that place belongs to, as GrowthBook's SDKs have
them (hash version 2), so that every language finds the same. Knows no experiments.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from struct import iter_unpack

PLACES = 10_000  # how many places a unit may have

Range = tuple[float, float]  # from, to; the end is not in it


def fnv1a32(text: str, begun: int = 0x811C9DC5) -> int:
    """FNV-1a of 32 bits over UTF-16 code units, going on from the hash of what stands before."""
    found = begun
    for unit in text.encode() if text.isascii() else _code_units(text):
        found = (found ^ unit) * 0x01000193 & 0xFFFFFFFF
    return found


def place(seed: str, unit: str) -> float:
    """Where `unit` falls in [0, 1), to 4 decimals; other seeds place it independently."""
    return fnv1a32(str(fnv1a32(unit, _of_seed(seed)))) % PLACES / PLACES


def ranges(weights: Sequence[float], traffic: float) -> tuple[Range, ...]:
    """Each arm's part of [0, 1). `weights` sum to 1; more `traffic` only widens every part."""
    starts = (0.0, *accumulate(weights))
    return tuple(
        (start, start + traffic * weight) for start, weight in zip(starts, weights, strict=False)
    )


def chosen(where: float, parts: Sequence[Range]) -> int | None:
    """The number of the part that `where` lies in."""
    return next((index for index, (start, end) in enumerate(parts) if start <= where < end), None)


@lru_cache(1024)
def _of_seed(seed: str) -> int:
    return fnv1a32(seed)


def _code_units(text: str) -> Iterator[int]:
    return (unit for (unit,) in iter_unpack("<H", text.encode("utf-16-le", "surrogatepass")))
