"""The study's rows: every method by name, as what it makes of a preference on one bench.

What tunes a number tunes it on validation examples at the uniform preference; test examples are
looked at once, by whoever runs the rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dynmerge.calibration import draws
from dynmerge.calibration.judge import Judge
from dynmerge.calibration.learned import Learned, in_order, weighted
from dynmerge.calibration.objective import smooth_tchebycheff
from dynmerge.calibration.plan import UNITS, Objective, Plan, published
from dynmerge.calibration.regmean import regmean_cores, second_moments
from dynmerge.calibration.teachers import alone, anchor, floored, lessons
from dynmerge.calibration.train import Training
from dynmerge.merging.carried.granularity import by_skill
from dynmerge.merging.carried.maps import Form
from study.bench import Bench, Made, Maker, by
from study.forms import COMPARED
from study.plans import at_centre, for_all
from study.sources import cache_folder


@dataclass(frozen=True, slots=True)
class Row:
    """A method. `data` says what it was given; `away`, whether it follows a preference.

    `make` returns the maker, and what it chose or learned for whoever reads the results.
    """

    make: Callable[[Bench], tuple[Maker, object]]
    data: str = "none"
    away: bool = False


def plain(method: str, away: bool = False) -> Row:
    """A method with the parameters it has."""
    return Row(lambda bench: (by(bench.bank, method), None), away=away)


def tuned(method: str, scales: tuple[float, ...], away: bool = False) -> Row:
    """A method whose scale is chosen on validation."""

    def make(bench: Bench) -> tuple[Maker, object]:
        scale, maker = bench.best({s: by(bench.bank, f"{method};scale={s:g}") for s in scales})
        return maker, {"scale": scale}

    return Row(make, "validation labels", away)


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


def per_task(objective: Objective) -> Row:
    """One weight per skill for all layers, by gradient descent at the centre."""

    def make(bench: Bench) -> tuple[Maker, object]:
        weights = per_task_weights(bench, objective)
        return lambda rho: weighted(bench.bank, weights), [round(float(w), 3) for w in weights]

    return Row(make, DATA[objective])


def per_task_weights(bench: Bench, objective: Objective) -> Tensor:
    """(tasks,): found and guarded as the finer coefficients are, from 0.4 each."""
    student, plan = bench.student, bench.pace(at_centre("adamerging", objective))
    taught = lessons(student, bench.splits["calibration"], objective, 32)
    anchors = [anchor(student, task, lesson) for task, lesson in enumerate(taught)]
    judge = Judge.of(student, bench.splits["guard"], objective, bench.centre)
    weights = torch.full((len(taught),), 0.4)
    best = weights.clone()
    score = judge.at(bench.centre, weighted(bench.bank, best))
    with torch.no_grad(), student.under(weighted(bench.bank, weights)):
        scales = floored([each.mean(64) - z for each, z in zip(taught, anchors, strict=True)])
    weights.requires_grad_()
    optimizer = torch.optim.AdamW([weights], lr=plan.rate * UNITS["fixed"], weight_decay=plan.decay)
    generator = torch.Generator().manual_seed(bench.seed)
    rows = [draws.Rows(each.examples.lengths(), plan.batch, generator) for each in taught]
    for step in range(1, plan.steps + 1):
        with student.under(weighted(bench.bank, weights)):
            losses = [each.loss(drawn.take()) for each, drawn in zip(taught, rows, strict=True)]
        found = zip(losses, anchors, scales, strict=True)
        gaps = torch.stack([(loss - z) / scale for loss, z, scale in found])
        optimizer.zero_grad()
        smooth_tchebycheff(gaps, bench.centre, plan.mu).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % plan.check == 0:
            now = judge.at(bench.centre, weighted(bench.bank, weights.detach()))
            if now < score:
                best, score = weights.detach().clone(), now
    return weights.detach() if objective == "entropy" else best


def learned(plan: Plan, away: bool = False, form: Form | None = None) -> Row:
    """A calibration, trained on unlabelled text and guarded by validation text.

    By entropy it counts as the last step left it, as the papers have it: the guard, which looks at
    what the adapters say, would not let it leave its start.
    """

    def make(bench: Bench) -> tuple[Maker, object]:
        run = trained(bench, plan, form)
        counted = run.last if plan.objective == "entropy" else run.best
        return counted.cores, {"checks": run.checks}

    return Row(make, DATA[plan.objective], away)


@dataclass(frozen=True, eq=False)
class Run:
    """One calibration at its end. `checks` are the held-out scores by step, the start's first."""

    best: Learned
    last: Learned
    checks: list[tuple[int, float]]


