"""What a merge stands for, written out, so that it can be held to the oracle."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.testing import assert_close

from dynmerge.adapters.adapter import Adapter
from dynmerge.bank.bank import FactorBank
from dynmerge.bank.build import with_soups
from dynmerge.merging.choice import parse_method
from dynmerge.merging.merge import Merge, merge
from dynmerge.preference import Preference
from dynmerge.recipe import Recipe
from tests.bank_factory import random_adapters, random_bank, random_calibrations

ADAPTERS = random_adapters()


def soups_of(adapters: Mapping[str, Adapter]) -> dict[str, dict[str, float]]:
    """Weights as CAT's softmax leaves them: a layer's sum to one over the skills that have it."""
    ranks: dict[str, dict[str, int]] = {}
    for name, adapter in adapters.items():
        for module, update in adapter.modules.items():
            ranks.setdefault(module, {})[name] = update.rank + 1
    return {
        module: {name: rank / sum(having.values()) for name, rank in having.items()}
        for module, having in ranks.items()
    }


def bank_of(adapters: Mapping[str, Adapter]) -> FactorBank:
    """A bank that lacks nothing any method needs."""
    bank = with_soups(random_bank(adapters), soups_of(adapters))
    return replace(bank, calibrations=random_calibrations(bank))


BANK = bank_of(ADAPTERS)


def written_out(bank: FactorBank, made: Merge) -> dict[str, Tensor]:
    """Module name -> (d_out, d_in) float64, zero where the merge changes nothing."""
    updates = {
        module.name: torch.zeros(len(module.U), len(module.V), dtype=torch.float64)
        for module in bank.modules
    }
    if made.core is not None:
        cores = bank.layout.split(made.core.double())
        for module, C in zip(bank.modules, cores, strict=True):
            updates[module.name] = module.U.double() @ C @ module.V.double().mT
    for name, update in (made.own or {}).items():
        updates[name] = update.B.double() @ update.A.double()
    return updates


def made_by(weights: Mapping[str, float], method: str, bank: FactorBank = BANK) -> Merge:
    """The merge of raw weights by a method as in the header."""
    preference = Preference.of(weights, normalize=False, allow_negative=True)
    return merge(bank, Recipe(preference, parse_method(method), bank.digest))


def merged(
    weights: Mapping[str, float], method: str = "linear", bank: FactorBank = BANK
) -> dict[str, Tensor]:
    """The same, written out."""
    return written_out(bank, made_by(weights, method, bank))


def assert_same(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 3e-5
) -> None:
    """Both change the same modules in the same way; what is not there is zero."""
    assert set(expected) <= set(actual)
    for module, update in actual.items():
        wanted = expected.get(module, torch.zeros_like(update))
        size = max(float(wanted.abs().max()), 1.0)
        assert_close(update / size, wanted / size, rtol=0, atol=tolerance, msg=f"{module} differs")
