"""Estimates with intervals: the bootstrap over examples, percentile intervals.

Estimates made with the same draws are paired: what their difference or ratio says of the examples'
luck cancels.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynmerge.merging.sparsify import generator

SAMPLES, LEVEL = 2000, 0.95
CHUNK = 2**18  # entries of resamplings that are held at once, 2 MB


@dataclass(frozen=True, slots=True)
class Interval:
    """What was measured, and between which bounds it lies at the level asked for.

    A bound may be infinite. All are NaN where there is no number at all.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, slots=True, eq=False)
class Estimate:
    """A number from examples, and the same number from each resampling of them."""

    value: float
    draws: Tensor  # (samples,) float64

    def interval(self, level: float = LEVEL) -> Interval:
        """The percentile interval; resamplings that give no number (0 / 0) are left out."""
        low = self._quantile((1 - level) / 2, "lower")
        return Interval(self.value, low, self._quantile((1 + level) / 2, "higher"))

    def _quantile(self, share: float, outward: str) -> float:
        """Between two draws; nothing is between one and infinity, and the `outward` one counts."""
        between = float(torch.nanquantile(self.draws, share))
        if math.isfinite(between):
            return between
        return float(torch.nanquantile(self.draws, share, interpolation=outward))


def resamplings(examples: int, samples: int, seed: int, name: str) -> Tensor:
    """(samples, examples) float64: how often each example is in each resampling.

    Tasks of different names are resampled apart.
    """
    return torch.cat(list(_chunks(examples, samples, seed, name)))


def share(parts: Tensor, wholes: Tensor, weights: Tensor) -> Estimate:
    """sum parts / sum wholes over examples (examples,), resampled by `weights`."""
    parts, wholes = parts.double(), wholes.double()
    return Estimate(float(parts.sum() / wholes.sum()), (weights @ parts) / (weights @ wholes))


def shares(parts: Tensor, wholes: Tensor, samples: int, seed: int, name: str) -> list[Estimate]:
    """`share` of each row of parts (n, examples) by `resamplings`, which it never holds all of."""
    parts, wholes = parts.double(), wholes.double()
    draws = torch.empty(len(parts), samples, dtype=torch.float64)
    start = 0
    for weights in _chunks(len(wholes), samples, seed, name):
        draws[:, start : start + len(weights)] = (parts @ weights.T) / (weights @ wholes)
        start += len(weights)
    values = (parts.sum(-1) / wholes.sum()).tolist()
    return [Estimate(*one) for one in zip(values, draws, strict=True)]


def combined(estimates: Sequence[Estimate], function: Callable[[Tensor], Tensor]) -> Estimate:
    """`function` of estimates (..., estimates) -> (...), in every resampling."""
    value = function(torch.tensor([one.value for one in estimates], dtype=torch.float64))
    return Estimate(float(value), function(torch.stack([one.draws for one in estimates], dim=-1)))


def difference(first: Estimate, second: Estimate) -> Estimate:
    """first - second."""
    return combined([first, second], lambda pair: pair[..., 0] - pair[..., 1])


def ratio(first: Estimate, second: Estimate) -> Estimate:
    """first / second. Where the second is 0 it is infinite, and 0 / 0 is no number (NaN)."""
    return combined([first, second], lambda pair: pair[..., 0] / pair[..., 1])


def mean(estimates: Sequence[Estimate]) -> Estimate:
    """Their mean."""
    return combined(estimates, lambda all: all.mean(-1))


def least(estimates: Sequence[Estimate]) -> Estimate:
    """The smallest of them."""
    return combined(estimates, lambda all: all.amin(-1))


def _chunks(examples: int, samples: int, seed: int, name: str) -> Iterator[Tensor]:
    """The rows of `resamplings`, some at a time: a generator draws the same in pieces."""
    rng = generator(seed, "bootstrap", name)
    rows = max(1, CHUNK // examples)
    for start in range(0, samples, rows):
        drawn = torch.randint(examples, (min(rows, samples - start), examples), generator=rng)
        weights = torch.zeros(drawn.shape, dtype=torch.float64)
        yield weights.scatter_add_(1, drawn, torch.ones_like(weights))
