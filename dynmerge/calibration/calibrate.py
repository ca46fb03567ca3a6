"""Calibrate: a bank, its model and texts -> a Calibration that its bank can carry.

One entry per method that needs one. Held-out texts decide: nothing that is worse there than what it
started from is returned as learned.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict

import torch
from torch import Tensor

from dynmerge.bank.bank import FactorBank
from dynmerge.bank.calibration import AT, Calibration
from dynmerge.calibration.examples import Examples
from dynmerge.calibration.judge import Judge
from dynmerge.calibration.learned import Learned
from dynmerge.calibration.moments import second_moments
from dynmerge.calibration.plan import Plan
from dynmerge.calibration.student import Student
from dynmerge.calibration.train import Training, improved
from dynmerge.errors import CalibrationError
from dynmerge.merging.calibrated import GRANULARITIES, regmean
from dynmerge.merging.support import normed

NORMS = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0, 16.0, 64.0)
RIDGE = 0.01  # of `regmean`'s row in METHODS
METHODS = ("tuned", "regmean", *GRANULARITIES)

Texts = Mapping[str, Examples]
Report = Callable[[Training], None]


def calibrate(
    student: Student,
    texts: Texts,
    held_out: Texts,
    plan: Plan,
    report: Report = lambda _: None,
    resume: Mapping[str, object] | None = None,
) -> Calibration:
    """What `plan` asks for, learned from `texts` (one per task) and guarded by `held_out`.

    `report` is called after each check of a training, whose state `resume` may be. Raises
    CalibrationError for a method that learns nothing, or where a closed form is no better on
    `held_out` than the plain sum; ExamplesError for a task without texts.
    """
    if plan.method not in METHODS:
        raise CalibrationError(
            f"nothing is learned for the method {plan.method!r} (known: {', '.join(METHODS)})"
        )
    if plan.method == "tuned":
        return _tuned(student, texts, held_out, plan)
    if plan.method == "regmean":
        return _regmean(student, texts, held_out, plan)
    training = Training(student, texts, held_out, plan)
    if resume is not None:
        training.restore(resume)
    best = training.run(report)
    record = {
        "checks": [asdict(check) for check in training.checks],
        "kept": "learned" if improved(training.checks) else "start",
    }
    return calibration_of(best, plan, texts, held_out, record)


def calibration_of(
    learned: Learned, plan: Plan, texts: Texts, held_out: Texts, record: Mapping[str, object]
) -> Calibration:
    """Tables as a bank carries them: those of each module by its name."""
    bank, tensors = learned.bank, dict[str, Tensor]()
    for group, own in zip(bank.groups, learned.tables, strict=True):
        for label, table in own.items():
            for member, part in zip(group.members, table, strict=True):
                tensors[f"{bank.modules[member].name}.{label}"] = part.detach().clone()
    if plan.at is not None:
        tensors[f".{AT}"] = torch.tensor(plan.at)
    return Calibration(
        plan.method, plan.form, bank.factors_digest, tensors, _record(plan, texts, held_out, record)
    )


def _tuned(student: Student, texts: Texts, held_out: Texts, plan: Plan) -> Calibration:
    """The norm p of `linear` with the best held-out score; p = 1, the plain sum, among them."""
    judge, bank = Judge.of(student, held_out, plan.objective), student.bank
    scores = {p: judge.score(lambda rho, p=p: weighted(bank, normed(rho, p))) for p in NORMS}
    best = min(scores, key=lambda p: scores[p])
    record = {"scores": {f"{p:g}": score for p, score in scores.items()}}
    return Calibration(
        "tuned",
        "norm",
        bank.factors_digest,
        {".p": torch.tensor(best)},
        _record(plan, texts, held_out, record),
    )


def _regmean(student: Student, texts: Texts, held_out: Texts, plan: Plan) -> Calibration:
    bank, moments = student.bank, second_moments(student, texts)
    judge = Judge.of(student, held_out, plan.objective)
    plain = judge.score(lambda rho: weighted(bank, rho))
    found = judge.score(lambda rho: _regmean_cores(bank, moments, rho))
    if found > plain:
        raise CalibrationError(
            f"regmean's held-out score is {found:.4f}, no better than the plain sum's {plain:.4f}: "
            "the bank stays as it is"
        )
    tensors = {
        f"{module.name}.moments": own for module, own in zip(bank.modules, moments, strict=True)
    }
    record = {"scores": {"linear": plain, "regmean": found}}
    digest = bank.factors_digest
    return Calibration(
        "regmean", "moments", digest, tensors, _record(plan, texts, held_out, record)
    )


def weighted(bank: FactorBank, weights: Tensor) -> list[Tensor]:
    """sum_i weights_i M_i (p, q), module after module."""
    return _in_order(bank, [group.weighted(weights) for group in bank.groups])


def _regmean_cores(bank: FactorBank, moments: list[Tensor], rho: Tensor) -> list[Tensor]:
    return _in_order(
        bank,
        [
            regmean(group, torch.stack([moments[member] for member in group.members]), rho, RIDGE)
            for group in bank.groups
        ],
    )


def _in_order(bank: FactorBank, groups: list[Tensor]) -> list[Tensor]:
    """Cores (p, q) of every module, from those of each group (members, p, q)."""
    return bank.layout.split(bank.flatten(groups))


def _record(
    plan: Plan, texts: Texts, held_out: Texts, found: Mapping[str, object]
) -> dict[str, object]:
    """What whoever reads the bank should know of how it came about."""

    def described(given: Texts) -> dict[str, object]:
        return {
            name: {"examples": len(own), "sha256": own.digest}
            for name, own in sorted(given.items())
        }

    return {
        "settings": asdict(plan),
        "texts": described(texts),
        "held_out": described(held_out),
        **found,
    }
