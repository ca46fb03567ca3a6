"""Methods whose weights multiply whole updates: no coordinates matter, nothing is masked."""

from torch import Tensor

from dynmerge.merging.outcome import Cores
from dynmerge.merging.parameters import Values, number
from dynmerge.merging.support import Support, normed


def linear(support: Support, weights: Tensor, values: Values) -> Cores:
    """sum_i λ_i X_i: the exact weighted sum of deltas (PEFT's `cat`, not PEFT's `linear`).

    `weights` (skills,), not negative. One batched product per module shape: C = left diag(λ) right.
    Ilharco et al. 2023, arXiv:2212.04089.
    """
    lambdas = normed(weights, number(values, "p"))
    return Cores([group.weighted(lambdas) for group in support.groups])
