"""Trained: the study's calibrations, each run to its end once and kept in the cache."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dynmerge.bank.bank import FactorBank
from dynmerge.calibration.learned import Learned, weighted
from dynmerge.calibration.plan import Plan
from dynmerge.calibration.train import Training
from dynmerge.merging.carried.maps import FORMS
from study.bench import Bench
from study.sources import cache_folder


@dataclass(frozen=True, eq=False)
class Run:
    """One calibration at its end. `checks` are the held-out scores by step, the start's first."""

    best: Learned
    last: Learned
    checks: list[tuple[int, float]]


class PerTask(Learned):
    """One weight per skill for all layers, found for one preference: a control, not served."""

    @classmethod
    def of(cls, bank: FactorBank) -> PerTask:
        """0.4 each, as the finer coefficients start."""
        tasks, form = len(bank.names), FORMS["fixed"]
        return cls(bank, "per-task", form, (form.start(1, tasks, tasks),), ({},))

    def cores(self, rho: Tensor) -> list[Tensor]:
        """C (p, q) for every module in the bank's order."""
        (weights,) = self.form.coefficients(self.tables[0], torch.arange(len(rho)), rho)
        return weighted(self.bank, weights)


def trained(
    bench: Bench, plan: Plan, start: Learned | None = None, at: Tensor | None = None
) -> Run:
    """One calibration run to its end, or as it was kept from before.

    A plan of form `fixed` is found for `at`, by default the uniform preference. Without a start of
    its own it tries all that its form has, as `dynmerge calibrate` does.
    """
    if plan.form == "fixed":
        plan = replace(plan, at=tuple((bench.centre if at is None else at).tolist()))
    settled = replace(bench.pace(plan), seed=bench.seed)
    first = start or Learned.start(bench.bank, plan.method, plan.form)
    path = cache_folder() / "learned" / f"{key_of(bench, settled, first)}.pt"
    if bench.keep and path.is_file():
        kept = torch.load(path, weights_only=True)
        return Run(first.holding(kept["best"]), first.holding(kept["last"]), kept["checks"])
    texts, guard = bench.splits["calibration"], bench.splits["guard"]
    training = Training(bench.student, texts, guard, settled, start)
    training.run()
    checks = [(check.step, round(check.score, 4)) for check in training.checks]
    run = Run(training.best, training.learned.clone(), checks)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"best": run.best.tables, "last": run.last.tables, "checks": checks}, path)
    return run


def key_of(bench: Bench, plan: Plan, start: Learned) -> str:
    """Names what a calibration depends on: its plan and start, the bank, and all texts."""
    form = start.form.coefficients.__name__, start.form.starts
    texts = [
        bench.splits[split][name].digest
        for split in ("calibration", "guard")
        for name in bench.bank.names
    ]
    known = [repr(plan), repr(form), bench.bank.digest, *texts]
    hashed = hashlib.sha256("\0".join(known).encode())
    for label, table in start.parameters():
        hashed.update(f"{label}{tuple(table.shape)}".encode())
        hashed.update(table.detach().contiguous().numpy().data)
    return f"{bench.suite}-{bench.seed}-{plan.method}-{hashed.hexdigest()[:16]}"
