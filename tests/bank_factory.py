"""Random adapters and banks for tests that need no model: different ranks, disjoint modules."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from zlib import crc32

import torch

from dynmerge.adapters.adapter import Adapter
from dynmerge.adapters.lowrank import LowRank
from dynmerge.bank.bank import BaseIdentity, FactorBank, ModuleFactors
from dynmerge.bank.build import build_bank
from dynmerge.bank.calibration import Calibration

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


def random_calibration(
    bank: FactorBank,
    method: str,
    shapes: Callable[[ModuleFactors], Mapping[str, tuple[int, ...]]],
    form: str = "ratio",
    shared: Mapping[str, torch.Tensor] | None = None,
) -> Calibration:
    """Gaussian tensors of these shapes in every module, a draw of its own for every method.

    `shared` is what all modules share.
    """
    seed = crc32(method.encode())
    generator = torch.Generator().manual_seed(seed)
    tensors = {f".{label}": tensor for label, tensor in (shared or {}).items()}
    for module in bank.modules:
        for label, shape in shapes(module).items():
            tensors[f"{module.name}.{label}"] = torch.randn(shape, generator=generator)
    return Calibration(method, form, bank.coordinates_digest, tensors, {"seed": seed})


def random_calibrations(bank: FactorBank) -> tuple[Calibration, ...]:
    """One for every method that reads one, sorted by method."""
    tasks = len(bank.tasks)
    pairs = tasks * (tasks - 1) // 2

    def moments(module: ModuleFactors) -> dict[str, tuple[int, ...]]:
        q = module.core_shape[1]
        return {"moments": (tasks, q, q)}

    def ratio(width: int) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(("ratio", "gain"), (tasks, width))

    regmean = random_calibration(bank, "regmean", moments, "closed")
    # Full rank and far from equal, as second moments of some texts.
    squares = {name: G @ G.mT for name, G in regmean.tensors.items()}
    return (
        random_calibration(bank, "adamerging", lambda module: ratio(tasks)),
        random_calibration(
            bank,
            "core",
            lambda module: {**ratio(tasks), "tables": (pairs, *module.core_shape)},
        ),
        replace(regmean, tensors=squares),
        random_calibration(
            bank, "tara-a", lambda module: {"bubbles": (pairs, sum(module.ranks))}, "bubbles"
        ),
        random_calibration(bank, "tara-b", lambda module: ratio(tasks * module.core_shape[0])),
        Calibration("tuned", "norm", bank.coordinates_digest, {".p": torch.tensor(3.5)}),
    )
