"""SVC: turn down the directions of a merge in which the skills' shared content adds up.

Li et al. 2026, arXiv:2602.05536. A step after any method, on the output side, one number for each
singular direction of the merge.
"""

from dataclasses import dataclass

from torch import Tensor

from dynmerge.adapters.lowrank import LowRank
from dynmerge.bank.bank import FactorGroup, ModuleFactors
from dynmerge.merging.outcome import Cores, Outcome, Thin, Triplets
from dynmerge.merging.parameters import Values, number
from dynmerge.merging.spectral import singular_directions, svd
from dynmerge.merging.support import Support


def balanced(outcome: Outcome, support: Support, weights: Tensor, values: Values) -> Outcome:
    """The merge with each singular value divided by how often the skills' content is in it."""
    floor = number(values, "floor") or 1 / len(weights)
    if isinstance(outcome, Cores):
        directions = outcome.directions or [svd(cores) for cores in outcome.groups]
        groups = [
            _balanced_cores(triplets, group, weights, floor)
            for triplets, group in zip(directions, support.groups, strict=True)
        ]
        return Cores(groups)
    updates: dict[int, LowRank] = {}
    for group in support.groups:
        cores, own = group.cores()[:, group.present], weights[group.present]
        for index, member in enumerate(group.members):
            if member in outcome.updates:
                found = _inside(outcome.updates[member], support.bank.modules[member])
                eta = repeats(found.inside, cores[index][None], own, weights.sum(), floor)
                updates[member] = found.divided(eta[0])
    return Thin(updates, outcome.energy)


def repeats(
    directions: Triplets, cores: Tensor, weights: Tensor, total: Tensor, floor: float
) -> Tensor:
    """eta (members, k): the weighted mean over skills of max(floor, s), s the projection ratio.

    `directions` of the merge in the coordinates of the cores (members, skills, p, q): P and Q need
    not have unit columns, for a merge may reach outside the shared bases.
    s = <u^T W, u^T X_i> / ||u^T X_i||^2: how many times skill i's own content along u is there.
    W is taken per unit of all weights, so that doubling them doubles the result.
    """
    P, S, Q = directions
    own = P.mT[:, None] @ cores  # (members, skills, k, q): u^T X_i
    shared = (own * Q.mT[:, None]).sum(-1) * (S / total)[:, None]
    ratio = shared / own.square().sum(-1).clamp(min=1e-12)
    shares = weights / weights.sum()
    return (ratio.clamp(min=floor) * shares[:, None]).sum(1)


def _balanced_cores(
    triplets: Triplets, group: FactorGroup, weights: Tensor, floor: float
) -> Tensor:
    P, S, Q = triplets
    if group.present:
        cores, own = group.cores()[:, group.present], weights[group.present]
        S = S / repeats(triplets, cores, own, weights.sum(), floor)
    return (P * S[:, None]) @ Q.mT


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    """A thin update's SVD, in the layer's coordinates and, as far as it is there, the bases'."""

    left: Tensor  # (d_out, k)
    S: Tensor  # (k,)
    right: Tensor  # (d_in, k)
    inside: Triplets

    def divided(self, eta: Tensor) -> LowRank:
        return LowRank(A=self.right.mT, B=self.left * (self.S / eta))


def _inside(update: LowRank, module: ModuleFactors) -> _Found:
    left, S, right = singular_directions(update.B, update.A)
    inside = module.U.to(left).mT @ left, S, module.V.to(right).mT @ right
    return _Found(left, S, right, (inside[0][None], S[None], inside[2][None]))
