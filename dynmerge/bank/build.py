"""Build a bank: adapters -> shared orthonormal bases and every task's factors in them. QR only,
never a dense SVD.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

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
    for name in adapters:
        check_skill_name(name)
        if name == BASE:
            raise BankError(f"a skill may not be named {BASE!r}: that names the base model itself")
    names = sorted(adapters)
    modules = module_order(sorted({module for name in names for module in adapters[name].modules}))
    built = []
    for done, module in enumerate(modules, start=1):
        built.append(share_bases(module, [adapters[name].modules.get(module) for name in names]))
        progress(done, len(modules))
    notes = provenance or {}
    tasks = tuple(Task(name, adapters[name].digest, notes.get(name, {})) for name in names)
    return FactorBank(base, tasks, tuple(built))


def share_bases(module: str, updates: Sequence[LowRank | None]) -> ModuleFactors:
    """One module's shared bases from its tasks' updates; None where a task leaves it alone.

    QR in float64, kept in float32: with B = [B_1 .. B_N] = U R, task i's left factor is its block
    of R.
    """
    present = [update for update in updates if update is not None]
    shapes = {update.shape for update in present}
    if len(shapes) != 1:
        raise BankError(f"{module}: adapters disagree about its shape: {sorted(shapes)}")
    U, left = torch.linalg.qr(torch.cat([update.B.double() for update in present], dim=1))
    V, right = torch.linalg.qr(torch.cat([update.A.double() for update in present], dim=0).mT)
    return ModuleFactors(
        name=module,
        U=U.float().contiguous(),
        V=V.float().contiguous(),
        left=left.float().contiguous(),
        right=right.mT.float().contiguous(),
        ranks=tuple(0 if update is None else update.rank for update in updates),
    )
