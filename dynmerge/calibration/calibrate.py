"""Calibrate: a bank, its model and texts -> a Calibration that its bank can carry.

One entry per method that needs one. Held-out texts decide: nothing that is worse there than what it
started from is returned as learned.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from dynmerge.bank.bank import FactorBank
from dynmerge.bank.calibration import AT, Calibration
from dynmerge.calibration.fisher import information, ridged
from dynmerge.calibration.judge import Judge
from dynmerge.calibration.learned import Learned, weighted
from dynmerge.calibration.plan import DEFAULT_FORM, Plan
from dynmerge.calibration.regmean import regmean_cores, second_moments
from dynmerge.calibration.train import Check, Training, best_score, improved
from dynmerge.errors import CalibrationError, ExamplesError
from dynmerge.merging.carried.granularity import GRANULARITIES
from dynmerge.merging.carried.maps import FORMS
from dynmerge.merging.support import normed
from dynmerge.student import Student
from dynmerge.texts.examples import Examples

NORMS = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0, 16.0, 64.0)
RIDGES = (0.1, 1.0, 10.0, 100.0)  # of `gauss-newton`: from blocks to nearly their diagonals
METHODS = ("tuned", "regmean", *GRANULARITIES)
UNTAUGHT = ("tuned",)  # the held-out score alone chooses them: they learn from no other texts
GAUSS_NEWTON = "gauss-newton"
ROUNDING = 1e-5  # of a held-out score

Texts = Mapping[str, Examples]
Report = Callable[[Training], None]
Progress = Callable[[int, int], None]


def calibrate(
    student: Student,
    texts: Texts,
    held_out: Texts,
    plan: Plan,
    report: Report = lambda _: None,
    resume: Mapping[str, object] | None = None,
    progress: Progress = lambda done, total: None,
) -> Calibration:
    """What `plan` asks for, learned from `texts` (one per task) and guarded by `held_out`.

    For a method of UNTAUGHT `texts` are empty. `report` is called after each check of a training,
    whose state `resume` may be; `progress`, with examples done and all of them, where a closed form
    takes long. Raises CalibrationError for a plan that cannot be, where the base model or a skill
    predicts NaN on `held_out`, or where nothing found is better there than `linear` is; StateError
    for a `resume` of another training; ExamplesError for a task without texts, texts of no task,
    texts that would be ignored, and texts without the answers that the objective `labels` needs.
    """
    check_plan(plan, student.bank)
    _check_untaught(plan, texts)
    for given in (held_out,) if plan.method in UNTAUGHT else (texts, held_out):
        _check_texts(given, student.bank.names)
    if plan.method == "tuned":
        return _tuned(student, held_out, plan)
    if plan.method == "regmean":
        return _regmean(student, texts, held_out, plan)
    if plan.form == GAUSS_NEWTON:
        return _gauss_newton(student, texts, held_out, plan, progress)
    training = Training(student, texts, held_out, plan)
    if resume is not None:
        training.restore(resume)
    best = training.run(report)
    score = best_score(training.checks)
    # What serves every preference may serve where nobody asked for it: no worse than linear, which
    # is among the starts. What serves one is asked for by name.
    if plan.at is None and score > training.linear + ROUNDING:
        _check_better(plan.method, score, training.linear)
    record = {
        "linear": training.linear,
        "checks": [_stated(each) for each in training.checks],
        "kept": "learned" if improved(training.checks) else "start",
    }
    return calibration_of(best, plan, texts, held_out, record)


def check_plan(plan: Plan, bank: FactorBank) -> None:
    """Raise CalibrationError unless there is something for `plan` to learn for `bank`."""
    if plan.method not in METHODS:
        raise CalibrationError(
            f"nothing is learned for the method {plan.method!r} (known: {', '.join(METHODS)})"
        )
    if len(bank.names) < 2:
        raise CalibrationError(f"{bank.names[0]} is alone in the bank: there is nothing to merge")
    if plan.method not in GRANULARITIES:
        if plan.form != DEFAULT_FORM or plan.at is not None:
            raise CalibrationError(
                f"{plan.method} trains nothing: it has no form to choose and serves every"
                f" preference; this plan has the form {plan.form!r} at {plan.at}"
            )
        if plan.objective == "entropy":
            raise CalibrationError(
                f"{plan.method} is chosen by the held-out score, which is distil or labels: "
                "entropy falls while accuracy does"
            )
        return
    if plan.form not in FORMS:
        raise CalibrationError(f"no form {plan.form!r} (known: {', '.join(FORMS)})")
    if plan.form == GAUSS_NEWTON and plan.objective != "distil":
        raise CalibrationError(
            f"{GAUSS_NEWTON} is the closed form of the objective distil; {plan.objective} has none"
        )
    if plan.form == GAUSS_NEWTON and plan.method != "adamerging":
        raise CalibrationError(
            f"{GAUSS_NEWTON} is for adamerging: the coefficients of {plan.method} are too many to "
            "be solved for at a request"
        )
    if (plan.at is not None) != (plan.form == "fixed"):
        raise CalibrationError(
            "a preference to learn for belongs to the form fixed, and to no other"
        )
    if plan.at is not None:
        _check_at(plan.at, len(bank.names))


def _check_untaught(plan: Plan, texts: Texts) -> None:
    if plan.method in UNTAUGHT and texts:
        raise ExamplesError(
            f"{plan.method} is chosen by the held-out score alone: hold out the texts of "
            f"{', '.join(texts)} too"
        )


def _check_texts(given: Texts, names: Sequence[str]) -> None:
    for name in names:
        if name not in given:
            known = ", ".join(given)
            raise ExamplesError(f"no texts for the skill {name!r} (given: {known})")
    for name in given:
        if name not in names:
            raise ExamplesError(f"texts for no skill, {name!r} (known: {', '.join(names)})")


def _check_at(at: tuple[float, ...], tasks: int) -> None:
    # NaN fails every comparison.
    if len(at) != tasks or not (min(at) >= 0 and abs(sum(at) - 1) <= 1e-3):
        raise CalibrationError(f"{at} is no preference over the bank's {tasks} skills")
    if max(at) == 1:
        raise CalibrationError("one skill alone is its adapter: there is nothing to learn")


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
    settings = _closed(plan) if plan.form == GAUSS_NEWTON else asdict(plan)
    described = _record(settings, texts, held_out, record)
    return Calibration(plan.method, plan.form, bank.coordinates_digest, tensors, described)


def _tuned(student: Student, held_out: Texts, plan: Plan) -> Calibration:
    """The norm p of `linear` with the best held-out score; p = 1, the plain sum, among them."""
    judge, bank = Judge.of(student, held_out, plan.objective), student.bank

    def under(p: float) -> Callable[[Tensor], list[Tensor]]:
        return lambda rho: weighted(bank, normed(rho, p))

    scores = {p: judge.score(under(p)) for p in NORMS}
    best = min(scores, key=lambda p: scores[p])
    record = {"scores": {f"linear;p={p:g}": score for p, score in scores.items()}}
    tensors = {".p": torch.tensor(best)}
    described = _record(_closed(plan), {}, held_out, record)
    return Calibration("tuned", "norm", bank.coordinates_digest, tensors, described)


def _regmean(student: Student, texts: Texts, held_out: Texts, plan: Plan) -> Calibration:
    bank, moments = student.bank, second_moments(student, texts)
    judge = Judge.of(student, held_out, plan.objective)
    plain = judge.score(lambda rho: weighted(bank, rho))
    found = judge.score(lambda rho: regmean_cores(bank, moments, rho))
    _check_better("regmean", found, plain)
    tensors = {
        f"{module.name}.moments": own for module, own in zip(bank.modules, moments, strict=True)
    }
    record = {"scores": {"linear": plain, "regmean": found}}
    described = _record(_closed(plan), texts, held_out, record)
    return Calibration("regmean", "moments", bank.coordinates_digest, tensors, described)


def _gauss_newton(
    student: Student, texts: Texts, held_out: Texts, plan: Plan, progress: Progress
) -> Calibration:
    """Blocks of the Fisher information under the ridge with the best held-out score.

    Each skill's is divided by what that score divides its gap by: `Judge.scales`.
    """
    judge, bank = Judge.of(student, held_out, plan.objective), student.bank
    plain = judge.score(lambda rho: weighted(bank, rho))
    scales = torch.tensor(judge.scales)
    blocks = information(student, texts, plan.method, seed=plan.seed, progress=progress)
    start = Learned.start(bank, plan.method, GAUSS_NEWTON)

    def under(ridge: float) -> Learned:
        return start.holding(
            [{"information": ridged(H / scales[:, None, None], ridge)} for H in blocks]
        )

    scores = {ridge: judge.score(under(ridge).cores) for ridge in RIDGES}
    best = min(scores, key=lambda ridge: scores[ridge])
    _check_better(f"{plan.method} of form {GAUSS_NEWTON}", scores[best], plain)
    named = {f"ridge {ridge:g}": score for ridge, score in scores.items()}
    record = {"scores": {"linear": plain, **named}, "ridge": best}
    return calibration_of(under(best), plan, texts, held_out, record)


def _check_better(name: str, found: float, plain: float) -> None:
    if not found < plain:
        raise CalibrationError(
            f"{name}: the held-out score is {found:.4f}, no better than linear's "
            f"{plain:.4f}; the bank stays as it is"
        )


def _closed(plan: Plan) -> dict[str, object]:
    """Of the settings, those that count where nothing is trained."""
    return {key: asdict(plan)[key] for key in ("method", "objective", "seed")}


def _stated(check: Check) -> dict[str, object]:
    """A check as JSON takes it: what is no number any more is None."""
    return {
        key: value if math.isfinite(value or 0) else None for key, value in asdict(check).items()
    }


def _record(
    settings: Mapping[str, object], texts: Texts, held_out: Texts, found: Mapping[str, object]
) -> dict[str, object]:
    """What whoever reads the bank should know of how it came about."""

    def described(given: Texts) -> dict[str, object]:
        return {
            name: {"examples": len(own), "sha256": own.digest}
            for name, own in sorted(given.items())
        }

    return {
        "settings": dict(settings),
        "texts": described(texts),
        "held_out": described(held_out),
        **found,
    }
