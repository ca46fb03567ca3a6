"""Diagnostics: what a bank's geometry says about merging it, by the measures of Pico and TARA.

Data-free, in float64, from the factors in the shared bases: no `d_out x d_in` array is made. What
the skills' texts say is `sensitivity.py`'s.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from dynmerge.bank.bank import FactorBank, FactorGroup, ModuleFactors
from dynmerge.bank.inspection import (
    Overlap,
    compare_tasks,
    effective_rank,
    split_name,
)
from dynmerge.merging.pico import gamma, raw, shrink
from dynmerge.merging.spectral import real, singular_directions

ALL = "all"  # the kind that stands for every module


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Singular values, descending, without what is rounding, and what Pico reads off them.

    `omax` is the largest one's share of the energy, the stable rank its inverse, `condition` the
    largest over the smallest. All 0 for a zero matrix.
    """

    values: tuple[float, ...]
    norm: float
    omax: float
    effective_rank: float
    stable_rank: float
    condition: float

    @property
    def energies(self) -> tuple[float, ...]:
        """Each value's share of the sum of squares."""
        total = sum(value**2 for value in self.values) or 1.0
        return tuple(value**2 / total for value in self.values)

    def top(self, count: int) -> float:
        """The share of the energy in the first `count` directions."""
        return sum(self.energies[:count])


@dataclass(frozen=True, slots=True)
class Change:
    """A spectrum before Pico and after it."""

    before: Spectrum
    after: Spectrum


@dataclass(frozen=True, slots=True)
class Factor:
    """One factor of an adapter, A or B, as training left it."""

    effective_rank: float
    omax: float


@dataclass(frozen=True, slots=True)
class Asymmetry:
    """Overlap of A and of B, means over `pairs` of skills with a module in common.

    `higher` is the share of pairs with O_B > O_A (Pico's), `further` the share whose B exceeds
    chance by more than their A does: a small d_out alone makes B overlap more.
    """

    pairs: int
    A: Overlap
    B: Overlap
    higher: float
    further: float


@dataclass(frozen=True, slots=True)
class Coverage:
    """Effective ranks of the updates summed and stacked (TARA's subspace coverage).

    `independent` is sum_i erank(Delta_i); `dense` of the stack of the vectorised Delta_i, which can
    be no more than their number; `rank_one` of the stack of all vectorised b_k a_k^T as training
    left them, which depends on the factors' gauge; `singular` of the sigma_k u_k v_k^T of every
    Delta_i instead, which does not. A share is of `independent`; 0 where there is nothing.
    """

    independent: float
    dense: float
    rank_one: float
    singular: float
    dense_share: float
    rank_one_share: float
    singular_share: float


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """One module that `skills` of the bank change, or the mean over the modules of a kind.

    `A` and `B` are means over the skills. `stacked` is the spectrum of [B_1 .. B_T], `merged` of
    the merge with equal weights, after Pico with its norm restored; a mean over modules averages
    the j-th values, 0 where there are fewer.
    """

    name: str
    modules: int
    skills: float
    asymmetry: Asymmetry | None
    A: Factor
    B: Factor
    coverage: Coverage
    stacked: Change
    merged: Change


@dataclass(frozen=True, slots=True)
class Diagnostics:
    """What `dynmerge inspect --full` adds. `kinds`: of modules that several skills change."""

    modules: tuple[Diagnosis, ...]
    kinds: tuple[Diagnosis, ...]  # the last is over all of them; none where nothing is shared

    def to_json(self) -> str:
        """All of it as one JSON object."""
        return json.dumps(asdict(self), indent=2)


