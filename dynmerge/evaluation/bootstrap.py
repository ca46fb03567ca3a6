"""Estimates with intervals: the bootstrap over examples, percentile intervals.

Estimates made with the same draws are paired: what their difference or ratio says of the examples'
luck cancels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynmerge.merging.sparsify import generator

SAMPLES, LEVEL = 2000, 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """What was measured, and between which bounds it lies at the level asked for."""

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
        tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=self.draws.dtype)
        low, high = torch.nanquantile(self.draws, tails).tolist()
        return Interval(self.value, low, high)


def resamplings(examples: int, samples: int, seed: int, name: str) -> Tensor:
    """(samples, examples) float64: how often each example is in each resampling.

    Tasks of different names are resampled apart.
    """
    rng = generator(seed, "bootstrap", name)
    drawn = torch.randint(examples, (samples, examples), generator=rng)
    weights = torch.zeros(samples, examples, dtype=torch.float64)
    return weights.scatter_add_(1, drawn, torch.ones_like(weights))


def share(parts: Tensor, wholes: Tensor, weights: Tensor) -> Estimate:
    """sum parts / sum wholes over examples (examples,), resampled by `weights`."""
    parts, wholes = parts.double(), wholes.double()
    return Estimate(float(parts.sum() / wholes.sum()), (weights @ parts) / (weights @ wholes))


def combined(estimates: Sequence[Estimate], function: Callable[[Tensor], Tensor]) -> Estimate:
    """`function` of estimates (..., estimates) -> (...), in every resampling."""
    value = function(torch.tensor([one.value for one in estimates], dtype=torch.float64))
    return Estimate(float(value), function(torch.stack([one.draws for one in estimates], dim=-1)))


def difference(first: Estimate, second: Estimate) -> Estimate:
    """first - second."""
    return combined([first, second], lambda pair: pair[..., 0] - pair[..., 1])


def ratio(first: Estimate, second: Estimate) -> Estimate:
    """first / second; infinite or NaN where the second is 0."""
    return combined([first, second], lambda pair: pair[..., 0] / pair[..., 1])


def mean(estimates: Sequence[Estimate]) -> Estimate:
    """Their mean."""
    return combined(estimates, lambda all: all.mean(-1))


def least(estimates: Sequence[Estimate]) -> Estimate:
    """The smallest of them."""
    return combined(estimates, lambda all: all.amin(-1))
