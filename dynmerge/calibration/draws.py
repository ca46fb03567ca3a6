"""Draws: random preferences to learn from, and random rows to learn on."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from dynmerge.texts.batches import alike

CENTRE = 0.25  # how often the uniform preference is drawn
POOL = 4  # batches among which rows are sorted by length


def preference(tasks: int, generator: Generator) -> Tensor:
    """A preference (tasks,): often the centre, else flat over some of the skills, two or more.

    How many is drawn too: preferences of real requests are sparse. One skill alone is exact in
    every form and teaches nothing.
    """
    if float(torch.rand((), generator=generator)) < CENTRE:
        return centre(tasks)
    count = int(torch.randint(2, tasks + 1, (), generator=generator))
    chosen = torch.randperm(tasks, generator=generator)[:count]
    # Normalised exponential draws are Dirichlet(1, .., 1).
    waits = -torch.rand(count, generator=generator).clamp(min=1e-12).log()
    return torch.zeros(tasks).index_put((chosen,), waits / waits.sum())


def centre(tasks: int) -> Tensor:
    """The uniform preference (tasks,)."""
    return torch.full((tasks,), 1 / tasks)


class Rows:
    """Batches of rows, random ones but of like length; every row before any again."""

    def __init__(self, lengths: Sequence[int], batch: int, generator: Generator) -> None:
        self.left: list[list[int]] = []
        self._lengths, self._batch = lengths, min(batch, len(lengths))
        self._generator = generator

    def take(self) -> list[int]:
        """The next batch; the last of a round may be smaller."""
        if not self.left:
            self.left = self._shuffled()
        return self.left.pop()

    def _shuffled(self) -> list[list[int]]:
        order = torch.randperm(len(self._lengths), generator=self._generator).tolist()
        made = []
        for start in range(0, len(order), POOL * self._batch):
            pool = order[start : start + POOL * self._batch]
            made += alike(self._lengths, self._batch, pool)
        places = torch.randperm(len(made), generator=self._generator).tolist()
        return [made[place] for place in places]
