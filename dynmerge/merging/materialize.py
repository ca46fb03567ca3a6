"""Materialize: a merge -> PEFT-shaped factors of a given rank. What `export` writes and stock
servers load.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dynmerge.adapters.adapter import Adapter
from dynmerge.adapters.lowrank import LowRank
from dynmerge.bank.bank import FactorBank, ModuleFactors
from dynmerge.merging.merge import Merge
from dynmerge.merging.outcome import Triplets
from dynmerge.merging.spectral import real, singular_directions, svd


@dataclass(frozen=True, slots=True, eq=False)
class Materialized:
    """An adapter that stands for a merge, and how much of the merge it is.

    `energy` is the share of the merge's squared Frobenius norm that the rank keeps, over all
    modules, of what the method itself kept; 1 for a merge that is zero.
    """

    adapter: Adapter
    rank: int
    energy: float


def materialize(
    bank: FactorBank,
    merge: Merge,
    rank: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Materialized:
    """The best adapter of at most `rank` (all of it by default) for a merge of `bank`.

    `progress(done, total)` is called after each module.

    With P S Q^T each module's thin SVD, B = P S^1/2 and A = S^1/2 Q^T: cut, they are the nearest
    update of that rank.
    """
    updates: dict[str, LowRank] = {}
    kept = total = 0.0
    for done, (module, (P, S, Q)) in enumerate(_directions(bank, merge), start=1):
        width = int(real(S).sum())
        width = width if rank is None else min(rank, width)
        root = S[:width].sqrt()
        kept += float(S[:width].square().sum())
        total += float(S.square().sum())
        progress(done, len(bank.modules))
        if not width:
            continue  # a module that no skill in the merge touches
        updates[module.name] = LowRank(
            A=(root[:, None] * Q[:, :width].mT).float(), B=(P[:, :width] * root).float()
        )
    adapter = Adapter(updates, bank.base.name)
    energy = (kept / total if total else 1.0) * merge.energy
    return Materialized(adapter, max(adapter.ranks, default=0), energy)


def _directions(bank: FactorBank, merge: Merge) -> Iterator[tuple[ModuleFactors, Triplets]]:
    """Every module with its update's P (d_out, k), S (k,) and Q (d_in, k), float64."""
    if merge.core is not None:
        for module, C in zip(bank.modules, bank.layout.split(merge.core.double()), strict=True):
            P, S, Q = svd(C)
            yield module, (module.U.double() @ P, S, module.V.double() @ Q)
    else:
        own = merge.own or {}
        for module in bank.modules:
            if module.name in own:
                update = own[module.name]
                yield module, singular_directions(update.B.double(), update.A.double())
