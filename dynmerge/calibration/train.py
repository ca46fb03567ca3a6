"""Training: tables of a map from preference to merge, learned from each skill's own examples.

Gradient descent over preferences drawn at random, guarded by held-out examples: what is kept is
never worse there than the start. Can be stopped after any check and taken up again.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dynmerge.calibration import draws
from dynmerge.calibration.judge import Judge
from dynmerge.calibration.learned import Learned, weighted
from dynmerge.calibration.objective import smooth_tchebycheff
from dynmerge.calibration.plan import UNITS, Plan
from dynmerge.calibration.teachers import anchor, floored, lessons
from dynmerge.errors import StateError
from dynmerge.merging.carried.maps import FORMS
from dynmerge.student import Student
from dynmerge.texts.examples import Examples


@dataclass(frozen=True, slots=True)
class Check:
    """Steps done, the mean training loss since the last check, and the held-out score now."""

    step: int
    loss: float | None
    score: float


class Training:
    """One calibration on its way. `checks` are the held-out scores so far, the start's first.

    Gaps are divided by those that the start leaves at the centre, or at the plan's preference; the
    held-out score divides by the base model's. Raises CalibrationError where the base model or a
    skill predicts NaN on `held_out`; ExamplesError for a task without examples, or under labels
    without answers.
    """

    def __init__(
        self,
        student: Student,
        texts: Mapping[str, Examples],
        held_out: Mapping[str, Examples],
        plan: Plan,
        start: Learned | None = None,
    ) -> None:
        self.plan = plan
        self._student = student
        self._generator = torch.Generator().manual_seed(plan.seed)
        at = None if plan.at is None else torch.tensor(plan.at)
        self._judge = Judge.of(student, held_out, plan.objective, at)
        chosen, score = self._best_of([start] if start else self._starts())
        self.learned = chosen.clone()
        self.best = self._origin = self.learned.clone()
        self._lessons = lessons(student, texts, plan.objective, 4 * plan.batch)
        self._anchors = [anchor(student, task, each) for task, each in enumerate(self._lessons)]
        self._scales = self._normalisers()
        self._rows = [
            draws.Rows(each.examples.lengths(), plan.batch, self._generator)
            for each in self._lessons
        ]
        self._tables = [table.requires_grad_() for _, table in self.learned.parameters()]
        self._units = [_unit(label, self.learned) for label, _ in self.learned.parameters()]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [table], "lr": plan.rate * unit}
                for table, unit in zip(self._tables, self._units, strict=True)
            ],
            weight_decay=plan.decay,
        )
        self._losses: list[float] = []
        self.step = 0
        self.checks = [Check(0, None, score)]
        # What every server has without a calibration.
        self.linear = self._judge.score(lambda rho: weighted(student.bank, rho))

    @property
    def done(self) -> bool:
        """Whether all steps are made, or the score has not fallen for long enough, or is none."""
        if not math.isfinite(self.checks[-1].score):
            return True
        best = min(self.checks, key=lambda check: check.score).step
        patience = self.plan.patience * self.plan.check
        return self.step >= self.plan.steps or self.step - best >= patience

    def run(self, report: Callable[["Training"], None] = lambda _: None) -> Learned:
        """Train to the end; `report` is called after each check. The best tables on held-out."""
        while not self.done:
            for _ in range(min(self.plan.check, self.plan.steps - self.step)):
                self._advance()
            self._check()
            report(self)
        return self.best

    def state(self) -> dict[str, Any]:
        """All that a later process needs to go on, as torch.save takes it: a copy."""
        return {
            "step": self.step,
            "learned": self.learned.clone().tables,
            "best": self.best.tables,
            "optimizer": deepcopy(self._optimizer.state_dict()),
            "generator": self._generator.get_state(),
            "rows": [list(rows.left) for rows in self._rows],
            "checks": [asdict(check) for check in self.checks],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, which a training of the same plan, bank and texts had.

        Raises StateError for what is none such: another version may have written it.
        """
        try:
            self._restore(state)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise StateError(f"the state is none of this training ({error!r})") from error

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.step = state["step"]
        self.checks = [Check(**check) for check in state["checks"]]
        self._generator.set_state(state["generator"])
        for rows, left in zip(self._rows, state["rows"], strict=True):
            rows.left = [list(batch) for batch in left]
        self.best = self.best.holding(state["best"])
        held = self.learned.holding(state["learned"])
        with torch.no_grad():
            for table, (_, value), (_, best) in zip(
                self._tables, held.parameters(), self.best.parameters(), strict=True
            ):
                if not table.shape == value.shape == best.shape:
                    raise ValueError("tables of other shapes")
                table.copy_(value)
        self._optimizer.load_state_dict(state["optimizer"])

    def _starts(self) -> list[Learned]:
        """The form's starts: by each of its constants, or the only one it has."""
        bank, plan = self._student.bank, self.plan
        constants: list[tuple[float, ...]] = [(each,) for each in FORMS[plan.form].starts] or [()]
        return [Learned.start(bank, plan.method, plan.form, *each) for each in constants]

    def _best_of(self, starts: Sequence[Learned]) -> tuple[Learned, float]:
        """The one with the best held-out score, and that score."""
        scores = [self._judge.score(start.cores) for start in starts]
        best = min(range(len(starts)), key=lambda place: scores[place])
        return starts[best], scores[best]

    def _advance(self) -> None:
        plan, tasks = self.plan, len(self._lessons)
        rho = torch.tensor(plan.at) if plan.at else draws.preference(tasks, self._generator)
        present = [task for task in range(tasks) if rho[task]]
        cores = self.learned.cores(rho)
        gaps, slopes = self._gaps(present, [core.detach().requires_grad_() for core in cores])
        loss = smooth_tchebycheff(gaps, rho[present].to(gaps), plan.mu)
        (shares,) = torch.autograd.grad(loss, gaps)
        self._optimizer.zero_grad()
        # Not of layers that none of these skills changes.
        learned = [place for place, core in enumerate(cores) if core.requires_grad]
        wanted = [
            torch.einsum("t,tpq->pq", shares, torch.stack([slope[place] for slope in slopes]))
            for place in learned
        ]
        torch.autograd.backward([cores[place] for place in learned], wanted)
        if plan.pull:
            held = plan.pull * self._distance()
            held.backward()  # type: ignore[no-untyped-call]
            loss = loss + held
        self._optimizer.step()
        self._losses.append(float(loss.detach()))
        self.step += 1

    def _gaps(
        self, present: Sequence[int], cores: Sequence[Tensor]
    ) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """Every present skill's gap, and how it depends on each core.

        One after the other, so that one skill's activations are held at a time and not all.
        """
        gaps, slopes = [], []
        with self._student.under(cores):
            for task in present:
                gap = self._gap(task)
                slopes.append(torch.autograd.grad(gap, cores, materialize_grads=True))
                gaps.append(gap.detach())
        return torch.stack(gaps).requires_grad_(), slopes

    def _gap(self, task: int) -> Tensor:
        loss = self._lessons[task].loss(self._rows[task].take())
        return (loss - self._anchors[task]) / self._scales[task]

    def _distance(self) -> Tensor:
        """The mean over tables of the squared distance from the start, in their own units."""
        pulls = [
            ((table - first) / unit).square().mean()
            for table, (_, first), unit in zip(
                self._tables, self._origin.parameters(), self._units, strict=True
            )
        ]
        return torch.stack(pulls).mean()

    def _check(self) -> None:
        score = self._judge.score(self.learned.cores)
        if score < min(check.score for check in self.checks):
            self.best = self.learned.clone()
        loss = sum(self._losses) / len(self._losses)
        self.checks.append(Check(self.step, loss, score))
        self._losses = []

    def _normalisers(self) -> list[float]:
        """By task |f_i - z_i| at the start, at `at` or the centre, `floored`; 1 each where gaps
        count as they are.
        """
        if not self.plan.normalise:
            return [1.0] * len(self._lessons)
        at = self.plan.at
        rho = draws.centre(len(self._lessons)) if at is None else torch.tensor(at)
        with torch.no_grad(), self._student.under(self.learned.cores(rho)):
            return floored(
                [
                    lesson.mean(64) - z
                    for lesson, z in zip(self._lessons, self._anchors, strict=True)
                ]
            )


def best_score(checks: Sequence[Check]) -> float:
    """The lowest held-out score that is a number."""
    return min(check.score for check in checks if not math.isnan(check.score))


def improved(checks: Sequence[Check]) -> bool:
    """Whether anything was better on held-out examples than the start."""
    return min(check.score for check in checks) < checks[0].score


def _unit(label: str, learned: Learned) -> float:
    """What a step of 1 means for a table; `tables` are counted in the cores' own size."""
    unit = UNITS.get(label, 1.0)
    if label != "tables":
        return unit
    sizes = [group.cores().square().mean().sqrt() for group in learned.bank.groups]
    return unit * float(torch.stack(sizes).mean())
