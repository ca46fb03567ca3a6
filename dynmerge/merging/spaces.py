"""Spaces: the coordinates in which an elementwise method sees the updates, and the way back.

Core space is the bank's own and is held whole; KnOTS and full space are dense in at least one
dimension and are made module by module, as often as they are looked at.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dynmerge.adapters.lowrank import LowRank
from dynmerge.bank.bank import FactorGroup, ModuleFactors
from dynmerge.merging.outcome import Cores, Outcome, Thin
from dynmerge.merging.sparsify import Block, Stream, generator
from dynmerge.merging.spectral import real, svd
from dynmerge.merging.support import Support

Step = Callable[[Block], tuple[Tensor, ...]]  # the entries, and notes on them
Maker = Callable[[], Step]  # looks at the whole model first
EXACT = 256  # min(d_out, d_in) up to which a dense SVD finds the best rank
OVERSAMPLING, ITERATIONS = 16, 6


class Space(Protocol):
    """A support's entries in some coordinates, and how a merge of them becomes updates again."""

    @property
    def keeps(self) -> bool:
        """Whether `each` keeps its blocks."""
        ...

    def blocks(self) -> Iterator[Block]:
        """The entries of all modules."""
        ...

    def each(self, key: Hashable, maker: Maker) -> Iterable[Block]:
        """The blocks after a step, kept under `key` where the space is small."""
        ...

    def home(self, merged: Iterable[Tensor], rank: int) -> Outcome:
        """The merged entries (members, a, b) of every block as updates, of at most `rank`."""
        ...


class CoreSpace:
    """The cores X_i in the bank's shared bases."""

    keeps = True

    def __init__(self, support: Support) -> None:
        self._support = support

    def blocks(self) -> Iterator[Block]:
        """One block for each group of the support."""
        for group in self._support.groups:
            yield Block(_names(self._support, group), tuple(group.present), group.cores())

    def each(self, key: Hashable, maker: Maker) -> Iterable[Block]:
        """The blocks after a step, kept with the support."""

        def make() -> list[tuple[Tensor, ...]]:
            step = maker()
            return [step(block) for block in self.blocks()]

        kept = self._support.keep(key, make)
        return [
            Block(_names(self._support, group), tuple(group.present), entries, tuple(notes))
            for group, (entries, *notes) in zip(self._support.groups, kept, strict=True)
        ]

    def home(self, merged: Iterable[Tensor], rank: int) -> Outcome:
        """They are cores already; they have the bases' rank, whatever `rank`."""
        return Cores(list(merged))


class _Dense:
    """A space too large to hold: one module at a time, made again for each look, none kept."""

    keeps = False

    def __init__(
        self, support: Support, entries: Callable[[ModuleFactors, Tensor], Tensor]
    ) -> None:
        """`entries` gives (skills, a, b) from a module and its cores (skills, p, q)."""
        self._support = support
        self._entries = entries

    def blocks(self) -> Iterator[Block]:
        """One block (1, skills, a, b) for each module."""
        for _, module, group, cores in self._modules():
            yield Block((module.name,), tuple(group.present), self._entries(module, cores)[None])

    def each(self, key: Hashable, maker: Maker) -> Iterable[Block]:
        """The blocks after a step, which is made once however often they are looked at."""
        return _Stepped(self.blocks, maker())

    def _modules(self) -> Iterator[tuple[int, ModuleFactors, FactorGroup, Tensor]]:
        """Every module the support changes: its place, factors, group, cores (skills, p, q)."""
        for group in self._support.groups:
            if group.present:
                cores = group.cores()
                for index, member in enumerate(group.members):
                    self._support.check_wanted()
                    yield member, self._support.bank.modules[member], group, cores[index]


@dataclass(frozen=True, slots=True, eq=False)
class _Stepped:
    """Blocks after a step, one at a time, as often as they are iterated."""

    blocks: Stream
    step: Step

    def __iter__(self) -> Iterator[Block]:
        for block in self.blocks():
            entries, *notes = self.step(block)
            yield Block(block.modules, block.present, entries, tuple(notes))


