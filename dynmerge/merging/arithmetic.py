"""Methods whose weights multiply whole updates: no coordinates matter, nothing is masked.

Each is one weight per skill and module, which the `diagonal` of a row of METHODS gives without
making the merge: an engine that holds the skills' own factors needs no more.
"""

import torch
from torch import Tensor

from dynmerge.bank.bank import FactorBank
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


def linear_diagonal(bank: FactorBank, weights: Tensor, values: Values) -> Tensor:
    """λ of `linear` at every stacked direction, from the magnitudes (tasks,) of all tasks."""
    _, tasks = bank.directions
    return normed(weights, number(values, "p"))[tasks]


def lora_soups(support: Support, weights: Tensor, values: Values) -> Cores:
    """sum_i λ_i X_i with the weights that the bank carries, one per skill and module (CAT).

    λ_i = a_i c_i / (sum_j a_j c_j) * c * sum a, j over the skills that have the module, c the sum
    of all the bank's weights there: the learned ones at the uniform preference. Prabhakar et al.
    2024, arXiv:2410.13025.
    """
    cores = []
    for group, whole in zip(support.groups, support.bank.groups, strict=True):
        assert group.soups is not None and whole.soups is not None  # noqa: PT018 - check_bank
        lambdas = _souped(group.soups, whole.soups, weights)
        ranks = torch.tensor(group.ranks, device=weights.device)
        spread = lambdas.repeat_interleave(ranks, 1, output_size=sum(group.ranks))
        cores.append((group.left * spread[:, None]) @ group.right)
    return Cores(cores)


def soup_diagonal(bank: FactorBank, weights: Tensor, values: Values) -> Tensor:
    """λ of `lora_soups` at every stacked direction, from the magnitudes (tasks,)."""

    def stacked() -> Tensor:
        return torch.tensor([module.soup for module in bank.modules], device=bank.device)

    soups = bank.keep("soups", stacked)
    return _souped(soups, soups, weights)[bank.directions]


def _souped(own: Tensor, whole: Tensor, weights: Tensor) -> Tensor:
    """λ (modules, skills): `own` are the soup weights of the skills, `whole` those of all tasks."""
    shared = (own * weights).sum(1, keepdim=True)
    total = whole.sum(1, keepdim=True) * weights.sum()
    return own * weights * total / shared.clamp(min=torch.finfo(shared.dtype).tiny)
