"""Edit a bank: put a skill in, replace one, take one out, without the others' original adapters;
put what was learned for it beside it.

A bank is immutable: an edit gives another bank, with the bases that a fresh build would find.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from dynmerge.adapters.adapter import Adapter
from dynmerge.adapters.lowrank import LowRank
from dynmerge.bank.bank import FactorBank, ModuleFactors, Task
from dynmerge.bank.build import build_bank
from dynmerge.bank.calibration import Calibration
from dynmerge.errors import BankError


def adapter_of(bank: FactorBank, name: str) -> Adapter:
    """A skill as the adapter that the bank was built from, up to float32 rounding.

    Its own digest is therefore not the skill's. Raises BankError where the bank has no such skill.
    """
    index = bank.names.index(_known(bank, name))
    updates = {
        module.name: _update(module, index) for module in bank.modules if module.ranks[index]
    }
    return Adapter(updates, bank.base.name)


def with_adapter(
    bank: FactorBank,
    name: str,
    adapter: Adapter,
    provenance: Mapping[str, object] | None = None,
) -> FactorBank:
    """The bank with `adapter` as the skill `name`, whether or not it has one of that name.

    Its digest is that of a bank built afresh from the original adapters. Raises BankError on
    learned soup weights, calibrations, a name that is the base model's, or a layer of another
    shape, and PreferenceError on a name that no request could write.
    """
    added = Task(name, adapter.digest, provenance or {})
    return _rebuilt(bank, [*_others(bank, name), added], {name: adapter})


def without(bank: FactorBank, name: str) -> FactorBank:
    """The bank without the skill `name`, and without the modules that it alone changed.

    Raises BankError where there is no such skill, where it is the last one, and on learned soup
    weights or calibrations.
    """
    _known(bank, name)
    if len(bank.tasks) == 1:
        raise BankError(f"{name!r} is the bank's last skill: a bank holds at least one")
    return _rebuilt(bank, _others(bank, name), {})


def with_calibration(bank: FactorBank, calibration: Calibration) -> FactorBank:
    """The bank with `calibration`, in place of the one for its method if there is one.

    Raises BankError unless it was made for this bank's factors and modules.
    """
    others = [each for each in bank.calibrations if each.method != calibration.method]
    ordered = sorted([*others, calibration], key=lambda each: each.method)
    return replace(bank, calibrations=tuple(ordered))


def without_calibration(bank: FactorBank, method: str) -> FactorBank:
    """The bank without the calibration for `method`. Raises BankError where there is none."""
    dropped = bank.calibration(method)
    return replace(bank, calibrations=tuple(c for c in bank.calibrations if c is not dropped))


def without_calibrations(bank: FactorBank) -> FactorBank:
    """The bank's factors alone."""
    return replace(bank, calibrations=())


def _rebuilt(bank: FactorBank, tasks: Sequence[Task], given: Mapping[str, Adapter]) -> FactorBank:
    """The bank of `tasks`: those `given`, and those that `bank` has."""
    if bank.calibrations:
        drops = " ".join(f"--drop {method}" for method in bank.calibrated)
        raise BankError(
            f"this bank carries calibrations ({', '.join(bank.calibrated)}), which hold for "
            f"exactly its skills: drop them first (dynmerge calibrate BANK {drops}; in Python "
            "without_calibrations), and calibrate the result"
        )
    if bank.has_soups:
        raise BankError(
            "this bank carries learned soup weights, which hold for exactly its skills: build a"
            " bank again from the adapters, with weights learned for them"
        )
    adapters = {task.name: given.get(task.name) or adapter_of(bank, task.name) for task in tasks}
    built = build_bank(bank.base, adapters)
    # The original adapters' digests say what the skills are; what is made from the bank differs
    # from them in rounding.
    return replace(built, tasks=tuple(sorted(tasks, key=lambda task: task.name)))


def _others(bank: FactorBank, name: str) -> list[Task]:
    return [task for task in bank.tasks if task.name != name]


def _update(module: ModuleFactors, task: int) -> LowRank:
    """B_i = U left_i and A_i = right_i V^T, where U and V are; in float64, kept in float32."""
    span = module.slices()[task]
    left, right = (
        factor.to(module.U.device, torch.float64)
        for factor in (module.left[:, span], module.right[span])
    )
    return LowRank(A=(right @ module.V.double().mT).float(), B=(module.U.double() @ left).float())


def _known(bank: FactorBank, name: str) -> str:
    if name not in bank.names:
        raise BankError(f"the bank has no skill named {name!r} (known: {', '.join(bank.names)})")
    return name
