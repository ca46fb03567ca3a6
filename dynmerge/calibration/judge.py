"""Judge: the held-out score that guards a calibration: how far merges are from the skills alone."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynmerge.calibration import draws
from dynmerge.calibration.plan import Objective
from dynmerge.calibration.teachers import Lesson, anchor, floored, lessons
from dynmerge.errors import CalibrationError
from dynmerge.student import Student
from dynmerge.texts.examples import Examples

BATCH = 64


@dataclass(frozen=True, eq=False)
class Judge:
    """The mean over fixed preferences of sum_i rho_i (f_i - z_i) / scale_i on held-out texts.

    A scale is the base model's gap, `floored`: the base model scores 1 where no skill's gap is less
    than a tenth of their mean; a skill whose is counts for less than 1.

    Always measured against the adapters themselves, or against labels where those teach: entropy
    falls while accuracy does.
    """

    student: Student
    lessons: Sequence[Lesson]
    anchors: Sequence[float]  # z, by task
    scales: Sequence[float]  # in nats, by task
    preferences: Sequence[Tensor]  # (tasks,) each

    @classmethod
    def of(
        cls,
        student: Student,
        held_out: Mapping[str, Examples],
        objective: Objective,
        at: Tensor | None = None,
    ) -> "Judge":
        """The judge at one preference (tasks,), or at the centre and four others.

        Raises CalibrationError where the base model or a skill alone predicts NaN; ExamplesError
        for a task without examples, or under labels without answers.
        """
        measure: Objective = "labels" if objective == "labels" else "distil"
        found = lessons(student, held_out, measure, BATCH)
        anchors = [anchor(student, task, lesson) for task, lesson in enumerate(found)]
        base = [lesson.mean(BATCH) for lesson in found]
        for name, measured in zip(student.bank.names, zip(base, anchors, strict=True), strict=True):
            if not all(map(math.isfinite, measured)):
                raise CalibrationError(
                    f"on the held-out texts of {name!r} the base model or the skill predicts NaN:"
                    " nothing can be measured"
                )
        scales = floored([gap - z for gap, z in zip(base, anchors, strict=True)])
        generator = torch.Generator().manual_seed(0)
        others = [draws.preference(len(found), generator) for _ in range(8)]
        middle = draws.centre(len(found))
        several = [middle, *[rho for rho in others if not rho.equal(middle)][:4]]
        return cls(student, found, anchors, scales, several if at is None else [at])

    @torch.no_grad()
    def score(self, cores: Callable[[Tensor], Sequence[Tensor]]) -> float:
        """Of a map from preferences (tasks,) to cores, (p, q) per module in the bank's order.

        In units of `scales`. Lower is better; 0 is every adapter itself, under labels whoever is
        sure of every answer.
        """
        return sum(self.at(rho, cores(rho)) for rho in self.preferences) / len(self.preferences)

    @torch.no_grad()
    def at(self, rho: Tensor, cores: Sequence[Tensor]) -> float:
        """The weighted gap of cores, (p, q) per module, at one preference (tasks,)."""
        with self.student.under(cores):
            return sum(
                float(rho[task]) * (lesson.mean(BATCH) - z) / scale
                for task, (lesson, z, scale) in enumerate(
                    zip(self.lessons, self.anchors, self.scales, strict=True)
                )
                if rho[task]
            )