def trained(bench: Bench, plan: Plan, form: Form | None = None, at: Tensor | None = None) -> Run:
    """One calibration run to its end; kept for who asks again. A plan of form `fixed` is found for
    `at`, by default the uniform preference.
    """
    if plan.form == "fixed":
        plan = replace(plan, at=tuple((bench.centre if at is None else at).tolist()))
    settled = replace(bench.pace(plan), seed=bench.seed)
    start = Learned.start(bench.bank, plan.method, form or plan.form)
    path = cache_folder() / "learned" / f"{key_of(bench, settled, start)}.pt"
    if path.is_file():
        kept = torch.load(path, weights_only=True)
        return Run(start.holding(kept["best"]), start.holding(kept["last"]), kept["checks"])
    texts, guard = bench.splits["calibration"], bench.splits["guard"]
    # Without a start of its own a form tries all that it has, as `dynmerge calibrate` does.
    training = Training(bench.student, texts, guard, settled, start if form else None)
    training.run()
    checks = [(check.step, round(check.score, 4)) for check in training.checks]
    run = Run(training.best, training.learned.clone(), checks)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"best": run.best.tables, "last": run.last.tables, "checks": checks}, path)
    return run


def key_of(bench: Bench, plan: Plan, start: Learned) -> str:
    """Names what a calibration depends on: its plan and form, the bank, and all texts."""
    labels = sorted({label for label, _ in start.parameters()})
    texts = [
        bench.splits[split][name].digest
        for split in ("calibration", "guard")
        for name in bench.bank.names
    ]
    known = [repr(plan), start.form.coefficients.__name__, *labels, bench.bank.digest, *texts]
    digest = hashlib.sha256("\0".join(known).encode()).hexdigest()[:16]
    return f"{bench.suite}-{bench.seed}-{plan.method}-{digest}"


def regmean_rows(bench: Bench) -> tuple[Maker, object]:
    """The closed form, its scale chosen on validation as Task Arithmetic's is."""
    moments = second_moments(bench.student, bench.splits["calibration"])

    def scaled(scale: float) -> Maker:
        return lambda rho: [scale * core for core in regmean_cores(bench.bank, moments, rho)]

    scale, maker = bench.best({s: scaled(s) for s in (1.0, 1.3, 1.7, 2.2)})
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

    return Row(make, DATA[plan.objective], away=True)


def single(bench: Bench, task: int) -> Made:
    """One adapter alone."""
    return alone(bench.bank, task)


DATA: Mapping[Objective, str] = {
    "distil": "unlabelled text",
    "entropy": "unlabelled text",
    "labels": "labelled text",
}
SUM_SCALES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
WIDE_SCALES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)

ROWS: Mapping[str, Row] = {
    "zero-shot": Row(zero_shot),
    "mean": plain("linear", away=True),
    "mean-gamma": Row(mean_with_norm),
    "linear-p4": plain("linear;p=4", away=True),
    "ratio-start": Row(untrained, away=True),
    "tuned": tuned("linear;p=inf", SUM_SCALES),
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
    "regmean": Row(regmean_rows, "unlabelled text; scale on validation labels"),
    "per-task-entropy": per_task("entropy"),
    "per-task-labels": per_task("labels"),
    "per-task-distil": per_task("distil"),
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
