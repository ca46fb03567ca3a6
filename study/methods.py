"""The study's rows: every method by name, as what it makes of a preference on one bench.

What tunes a number tunes it on validation examples at the uniform preference; test examples are
looked at once, by whoever runs the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dynmerge.bank.edit import with_calibration
from dynmerge.calibration.calibrate import UNTAUGHT, calibrate
from dynmerge.calibration.learned import Learned, in_order, weighted
from dynmerge.calibration.plan import Objective, Plan, published
from dynmerge.calibration.regmean import regmean_cores, second_moments
from dynmerge.errors import CalibrationError
from dynmerge.merging.carried.granularity import by_skill
from dynmerge.merging.carried.maps import FORMS, Form
from study.bench import Bench, Made, Maker, by
from study.forms import COMPARED
from study.plans import at_centre, for_all
from study.trained import PerTask, Run, trained


@dataclass(frozen=True, slots=True)
class Row:
    """A method. `data` says what it was given; `away`, whether it follows a preference.

    `make` returns the maker, and what it chose or learned for whoever reads the results; `settings`
    are what its numbers depend on besides the bench.
    """

    make: Callable[[Bench], tuple[Maker, object]]
    settings: tuple[object, ...]
    data: str = "none"
    away: bool = False


def plain(method: str, away: bool = False) -> Row:
    """A method with the parameters it has."""
    return Row(lambda bench: (by(bench.bank, method), None), (method,), away=away)


def tuned(method: str, scales: tuple[float, ...], away: bool = False) -> Row:
    """A method whose scale is chosen on validation."""

    def make(bench: Bench) -> tuple[Maker, object]:
        scale, maker = bench.best({s: by(bench.bank, f"{method};scale={s:g}") for s in scales})
        return maker, {"scale": scale}

    return Row(make, (method, scales), "validation labels", away)


def zero_shot(bench: Bench) -> tuple[Maker, object]:
    """The base model."""
    return lambda rho: weighted(bench.bank, torch.zeros_like(rho)), None


def mean_with_norm(bench: Bench) -> tuple[Maker, object]:
    """The mean with each layer's norm restored as Pico does, and no S: what Pico leaves out."""

    def make(rho: Tensor) -> Made:
        cores = [group.weighted(rho) for group in bench.bank.groups]
        restored = [
            found * ((group.norms() @ rho) / torch.linalg.matrix_norm(found))[:, None, None]
            for group, found in zip(bench.bank.groups, cores, strict=True)
        ]
        return in_order(bench.bank, restored)

    return make, None


def untrained(bench: Bench) -> tuple[Maker, object]:
    """The map `ratio` before any training: every skill minds every other as much. No data."""
    return Learned.start(bench.bank, "adamerging", "ratio").cores, None


def per_task(plan: Plan) -> Row:
    """One weight per skill for all layers, by gradient descent at the centre."""

    def make(bench: Bench) -> tuple[Maker, object]:
        found = counted(plan, trained(bench, plan, PerTask.of(bench.bank)))
        return found.cores, [round(float(w), 3) for w in found.tables[0]["fixed"][0]]

    return Row(make, (plan,), DATA[plan.objective])


def learned(plan: Plan, away: bool = False, form: Form | None = None) -> Row:
    """A calibration, trained on the suite's texts and guarded by validation text."""

    def make(bench: Bench) -> tuple[Maker, object]:
        start = Learned.start(bench.bank, plan.method, form) if form else None
        run = trained(bench, plan, start)
        return counted(plan, run).cores, {"checks": run.checks}

    return Row(make, (plan, form and form.coefficients.__name__), DATA[plan.objective], away)


def counted(plan: Plan, run: Run) -> Learned:
    """What a row is measured by: the best on held-out texts.

    By entropy it is what the last step left, as the papers have it: the guard, which looks at what
    the adapters say, would not let it leave its start.
    """
    return run.last if plan.objective == "entropy" else run.best


def regmean_rows(bench: Bench) -> tuple[Maker, object]:
    """The closed form, its scale chosen on validation as Task Arithmetic's is."""
    moments = second_moments(bench.student, bench.splits["calibration"])

    def scaled(scale: float) -> Maker:
        return lambda rho: [scale * core for core in regmean_cores(bench.bank, moments, rho)]

    scale, maker = bench.best({s: scaled(s) for s in REGMEAN_SCALES})
    return maker, {"scale": scale}