class KnotsSpace(_Dense):
    """P_i (R, d_in) with X_i = U Q P_i, where Q are the left singular vectors of [X_1 .. X_T].

    Stoica et al. 2025, arXiv:2410.19735. V is orthonormal, so the SVD is that of the cores side by
    side.
    """

    def __init__(self, support: Support) -> None:
        super().__init__(support, self._parts)
        # Found once: a second SVD need not choose the same signs.
        self._bases: dict[str, Tensor] = {}

    def home(self, merged: Iterable[Tensor], rank: int) -> Outcome:
        """U Q times the merged P: exact, whatever `rank`."""
        updates: dict[int, LowRank] = {}
        for (member, module, _, cores), P in zip(self._modules(), merged, strict=True):
            updates[member] = LowRank(A=P[0], B=module.U.to(cores) @ self._basis(module, cores))
        return Thin(updates)

    def _parts(self, module: ModuleFactors, cores: Tensor) -> Tensor:
        return self._basis(module, cores).mT @ cores @ module.V.to(cores).mT

    def _basis(self, module: ModuleFactors, cores: Tensor) -> Tensor:
        """Q (p, R): the left singular vectors of the cores side by side, but for rounding."""
        basis = self._bases.get(module.name)
        if basis is None:
            P, S, _ = svd(torch.cat(list(cores), dim=1))
            basis = self._bases[module.name] = P[:, real(S)]
        return basis


class FullSpace(_Dense):
    """The dense updates themselves, (d_out, d_in)."""

    def __init__(self, support: Support) -> None:
        super().__init__(support, _dense)

    def home(self, merged: Iterable[Tensor], rank: int) -> Outcome:
        """Cut to the best `rank`; 0 is the sum of the support's ranks in the module."""
        updates: dict[int, LowRank] = {}
        kept = total = 0.0
        for (member, module, group, _), dense in zip(self._modules(), merged, strict=True):
            update = best_rank(dense[0], rank or sum(group.ranks), module.name)
            updates[member] = update
            kept += float(update.B.square().sum())  # A's rows are orthonormal
            total += float(dense.square().sum())
        return Thin(updates, kept / total if total else 1.0)


SPACES: dict[str, Callable[[Support], Space]] = {
    "core": CoreSpace,
    "knots": KnotsSpace,
    "full": FullSpace,
}


def best_rank(dense: Tensor, rank: int, name: str = "") -> LowRank:
    """The update of at most `rank` nearest to `dense` (d_out, d_in); A's rows are orthonormal.

    By a dense SVD, or for large layers by subspace iteration from a start drawn for `name` (Halko
    et al. 2011, arXiv:0909.4061), whose loss is part of the energy that is reported.
    """
    rank = min(rank, *dense.shape)
    width = rank + OVERSAMPLING
    if min(dense.shape) <= EXACT or 2 * width > min(dense.shape):
        P, S, Q = svd(dense)
        return LowRank(A=Q[:, :rank].mT, B=P[:, :rank] * S[:rank])
    start = torch.randn(len(dense), width, generator=generator(0, "best_rank", name))
    basis = torch.linalg.qr(start.to(dense)).Q
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(dense.mT @ basis).Q
        basis = torch.linalg.qr(dense @ basis).Q
    P, S, Q = svd(basis.mT @ dense)
    return LowRank(A=Q[:, :rank].mT, B=basis @ P[:, :rank] * S[:rank])


def _dense(module: ModuleFactors, cores: Tensor) -> Tensor:
    """(skills, d_out, d_in) from cores (skills, p, q)."""
    return module.U.to(cores) @ cores @ module.V.to(cores).mT


def _names(support: Support, group: FactorGroup) -> tuple[str, ...]:
    return tuple(support.bank.modules[member].name for member in group.members)
