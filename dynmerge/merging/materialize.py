"""Materialize: a core -> PEFT-shaped factors of a given rank. What `export` writes and stock
servers load.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dynmerge.adapters.adapter import Adapter
from dynmerge.adapters.lowrank import LowRank
from dynmerge.bank.bank import FactorBank


@dataclass(frozen=True, slots=True, eq=False)
class Materialized:
    """An adapter that stands for a merge, and how much of the merge it is.

    `energy` is the share of the merge's squared Frobenius norm that the rank keeps, over all
    modules; 1 for a merge that is zero.
    """

    adapter: Adapter
    rank: int
    energy: float


def materialize(bank: FactorBank, core: Tensor, rank: int | None = None) -> Materialized:
    """The best adapter of at most `rank` (all of it by default) for the flat `core` (size,).

    With C = P S Q^T of one module, B = U P S^1/2 and A = S^1/2 Q^T V^T: the truncation is the
    nearest update of that rank because U and V are orthonormal.
    """
    updates: dict[str, LowRank] = {}
    kept = total = 0.0
    for module, C in zip(bank.modules, bank.layout.split(core.double()), strict=True):
        P, S, Qh = torch.linalg.svd(C, full_matrices=False)
        width = _width(S) if rank is None else min(rank, _width(S))
        root = S[:width].sqrt()
        kept += float(S[:width].square().sum())
        total += float(S.square().sum())
        if not width:
            continue  # a module that no skill in the merge touches
        updates[module.name] = LowRank(
            A=(root[:, None] * (Qh[:width] @ module.V.double().mT)).float(),
            B=((module.U.double() @ P[:, :width]) * root).float(),
        )
    adapter = Adapter(updates, bank.base.name)
    return Materialized(adapter, max(adapter.ranks, default=0), kept / total if total else 1.0)


def _width(S: Tensor) -> int:
    """How many of a core's singular values (descending) are more than float32 rounding."""
    noise = S[0] * S.shape[0] * torch.finfo(torch.float32).eps
    return int((noise < S).sum())
