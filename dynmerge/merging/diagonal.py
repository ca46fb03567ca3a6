"""Diagonal: a merge as one number per stacked direction of the bank, where its method allows that.

In the skills' own factors B = [B_1 .. B_T] and A = [A_1; ..; A_T] such a merge is B diag(d) A: an
engine that holds B and A for all requests needs d alone, a few numbers for each rank of each skill.
"""

import torch
from torch import Tensor

from dynmerge.bank.bank import FactorBank
from dynmerge.merging.choice import parts_of, settled
from dynmerge.merging.methods import SCALE
from dynmerge.merging.parameters import number
from dynmerge.recipe import MethodChoice, Recipe


def is_diagonal(method: MethodChoice) -> bool:
    """Whether merges by `method` are diagonal in the skills' own directions."""
    before, _, after = parts_of(method.name)
    return not before and not after and settled(method)[0].diagonal is not None


class Diagonal:
    """The diagonals of one bank's merges: K numbers per module, modules in the bank's order."""

    def __init__(self, bank: FactorBank) -> None:
        self.bank = bank
        self.sizes = [sum(module.ranks) for module in bank.modules]

    def of(self, recipe: Recipe) -> Tensor:
        """d (sum of sizes,), float32, on the bank's device. The method must be diagonal."""
        if recipe.is_base:
            return torch.zeros(sum(self.sizes), device=self.bank.device)
        row, values = settled(recipe.method)
        assert row.diagonal is not None
        vector = torch.tensor(recipe.preference.vector(self.bank.names), device=self.bank.device)
        weights = row.diagonal(self.bank, vector.abs(), values)
        _, tasks = self.bank.directions
        return weights * (vector.sign() * number(values, SCALE.name))[tasks]
