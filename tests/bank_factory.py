"""Random adapters and banks for tests that need no model: different ranks, disjoint modules."""

from collections.abc import Mapping

import torch

from dynmerge.adapters.adapter import Adapter
from dynmerge.adapters.lowrank import LowRank
from dynmerge.bank.bank import BaseIdentity, FactorBank
from dynmerge.bank.build import build_bank

BASE = BaseIdentity("random", "0" * 64)
SHAPES = {
    "layers.0.q": (12, 10),
    "layers.0.v": (4, 10),
    "layers.1.q": (12, 10),
    "layers.1.up": (20, 10),
}
RANKS: Mapping[str, Mapping[str, int]] = {
    "ada": {"layers.0.q": 2, "layers.1.q": 2},
    "bob": {"layers.0.q": 3, "layers.0.v": 1, "layers.1.q": 4},
    "cyd": {"layers.0.v": 3, "layers.1.up": 5},
}


def random_adapter(
    ranks: Mapping[str, int], seed: int, shapes: Mapping[str, tuple[int, int]] = SHAPES
) -> Adapter:
    """Gaussian factors, one LowRank per module of `ranks`."""
    generator = torch.Generator().manual_seed(seed)

    def factor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    updates = {
        module: LowRank(A=factor(rank, shapes[module][1]), B=factor(shapes[module][0], rank))
        for module, rank in ranks.items()
    }
    return Adapter(updates, BASE.name)


def random_adapters() -> dict[str, Adapter]:
    """One adapter for each row of RANKS."""
    return {name: random_adapter(ranks, seed) for seed, (name, ranks) in enumerate(RANKS.items())}


def random_bank(adapters: Mapping[str, Adapter] | None = None) -> FactorBank:
    """The bank of `adapters`, by default of `random_adapters()`."""
    return build_bank(BASE, adapters or random_adapters())


def flat_cores(bank: FactorBank) -> torch.Tensor:
    """(tasks, layout.size): every task's own core, module after module."""
    return torch.stack(
        [
            torch.cat([module.core(task).flatten() for module in bank.modules])
            for task in range(len(bank.tasks))
        ]
    )
