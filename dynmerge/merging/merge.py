"""Merge: a recipe carried out. What the cache keeps and the engine runs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dynmerge.bank.bank import FactorBank
from dynmerge.errors import DynmergeError
from dynmerge.merging.methods import assemble
from dynmerge.recipe import Recipe


@dataclass(frozen=True, slots=True, eq=False)
class Merge:
    """The cores of all modules under one recipe, flat as the bank's layout says."""

    recipe: Recipe
    core: Tensor  # (size,) in the engine's dtype, on the bank's device

    @property
    def nbytes(self) -> int:
        """Device bytes it keeps."""
        return self.core.numel() * self.core.element_size()


def merge(bank: FactorBank, recipe: Recipe, dtype: torch.dtype = torch.float32) -> Merge:
    """Carry out `recipe`: computed in float32, cast once. The bank must be the recipe's own."""
    if recipe.bank != bank.digest:
        raise DynmergeError(f"recipe {recipe.digest} is for another bank than {bank.digest[:12]}")
    return Merge(recipe, assemble(bank, [recipe.preference], recipe.method)[0].to(dtype))
