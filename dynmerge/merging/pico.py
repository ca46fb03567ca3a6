"""Pico: shrink the output directions that skills share before a merge, restore the norm after it.

Tang & Yang 2026, arXiv:2604.16826. All of it on p x p matrices: with B_i = U left_i the paper's
S = I + U' diag(alpha - 1) U'^T is (I + k G)^-1 on U's coordinates and the identity outside them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dynmerge.bank.bank import FactorGroup
from dynmerge.merging.outcome import Outcome
from dynmerge.merging.parameters import Values, word
from dynmerge.merging.support import Support

# What to multiply with B^T for the sum of all G_i.
Gauge = Callable[[FactorGroup], Tensor]


def calibrated(support: Support, weights: Tensor, values: Values) -> Support:
    """The support with S B_i for every B_i; `weights` (skills,) count where `pool` says so."""
    gauge = word(values, "gauge")
    if word(values, "pool") == "preference":
        return _pooled(support, weights, GAUGES[gauge])
    equal = torch.ones_like(weights)
    return support.derive(("pico", gauge), lambda: _pooled(support, equal, GAUGES[gauge]))


def restored(outcome: Outcome, support: Support, weights: Tensor, values: Values) -> Outcome:
    """The merge times gamma = sum_i a_i ||X_i|| / ||merge|| in each module, if `restore` is norm.

    0 where the merge is nothing but rounding. `support` is the one before calibration.
    """
    if word(values, "restore") == "none":
        return outcome
    norms = support.keep("norms", lambda: [(group.norms(),) for group in support.groups])
    gammas = [
        gamma(own @ weights, found)
        for (own,), found in zip(norms, outcome.norms(support), strict=True)
    ]
    return outcome.scaled(support, gammas)


def gamma(wanted: Tensor, found: Tensor) -> Tensor:
    """wanted / found, norms alike in shape; 0 where what was found is nothing but rounding."""
    # Skills that cancel leave their rounding, which is not to be lifted to their norm.
    rounding = 64 * torch.finfo(found.dtype).eps * wanted
    return torch.where(found > rounding, wanted / found, 0)


def shrink(group: FactorGroup, weights: Tensor, gauge: Gauge) -> Tensor:
    """S (members, p, p): (I + (T_eff - 1) sum_i ρ_i G_i / sum_i ρ_i tr G_i)^-1.

    ρ are the weights of the skills that have these modules, made to sum to one; T_eff is
    1 / sum_i ρ_i^2: T where they are equal, 1 where there is one.
    """
    has = torch.tensor([rank > 0 for rank in group.ranks], device=weights.device)
    shares = weights * has / (weights * has).sum()
    pooled = (gauge(group) * group.per_direction(shares)) @ group.left.mT
    energy = pooled.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=1e-12)
    strength = (1 / shares.square().sum() - 1) / energy
    pooled.mul_(strength[:, None, None]).diagonal(dim1=-2, dim2=-1).add_(1)
    # The eigenvalues are 1 .. T: the inverse is well conditioned, and one call for all modules.
    inverse: Tensor = torch.linalg.inv(pooled)
    return inverse


def raw(group: FactorGroup) -> Tensor:
    """(members, p, K): B_i, so that G_i = B_i B_i^T with B as training left it."""
    return group.left


def canonical(group: FactorGroup) -> Tensor:
    """(members, p, K): B_i A_i A_i^T, so that G_i = X_i X_i^T.

    That is B_i B_i^T once the rows of A_i are made orthonormal.
    """
    factors = [group.of(skill) for skill in range(len(group.ranks))]
    return torch.cat([left @ (right @ right.mT) for left, right in factors], dim=2)


GAUGES: dict[str, Gauge] = {"raw": raw, "canonical": canonical}


def _pooled(support: Support, weights: Tensor, gauge: Gauge) -> Support:
    return support.calibrated(
        [
            shrink(group, weights, gauge) @ group.left if group.present else group.left
            for group in support.groups
        ]
    )