def rho_scaled(plan: Plan) -> Row:
    """What was found at the centre, times N rho_i: how a fixed merge follows a preference."""

    def make(bench: Bench) -> tuple[Maker, object]:
        run = trained(bench, plan)
        groups, tasks = bench.bank.groups, len(bench.bank.names)

        def cores(rho: Tensor) -> Made:
            found = [
                by_skill(group, own["fixed"] * tasks * rho)
                for group, own in zip(groups, run.best.tables, strict=True)
            ]
            return in_order(bench.bank, found)

        return cores, {"checks": run.checks}

    return Row(make, (plan, "times N rho"), DATA[plan.objective], away=True)


def shipped(plan: Plan) -> Row:
    """What `dynmerge calibrate` makes of the suite's texts, as a bank that carries it serves it.

    Where it refuses, for nothing it found is better on held-out texts than `linear`, that serves.
    """

    def make(bench: Bench) -> tuple[Maker, object]:
        texts = {} if plan.method in UNTAUGHT else bench.splits["calibration"]
        guard, settled = bench.splits["guard"], replace(bench.pace(plan), seed=bench.seed)
        try:
            found = calibrate(bench.student, texts, guard, settled)
        except CalibrationError as refused:
            return by(bench.bank, "linear"), {"refused": str(refused)}
        return by(with_calibration(bench.bank, found), plan.method), found.record["scores"]

    return Row(make, (plan, "shipped"), DATA[plan.objective], away=True)


UNLABELLED = "unlabelled text"  # which a suite may have another word for
DATA: Mapping[Objective, str] = {
    "distil": UNLABELLED,
    "entropy": UNLABELLED,
    "labels": "labelled text",
}
SUM_SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5)
SCALES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
WIDE_SCALES = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)  # a request may ask for no more
REGMEAN_SCALES = (0.5, 0.75, 1.0, 1.3, 1.7, 2.2)

ROWS: Mapping[str, Row] = {
    "zero-shot": Row(zero_shot, ("zero",)),
    "mean": plain("linear", away=True),
    "mean-gamma": Row(mean_with_norm, ("norm restored",)),
    "linear-p4": plain("linear;p=4", away=True),
    "ratio-start": Row(untrained, ("ratio", FORMS["ratio"].starts[0]), away=True),
    "tuned": tuned("linear;p=inf", SUM_SCALES, away=True),
    "s-only": plain("pico+linear;pool=static;restore=none"),
    "pico": plain("pico+linear;pool=static"),
    "pico-tuned": tuned("pico+linear;pool=static", SCALES),
    "pico-canonical": plain("pico+linear;pool=static;gauge=canonical"),
    "ties": tuned("ties;space=full", WIDE_SCALES),
    "core-ties": tuned("ties", WIDE_SCALES),
    "dare-ties": tuned("dare-ties;space=full;density=0.8", WIDE_SCALES),
    "knots-ties": tuned("knots-ties", WIDE_SCALES),
    "tsv-m": tuned("tsv-m", SCALES),
    "tsv-m-p6": plain("tsv-m;p=6", away=True),
    "iso-c": tuned("iso-c", SCALES),
    "svc": tuned("linear+svc", SCALES),
    "lego": tuned("lego", WIDE_SCALES),
    "regmean": Row(regmean_rows, (REGMEAN_SCALES,), f"{UNLABELLED}; scale on validation labels"),
    "tuned-norm": shipped(Plan("tuned")),
    "regmean-plain": shipped(Plan("regmean")),
    "gauss-newton": shipped(Plan("adamerging", "gauss-newton")),
    "per-task-entropy": per_task(at_centre("per-task", "entropy")),
    "per-task-labels": per_task(at_centre("per-task", "labels")),
    "per-task-distil": per_task(at_centre("per-task", "distil")),
    **{
        f"{method}-{objective}": learned(at_centre(method, objective))
        for objective in ("distil", "labels", "entropy")
        for method in ("adamerging", "tara-a", "tara-b", "core")
    },
    "tara-a-tchebycheff": learned(replace(at_centre("tara-a", "distil"), mu=0.1)),
    "tara-a-published-250": learned(replace(published("tara-a", ()), steps=250)),
    "adamerging-map": learned(for_all("adamerging"), away=True),
    "tara-a-map": learned(for_all("tara-a"), away=True),
    "tara-b-map": learned(for_all("tara-b"), away=True),
    "core-map": learned(for_all("core"), away=True),
}

# Compared on one seed: other forms of the map.
FORM_ROWS: Mapping[str, Row] = {
    "adamerging-bubbles": learned(for_all("adamerging", "bubbles"), away=True),
    **{
        f"adamerging-{name}": learned(for_all("adamerging", name, rate=0.02), True, form)
        for name, form in COMPARED.items()
    },
    "adamerging-rho-scaled": rho_scaled(at_centre("adamerging", "distil")),
}

ALL_ROWS: Mapping[str, Row] = {**ROWS, **FORM_ROWS}