def diagnose_bank(
    bank: FactorBank, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> Diagnostics:
    """Measure `bank`. `progress(done, total)` is called after each module."""
    modules = []
    for done, module in enumerate(bank.modules, start=1):
        modules.append(diagnose(module))
        progress(done, len(bank.modules))
    return Diagnostics(tuple(modules), _by_kind([one for one in modules if one.skills > 1]))


def diagnose(module: ModuleFactors) -> Diagnosis:
    """Everything about one module."""
    spans = [span for span in module.slices() if span.stop > span.start]
    A = [spectrum(module.right[span].double()) for span in spans]
    B = [spectrum(module.left[:, span].double()) for span in spans]
    return Diagnosis(
        name=module.name,
        modules=1,
        skills=len(spans),
        asymmetry=asymmetry(compare_tasks(module)),
        A=_mean_factor(A),
        B=_mean_factor(B),
        coverage=coverage(module),
        stacked=stacked_change(module),
        merged=merged_change(module),
    )


def asymmetry(compared: Tensor) -> Asymmetry | None:
    """Means over pairs of `compare_tasks`' (4, tasks, tasks); None where no pair shares a module.

    Tang & Yang 2026, arXiv:2604.16826: O_B against O_A; less chance, r / d, which is not theirs.
    """
    upper = torch.ones_like(compared[0]).triu(1).bool() & ~compared.isnan().any(0)
    A, chance_A, B, chance_B = compared[:, upper]
    if not len(A):
        return None
    return Asymmetry(
        pairs=len(A),
        A=_overlap(float(A.mean()), float(chance_A.mean())),
        B=_overlap(float(B.mean()), float(chance_B.mean())),
        higher=float((B > A).double().mean()),
        further=float((B - chance_B > A - chance_A).double().mean()),
    )


def coverage(module: ModuleFactors) -> Coverage:
    """The effective ranks, each stack's from the Gram matrix of its rows (arXiv:2603.26299).

    A block of the rank-1 directions' Gram matrix sums to <Delta_i, Delta_j>.
    """
    group = _alone(module)
    triplets = [singular_directions(*group.of(task)) for task in range(len(module.ranks))]
    scaled = torch.cat([P * S[:, None] for P, S, _ in triplets], dim=-1)
    rows = torch.cat([Q for _, _, Q in triplets], dim=-1).mT
    gram = _gram(group.left[0], group.right[0])
    ranks = torch.tensor(module.ranks, device=gram.device)
    owner = torch.eye(len(ranks), dtype=gram.dtype, device=gram.device)
    owner = owner.repeat_interleave(ranks, dim=0)  # (K, tasks)
    return _coverage(
        independent=sum(effective_rank(S[0]) for _, S, _ in triplets),
        dense=_stacked_rank(owner.mT @ gram @ owner),
        rank_one=_stacked_rank(gram),
        singular=_stacked_rank(_gram(scaled[0], rows[0])),
    )


def stacked_change(module: ModuleFactors) -> Change:
    """B_all = [B_1 .. B_T] and S B_all, with Pico's S at the uniform preference."""
    left = module.left.double()
    return Change(before=spectrum(left), after=spectrum(_shrunk(module)))


def merged_change(module: ModuleFactors) -> Change:
    """The mean over all skills of the bank, and what Pico makes of it, its norm restored.

    Gauge-free but for S: what the model gets, whatever factors it is written in.
    """
    right = module.right.double()
    mean = (module.left.double() @ right) / len(module.ranks)
    shrunk = (_shrunk(module) @ right) / len(module.ranks)
    wanted = _alone(module).norms()[0].mean()
    factor = gamma(wanted, torch.linalg.matrix_norm(shrunk))
    return Change(before=spectrum(mean), after=spectrum(factor * shrunk))


def spectrum(matrix: Tensor) -> Spectrum:
    """The spectrum of a matrix that was kept in float32."""
    values = torch.linalg.svdvals(matrix)
    values = values[real(values)]
    if not len(values):
        return Spectrum((), 0.0, 0.0, 0.0, 0.0, 0.0)
    energy = values.square().sum() / values[0].square()
    return Spectrum(
        values=tuple(values.tolist()),
        norm=float(values.norm()),
        omax=float(1 / energy),
        effective_rank=effective_rank(values),
        stable_rank=float(energy),
        condition=float(values[0] / values[-1]),
    )


def _alone(module: ModuleFactors) -> FactorGroup:
    """The module as a group of one, in float64."""
    return FactorGroup(
        members=(0,),
        left=module.left.double()[None],
        right=module.right.double()[None],
        ranks=module.ranks,
    )


def _shrunk(module: ModuleFactors) -> Tensor:
    """S B_all (p, K)."""
    group = _alone(module)
    equal = torch.ones(len(module.ranks), dtype=group.left.dtype, device=group.left.device)
    shrunk: Tensor = shrink(group, equal, raw)[0] @ group.left[0]
    return shrunk


def _gram(left: Tensor, right: Tensor) -> Tensor:
    """(K, K): <l_i r_i^T, l_j r_j^T> = <l_i, l_j> <r_i, r_j>, columns of left and rows of right."""
    return (left.mT @ left) * (right @ right.mT)


def _stacked_rank(gram: Tensor) -> float:
    """The effective rank of the stack whose rows have this Gram matrix."""
    return effective_rank(torch.linalg.eigvalsh(gram).clamp(min=0).sqrt())


def _by_kind(modules: Sequence[Diagnosis]) -> tuple[Diagnosis, ...]:
    kinds = dict.fromkeys(split_name(module.name)[1] for module in modules)
    alike = [
        (kind, [module for module in modules if split_name(module.name)[1] == kind])
        for kind in kinds
    ]
    if modules:
        alike.append((ALL, list(modules)))
    return tuple(_averaged(name, members) for name, members in alike)


def _averaged(name: str, modules: Sequence[Diagnosis]) -> Diagnosis:
    return Diagnosis(
        name=name,
        modules=len(modules),
        skills=_mean([module.skills for module in modules]),
        asymmetry=_mean_asymmetry([one.asymmetry for one in modules if one.asymmetry]),
        A=_mean_factor([module.A for module in modules]),
        B=_mean_factor([module.B for module in modules]),
        coverage=_mean_coverage([module.coverage for module in modules]),
        stacked=_mean_change([module.stacked for module in modules]),
        merged=_mean_change([module.merged for module in modules]),
    )


def _mean_asymmetry(items: Sequence[Asymmetry]) -> Asymmetry | None:
    """Over pairs, not over modules: each pair of skills counts in each module it shares."""
    pairs = sum(item.pairs for item in items)
    if not pairs:
        return None

    def mean(read: Callable[[Asymmetry], float]) -> float:
        return sum(item.pairs * read(item) for item in items) / pairs

    return Asymmetry(
        pairs=pairs,
        A=_overlap(mean(lambda item: item.A.measured), mean(lambda item: item.A.chance)),
        B=_overlap(mean(lambda item: item.B.measured), mean(lambda item: item.B.chance)),
        higher=mean(lambda item: item.higher),
        further=mean(lambda item: item.further),
    )


def _mean_factor(items: Sequence[Factor | Spectrum]) -> Factor:
    return Factor(
        effective_rank=_mean([item.effective_rank for item in items]),
        omax=_mean([item.omax for item in items]),
    )


def _mean_coverage(items: Sequence[Coverage]) -> Coverage:
    return _coverage(
        _mean([item.independent for item in items]),
        _mean([item.dense for item in items]),
        _mean([item.rank_one for item in items]),
        _mean([item.singular for item in items]),
    )


def _mean_change(items: Sequence[Change]) -> Change:
    return Change(
        before=_mean_spectrum([item.before for item in items]),
        after=_mean_spectrum([item.after for item in items]),
    )


def _mean_spectrum(items: Sequence[Spectrum]) -> Spectrum:
    width = max(len(item.values) for item in items)
    padded = [[*item.values, *[0.0] * (width - len(item.values))] for item in items]
    return Spectrum(
        values=tuple(_mean(values) for values in zip(*padded, strict=True)),
        norm=_mean([item.norm for item in items]),
        omax=_mean([item.omax for item in items]),
        effective_rank=_mean([item.effective_rank for item in items]),
        stable_rank=_mean([item.stable_rank for item in items]),
        condition=_mean([item.condition for item in items]),
    )


def _coverage(independent: float, dense: float, rank_one: float, singular: float) -> Coverage:
    whole = independent or 1.0
    shares = dense / whole, rank_one / whole, singular / whole
    return Coverage(independent, dense, rank_one, singular, *shares)


def _overlap(measured: float, chance: float) -> Overlap:
    return Overlap(measured, chance, measured - chance)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
