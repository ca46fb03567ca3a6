"""Build a bank: adapters -> shared orthonormal bases and every task's factors in them.

By QR of the stacked factors and an SVD of what is left, never of a dense update.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath

import torch
from torch import Tensor

from dynmerge.adapters.adapter import Adapter
from dynmerge.adapters.lowrank import LowRank
from dynmerge.bank.bank import BaseIdentity, FactorBank, ModuleFactors, Task, module_order
from dynmerge.errors import BankError
from dynmerge.preference import BASE, check_skill_name


def build_bank(
    base: BaseIdentity,
    adapters: Mapping[str, Adapter],
    *,
    provenance: Mapping[str, Mapping[str, object]] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> FactorBank:
    """The bank of `adapters`, by skill name; ranks and modules may differ from one to the next.

    `progress(done, total)` is called after each module. Raises BankError on no adapter, a reserved
    or impossible name, or two adapters that disagree about a module's shape.
    """
    if not adapters:
        raise BankError("a bank needs at least one adapter")
    check_names(base, adapters)
    names = sorted(adapters)
    modules = module_order(sorted({module for name in names for module in adapters[name].modules}))
    built = []
    for done, module in enumerate(modules, start=1):
        built.append(share_bases(module, [adapters[name].modules.get(module) for name in names]))
        progress(done, len(modules))
    notes = provenance or {}
    tasks = tuple(Task(name, adapters[name].digest, notes.get(name, {})) for name in names)
    return FactorBank(base, tasks, tuple(built))


def check_names(base: BaseIdentity, names: Iterable[str]) -> None:
    """Raise unless all `names` may be skills of a bank for `base`; worth asking before a build.

    PreferenceError on what no request could write, BankError on a name of the base model's own.
    """
    served = PurePath(base.name).name  # what the server calls the base model, if not told otherwise
    for name in names:
        check_skill_name(name)
        if name in (BASE, served):
            raise BankError(f"a skill may not be named {name!r}: that names the base model itself")


def share_bases(module: str, updates: Sequence[LowRank | None]) -> ModuleFactors:
    """One module's shared bases from its tasks' updates; None where a task leaves it alone.

    In float64, kept in float32. U holds the left singular vectors of B = [B_1 .. B_N] and V the
    right ones of A = [A_1; ..; A_N]: Core Space's bases (Panariello et al. 2025), which do not
    depend on the tasks' names or order. Directions that are float32 rounding are left out.
    """
    present = [update for update in updates if update is not None]
    shapes = {update.shape for update in present}
    if len(shapes) != 1:
        raise BankError(f"{module}: adapters disagree about its shape: {sorted(shapes)}")
    U, left = _singular_basis(torch.cat([update.B.double() for update in present], dim=1))
    V, right = _singular_basis(torch.cat([update.A.double() for update in present], dim=0).mT)
    return ModuleFactors(
        name=module,
        U=U.float().contiguous(),
        V=V.float().contiguous(),
        left=left.float().contiguous(),
        right=right.mT.float().contiguous(),
        ranks=tuple(0 if update is None else update.rank for update in updates),
    )


def with_soups(bank: FactorBank, weights: Mapping[str, Mapping[str, float]]) -> FactorBank:
    """The bank with learned weights for `lora-soups`: module name -> task name -> weight.

    Raises BankError unless they are finite and are there for every task of every module, and for
    nothing else; a task's weight in a module that it leaves alone may be missing.
    """
    _check_keys("module", weights, [module.name for module in bank.modules])
    modules = []
    for module in bank.modules:
        given = weights[module.name]
        having = [name for name, rank in zip(bank.names, module.ranks, strict=True) if rank]
        _check_keys(f"{module.name}: skill", given, having, optional=bank.names)
        soup = tuple(
            float(given.get(name, 0.0)) if rank else 0.0
            for name, rank in zip(bank.names, module.ranks, strict=True)
        )
        if not all(map(math.isfinite, soup)) or sum(soup) <= 0 or min(soup) < 0:
            raise BankError(f"{module.name}: soup weights are not negative, finite, and not all 0")
        modules.append(replace(module, soup=soup))
    return replace(bank, modules=tuple(modules))


def _check_keys(
    what: str, given: Iterable[str], wanted: Sequence[str], optional: Sequence[str] = ()
) -> None:
    missing = sorted(set(wanted) - set(given))
    unknown = sorted(set(given) - set(wanted) - set(optional))
    if missing:
        raise BankError(f"soup weights: {what} {missing[0]!r} has none")
    if unknown:
        raise BankError(f"soup weights: {what} {unknown[0]!r} is not in the bank")


def _singular_basis(stacked: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors (d, k) of `stacked` (d, K), and `stacked` in them (k, K).

    By QR, so that the SVD is of a matrix K wide. A vector's largest entry is positive: the sign is
    otherwise arbitrary, and some merge methods see it.
    """
    Q, R = torch.linalg.qr(stacked)
    P, S, _ = torch.linalg.svd(R, full_matrices=False)
    kept = max(1, int((S[0] * len(S) * torch.finfo(torch.float32).eps < S).sum()))
    basis = Q @ P[:, :kept]
    signs = basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
    basis = basis * signs
    return basis, basis.mT @ stacked  # not from the SVD: a column of zeros stays one of zeros
