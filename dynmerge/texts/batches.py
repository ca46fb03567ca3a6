"""Batches: which examples run together: those of like length, and no more than memory likes."""

from collections.abc import Iterator, Sequence

from dynmerge.texts.examples import Examples

PREDICTIONS = 512  # at once: each is as long as the vocabulary


def alike(lengths: Sequence[int], batch: int, rows: Sequence[int] | None = None) -> list[list[int]]:
    """`rows` (by default all) in batches of at most `batch`, sorted by length."""
    chosen = range(len(lengths)) if rows is None else rows
    order = sorted(chosen, key=lambda row: lengths[row])
    return [order[start : start + batch] for start in range(0, len(order), batch)]


def batches(examples: Examples, batch: int) -> Iterator[list[int]]:
    """All rows, alike in length, at most `batch` and about PREDICTIONS predictions together."""
    for rows in alike(examples.lengths(), batch):
        size = max(1, PREDICTIONS // max(examples.counts(rows)))
        yield from (rows[start : start + size] for start in range(0, len(rows), size))
