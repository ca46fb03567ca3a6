"""A network of four layers for tests of what does not care which model it trains under."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dynmerge.adapters.adapter import Adapter
from dynmerge.adapters.lowrank import LowRank
from dynmerge.bank.bank import BaseIdentity, FactorBank
from dynmerge.bank.build import build_bank
from tests.bank_factory import random_adapter

SHAPES = {"a": (5, 6), "b": (5, 5), "c": (5, 5), "d": (4, 5)}
# Ranks and layers differ; one layer is bob's alone.
RANKS: Mapping[str, Mapping[str, int]] = {
    "ada": {"a": 2, "b": 1},
    "bob": {"b": 2, "c": 2, "d": 1},
    "cyd": {"a": 1, "d": 2},
}


class Network(nn.Module):
    """Six numbers -> four classes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, (d_out, d_in) in SHAPES.items():
            self.add_module(name, nn.Linear(d_in, d_out))

    def forward(self, x: Tensor) -> Tensor:
        for name in ("a", "b", "c"):
            x = self.get_submodule(name)(x).tanh()
        found: Tensor = self.get_submodule("d")(x)
        return 3 * found


class Points:
    """Examples of one or two predictions, around a place of their own."""

    def __init__(self, model: nn.Module, seed: int, rows: int, task: int) -> None:
        self.model = model
        generator = torch.Generator().manual_seed(seed)
        self.x = 0.3 * torch.randn(rows, 2, 6, generator=generator) + torch.eye(6)[2 * task]
        self.right = torch.randint(4, (rows, 2), generator=generator)
        self.digest = f"{seed:064d}"

    def __len__(self) -> int:
        return len(self.x)

    def counts(self, rows: Sequence[int]) -> list[int]:
        return [1 + row % 2 for row in rows]

    def lengths(self) -> list[int]:
        return [1 + row % 3 for row in range(len(self))]

    def logits(self, rows: Sequence[int]) -> Tensor:
        found: Tensor = self.model(torch.cat([self.x[row, : 1 + row % 2] for row in rows]))
        return found

    def targets(self, rows: Sequence[int]) -> Tensor | None:
        return torch.cat([self.right[row, : 1 + row % 2] for row in rows])


def network_bank() -> FactorBank:
    """Small updates: what is far away is not learned in a few steps."""
    adapters = {}
    for seed, (name, ranks) in enumerate(RANKS.items()):
        modules = random_adapter(ranks, seed, SHAPES).modules
        small = {module: LowRank(A=update.A, B=update.B / 2) for module, update in modules.items()}
        adapters[name] = Adapter(small, "network")
    return build_bank(BaseIdentity("network", "0" * 64), adapters)
