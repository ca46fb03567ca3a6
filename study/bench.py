"""Bench: one seed of one suite, ready to measure: a student, its skills' examples, what is counted.

Scores are kept example by example: every interval is a bootstrap over examples, and two methods on
the same examples are compared pair by pair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

from dynmerge.bank.bank import FactorBank
from dynmerge.calibration import draws
from dynmerge.calibration.plan import Plan
from dynmerge.evaluation.scores import Score, score
from dynmerge.merging.choice import parse_method
from dynmerge.merging.merge import Merge, Merger
from dynmerge.preference import Preference
from dynmerge.recipe import Recipe
from dynmerge.student import Student
from dynmerge.texts.examples import Examples

BATCH = 32

# What a method makes of a preference (tasks,): cores by module, or a merge of any form.
Made = Sequence[Tensor] | Merge
Maker = Callable[[Tensor], Made]


@dataclass(frozen=True, eq=False)
class Bench:
    """`splits`: calibration, guard, validation and test -> skill -> examples.

    `others` are banks of adapters trained another way, each on the same model: the joint adapter,
    those begun as OSRM says. `pace` is what the suite can pay of a calibration's plan; `keep`,
    whether calibrations count that were kept from before.
    """

    suite: str
    seed: int
    student: Student
    splits: Mapping[str, Mapping[str, Examples]]
    others: Mapping[str, Callable[[], FactorBank]]
    pace: Callable[[Plan], Plan] = lambda plan: plan
    keep: bool = True

    @property
    def bank(self) -> FactorBank:
        """The bank of this seed's adapters."""
        return self.student.bank

    @property
    def centre(self) -> Tensor:
        """The uniform preference."""
        return draws.centre(len(self.bank.names))

    def test(self, made: Made, rho: Tensor | None = None) -> dict[str, Score]:
        """Every skill on its test examples; those that `rho` leaves out are not run."""
        return self.scores("test", made, rho)

    def scores(self, split: str, made: Made, rho: Tensor | None = None) -> dict[str, Score]:
        """Every skill on one split."""
        with under(self.student, made):
            return {
                name: score(self.splits[split][name], BATCH)
                for place, name in enumerate(self.bank.names)
                if rho is None or rho[place] > 0
            }

    def best(self, makers: Mapping[float, Maker]) -> tuple[float, Maker]:
        """The maker with the highest mean validation accuracy at the centre, ties by likelihood."""

        def quality(maker: Maker) -> tuple[float, float]:
            found = self.scores("validation", maker(self.centre)).values()
            accuracy = sum(one.accuracy for one in found)
            return round(accuracy, 9), -sum(one.loss for one in found)

        qualities = {value: quality(maker) for value, maker in makers.items()}
        value = max(qualities, key=lambda one: qualities[one])
        return value, makers[value]


def by(bank: FactorBank, method: str) -> Maker:
    """A row of METHODS with its parameters, as a request would ask for it."""
    merger, choice = Merger(bank), parse_method(method)

    def make(rho: Tensor) -> Made:
        shares = dict(zip(bank.names, rho.tolist(), strict=True))
        return merger.merge(Recipe(Preference.of(shares), choice, bank.digest))

    return make


def under(student: Student, made: Made) -> AbstractContextManager[None]:
    """The student carrying what a method made."""
    return student.carrying(made) if isinstance(made, Merge) else student.under(made)


@dataclass(frozen=True, eq=False)
class Part:
    """The first `size` of some examples: what is spent on tuning is bounded."""

    whole: Examples
    size: int

    @property
    def digest(self) -> str:
        """Of all of them, and how many are taken."""
        return f"{self.whole.digest}[:{len(self)}]"

    def __len__(self) -> int:
        return min(self.size, len(self.whole))

    def lengths(self) -> Sequence[int]:
        """As the whole's."""
        return self.whole.lengths()[: len(self)]

    def counts(self, rows: Sequence[int]) -> list[int]:
        """As the whole's."""
        return self.whole.counts(rows)

    def logits(self, rows: Sequence[int]) -> Tensor:
        """As the whole's."""
        return self.whole.logits(rows)

    def targets(self, rows: Sequence[int]) -> Tensor | None:
        """As the whole's."""
        return self.whole.targets(rows)
