"""Teachers: how far a merge is from what each skill wants, on that skill's own examples.

Measured by an objective: divergence from the skill's own adapter, entropy, or labels. The anchor
z_i is what the measure is at best.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynmerge.bank.bank import FactorBank
from dynmerge.calibration.objective import cross_entropy, divergence, entropy
from dynmerge.calibration.plan import Objective
from dynmerge.errors import ExamplesError
from dynmerge.student import Student
from dynmerge.texts.batches import batches
from dynmerge.texts.examples import Examples

LEAST_SHARE, LEAST_GAP = 0.1, 1e-6  # of the mean gap; in nats, where no skill loses anything
LEAST = -6e4  # of a masked token, say: half precision makes -inf of less, and 0 * inf is NaN


def alone(bank: FactorBank, task: int) -> list[Tensor]:
    """The cores of one task at 1, module after module."""
    return [module.core(task) for module in bank.modules]


@dataclass(frozen=True, eq=False)
class Lesson:
    """One skill's examples and what measures a prediction on them."""

    examples: Examples
    measure: Callable[[Sequence[int], Tensor], Tensor]  # rows, logits (n, classes) -> (n,)
    # z: the least it can be. None: what the adapter alone reaches, which for entropy is no bound.
    ideal: float | None = 0.0

    def loss(self, rows: Sequence[int]) -> Tensor:
        """(): the mean over the predictions of these rows, under what the student carries, in nats.

        Raises ExamplesError under labels where the examples have no answers.
        """
        return self.measure(rows, self.examples.logits(rows)).mean()

    @torch.no_grad()
    def mean(self, batch: int) -> float:
        """The mean over all rows, `batch` at once. Raises ExamplesError as `loss` does."""
        total, count = 0.0, 0
        for rows in batches(self.examples, batch):
            found = self.measure(rows, self.examples.logits(rows))
            total, count = total + float(found.sum()), count + len(found)
        return total / count


def lessons(
    student: Student, examples: Mapping[str, Examples], objective: Objective, batch: int
) -> list[Lesson]:
    """One lesson per task of the bank, in its order. Raises ExamplesError on one without examples.

    For distillation every adapter predicts its examples once.
    """
    found = []
    for task, name in enumerate(student.bank.names):
        if name not in examples:
            raise ExamplesError(f"no texts for the skill {name!r} (given: {', '.join(examples)})")
        found.append(_lesson(student, task, examples[name], objective, batch))
    return found


def floored(gaps: Sequence[float]) -> list[float]:
    """What gaps (in nats, by task) are divided by: their sizes, none below LEAST_SHARE of the mean.

    A skill that loses next to nothing would count without bounds. Below that floor its gap is no
    longer 1 after the division, but its share of the floor.
    """
    sizes = [abs(gap) for gap in gaps]
    least = max(LEAST_SHARE * sum(sizes) / len(sizes), LEAST_GAP)
    return [max(size, least) for size in sizes]


def anchor(student: Student, task: int, lesson: Lesson, batch: int = 64) -> float:
    """z_i: the measure's ideal, or what it is under adapter i alone.

    Cross-entropy has none but 0: an adapter that is too sure has more of it than a merge.
    """
    if lesson.ideal is not None:
        return lesson.ideal
    with student.under(alone(student.bank, task)):
        return lesson.mean(batch)


def _lesson(
    student: Student, task: int, examples: Examples, objective: Objective, batch: int
) -> Lesson:
    if objective == "entropy":
        return Lesson(examples, lambda rows, logits: entropy(logits), ideal=None)
    if objective == "labels":

        def against_labels(rows: Sequence[int], logits: Tensor) -> Tensor:
            targets = examples.targets(rows)
            if targets is None:
                raise ExamplesError(
                    f"objective labels: the texts of {student.bank.names[task]!r} have no answers"
                )
            return cross_entropy(targets, logits)

        return Lesson(examples, against_labels)
    taught = _taught(student, task, examples, batch)

    def against_teacher(rows: Sequence[int], logits: Tensor) -> Tensor:
        return divergence(torch.cat([taught[row] for row in rows]).float(), logits)

    return Lesson(examples, against_teacher)


@torch.no_grad()
def _taught(student: Student, task: int, examples: Examples, batch: int) -> dict[int, Tensor]:
    """By row, what the adapter alone predicts. Half precision: a vocabulary is long."""
    taught: dict[int, Tensor] = {}
    with student.under(alone(student.bank, task)):
        for rows in batches(examples, batch):
            logits = examples.logits(rows)
            logits = (logits - logits.amax(-1, keepdim=True)).clamp(min=LEAST).half()
            taught |= zip(rows, torch.split(logits, examples.counts(rows)), strict=True)
    return taught
