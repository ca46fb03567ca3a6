"""Evaluation: how often a merged model is right on each skill's examples, kept example by example.

Knows recipes and predictions; no files, no texts, no figures.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dynmerge.bank.bank import FactorBank
from dynmerge.calibration.objective import cross_entropy
from dynmerge.errors import ExamplesError
from dynmerge.evaluation.bootstrap import SAMPLES, Estimate, mean, ratio, resamplings, share
from dynmerge.merging.choice import default_method
from dynmerge.merging.merge import PREPARED_BYTES, Merger
from dynmerge.preference import Preference
from dynmerge.recipe import Recipe
from dynmerge.student import Student
from dynmerge.texts.batches import batches
from dynmerge.texts.examples import Examples

BATCH = 16

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, eq=False)
class Score:
    """One skill's examples under one recipe, example by example."""

    right: Tensor  # (examples,): predictions whose likeliest class is the right one
    counts: Tensor  # (examples,): predictions
    nats: Tensor  # (examples,): cross-entropy, summed over the predictions

    @property
    def accuracy(self) -> float:
        """The share of predictions that are right."""
        return float(self.right.sum() / self.counts.sum())

    @property
    def loss(self) -> float:
        """Mean cross-entropy of a prediction, in nats."""
        return float(self.nats.sum() / self.counts.sum())


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """Every skill under every recipe. `alone` is each skill under its own adapter."""

    alone: Mapping[str, Score]
    scores: Sequence[tuple[Recipe, Mapping[str, Score]]]


class Judgement:
    """An evaluation with its resamplings: estimates, all of them paired."""

    def __init__(self, evaluation: Evaluation, samples: int = SAMPLES, seed: int = 0) -> None:
        self.evaluation = evaluation
        self._weights = {
            skill: resamplings(len(score.counts), samples, seed, skill)
            for skill, score in evaluation.alone.items()
        }
        self._alone = {
            skill: self._accuracy(skill, score) for skill, score in evaluation.alone.items()
        }

    def accuracies(self, scores: Mapping[str, Score]) -> dict[str, Estimate]:
        """By skill, the share of right predictions."""
        return {skill: self._accuracy(skill, score) for skill, score in scores.items()}

    def normalised(self, scores: Mapping[str, Score]) -> dict[str, Estimate]:
        """By skill, the accuracy over that of its own adapter on the same resamplings."""
        accuracies = self.accuracies(scores)
        return {skill: ratio(found, self._alone[skill]) for skill, found in accuracies.items()}

    def average(self, scores: Mapping[str, Score]) -> Estimate:
        """The mean of the skills' normalised accuracies."""
        return mean(list(self.normalised(scores).values()))

    def _accuracy(self, skill: str, score: Score) -> Estimate:
        return share(score.right, score.counts, self._weights[skill])


def evaluate(
    student: Student,
    examples: Mapping[str, Examples],
    recipes: Sequence[Recipe],
    batch: int = BATCH,
    progress: Progress = lambda done, total: None,
) -> Evaluation:
    """Run every recipe over all skills' examples, and each skill's own adapter over its own.

    `progress` counts examples. Raises ExamplesError where the right answers are not known.
    """
    for skill, asked in examples.items():
        if asked.targets(range(len(asked))) is None:
            raise ExamplesError(f"the examples of {skill!r} have no answers to compare with")
    own = {skill: own_recipe(student.bank, skill) for skill in examples}
    plan: dict[Recipe, list[str]] = {recipe: list(examples) for recipe in recipes}
    for skill, recipe in own.items():
        plan.setdefault(recipe, [skill])
    tell = _counting(
        progress, sum(len(examples[skill]) for skills in plan.values() for skill in skills)
    )
    merger = Merger(student.bank, torch.float32, PREPARED_BYTES)
    scores: dict[Recipe, dict[str, Score]] = {}
    for recipe, skills in plan.items():
        with _carrying(student, merger, recipe):
            scores[recipe] = {skill: score(examples[skill], batch, tell) for skill in skills}
    alone = {skill: scores[recipe][skill] for skill, recipe in own.items()}
    return Evaluation(alone, [(recipe, scores[recipe]) for recipe in recipes])


def own_recipe(bank: FactorBank, skill: str) -> Recipe:
    """A skill's own adapter as it was trained."""
    return Recipe(Preference.of({skill: 1.0}), default_method(), bank.digest)


@torch.no_grad()
def score(
    examples: Examples, batch: int = BATCH, tell: Callable[[int], None] = lambda rows: None
) -> Score:
    """All examples under what the model carries; `tell` hears how many were done at a time."""
    right, counts, nats = (torch.zeros(len(examples), dtype=torch.float64) for _ in range(3))
    for rows in batches(examples, batch):
        logits, targets = examples.logits(rows), examples.targets(rows)
        assert targets is not None
        sizes = examples.counts(rows)
        hits, losses = logits.argmax(-1) == targets, cross_entropy(targets, logits)
        right[rows] = _sums(hits, sizes)
        nats[rows] = _sums(losses, sizes)
        counts[rows] = torch.tensor(sizes, dtype=torch.float64)
        tell(len(rows))
    return Score(right, counts, nats)


def _sums(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """(examples,) float64, from one value for each prediction."""
    return torch.stack([part.sum() for part in torch.split(values.double().cpu(), list(sizes))])


@contextmanager
def _carrying(student: Student, merger: Merger, recipe: Recipe) -> Iterator[None]:
    if recipe.is_base:
        yield
        return
    with student.carrying(merger.merge(recipe)):
        yield


def _counting(progress: Progress, total: int) -> Callable[[int], None]:
    done = 0

    def tell(more: int) -> None:
        nonlocal done
        done += more
        progress(done, total)

    return tell
