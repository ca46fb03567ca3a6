"""Sensitivity: how each skill's objective answers to each rank-1 direction of a merge.

J_ik = d f_i / d phi_k at one merge, and what TARA reads off it: how anisotropic it is, and how far
the directions that two preferences ask for are apart (arXiv:2603.26299).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dynmerge.bank.bank import FactorBank
from dynmerge.calibration.plan import Objective
from dynmerge.calibration.teachers import Lesson, lessons
from dynmerge.errors import ExamplesError
from dynmerge.student import Student
from dynmerge.texts.batches import batches
from dynmerge.texts.examples import Examples

BATCH = 8
CENTRE = "equal shares"


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """The Jacobian at equal shares (`linear`), by skill in the bank's order.

    `condition` is the largest over the smallest singular value of J, None where that is 0; so is
    `balanced_condition`, after every row is made of norm 1: what is left when the skills' scales
    are not counted. `misalignment` is xi between `preferences`: each skill alone, then the centre.
    """

    objective: Objective
    skills: tuple[str, ...]
    examples: tuple[int, ...]
    predictions: tuple[int, ...]
    values: tuple[float, ...]  # f_i, in nats
    modules: tuple[str, ...]
    norms: tuple[tuple[float, ...], ...]  # (skills, modules): that part of J's row i
    singular_values: tuple[float, ...]
    condition: float | None
    balanced_condition: float | None
    preferences: tuple[str, ...]
    misalignment: tuple[tuple[float, ...], ...]


def measure_sensitivity(
    student: Student,
    examples: Mapping[str, Examples],
    objective: Objective = "entropy",
    *,
    batch: int = BATCH,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Sensitivity:
    """The report, with `examples` for every skill of the bank.

    `progress(done, total)` is called after each batch. Raises ExamplesError on a skill
    without examples, on unlabelled ones where the objective is `labels`, and on NaN.
    """
    bank = student.bank
    equal = torch.full((len(bank.tasks),), 1 / len(bank.tasks))
    taught = lessons(student, examples, objective, batch)
    values, J = jacobian(student, taught, linear_point(bank, equal), batch=batch, progress=progress)
    for name, row in zip(bank.names, J, strict=True):
        if not row.isfinite().all():
            raise ExamplesError(f"on the texts of {name!r} equal shares predict NaN")
    widths = [sum(module.ranks) for module in bank.modules]
    preferences = torch.cat([torch.eye(len(bank.tasks)), equal[None]]).to(J)
    return Sensitivity(
        objective=objective,
        skills=bank.names,
        examples=tuple(len(lesson.examples) for lesson in taught),
        predictions=tuple(sum(lesson.examples.counts(_all(lesson))) for lesson in taught),
        values=tuple(values.tolist()),
        modules=tuple(module.name for module in bank.modules),
        norms=_rows(torch.stack([part.norm(dim=1) for part in torch.split(J, widths, 1)], dim=1)),
        singular_values=tuple(torch.linalg.svdvals(J).tolist()),
        condition=condition(J),
        balanced_condition=condition(normalize(J, eps=torch.finfo(J.dtype).tiny)),
        preferences=(*bank.names, CENTRE),
        misalignment=_rows(misalignment(J, preferences)),
    )


def linear_point(bank: FactorBank, rho: Tensor) -> list[Tensor]:
    """phi_ik = rho_i in every module, (K,) each: the merge `linear` of weights rho (tasks,)."""
    return [
        rho.to(bank.device).repeat_interleave(torch.tensor(module.ranks, device=bank.device))
        for module in bank.modules
    ]


def jacobian(
    student: Student,
    taught: Sequence[Lesson],
    phi: Sequence[Tensor],
    *,
    batch: int = BATCH,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Tensor, Tensor]:
    """f (lessons,) and J (lessons, sum of K) at phi, (K,) per module: TARA-A's directions.

    f_i is the mean over the lesson's predictions under the cores left diag(phi) right; the sums are
    float64, the model runs in its own dtype.
    """
    runs = [list(batches(lesson.examples, batch)) for lesson in taught]
    total, done = sum(map(len, runs)), 0
    values, gradients = [], []
    for lesson, run in zip(taught, runs, strict=True):
        count = sum(lesson.examples.counts(_all(lesson)))
        value, gradient = 0.0, torch.zeros(())
        for rows in run:
            part, slope = _slope(student, lesson, rows, phi)
            value, gradient = value + part / count, gradient + slope.cpu() / count
            done += 1
            progress(done, total)
        values.append(value)
        gradients.append(gradient)
    return torch.tensor(values, dtype=torch.float64), torch.stack(gradients)


def condition(J: Tensor) -> float | None:
    """kappa: the largest over the smallest singular value; None where that is rounding."""
    values = torch.linalg.svdvals(J)
    if values[-1] <= max(J.shape) * torch.finfo(J.dtype).eps * values[0]:
        return None
    return float(values[0] / values[-1])


def misalignment(J: Tensor, preferences: Tensor) -> Tensor:
    """xi (n, n) = 1 - |cos(h, h')| between preferences (n, skills), h(rho) = J^T rho.

    0: they ask for the same directions in the same proportions. 1 also where nothing is asked for.
    """
    h = normalize(preferences @ J, eps=torch.finfo(J.dtype).tiny)
    return 1 - (h @ h.mT).abs().clamp(max=1)


def _slope(
    student: Student, lesson: Lesson, rows: Sequence[int], phi: Sequence[Tensor]
) -> tuple[float, Tensor]:
    """The sum over the predictions of these rows, and its gradient (sum of K,) in float64."""
    leaves = [part.detach().clone().requires_grad_() for part in phi]
    cores = [
        (module.left * leaf) @ module.right.to(leaf)
        for module, leaf in zip(student.bank.modules, leaves, strict=True)
    ]
    with student.under(cores):
        found = lesson.measure(rows, lesson.examples.logits(rows)).sum()
    slopes = torch.autograd.grad(found, leaves)
    return float(found.detach()), torch.cat(slopes).double()


def _all(lesson: Lesson) -> range:
    return range(len(lesson.examples))


def _rows(table: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in table.tolist())
