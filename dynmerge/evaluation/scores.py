"""Evaluation: how often a merged model is right on each skill's examples, kept example by example.

Knows recipes and predictions; no files, no texts, no figures.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dynmerge.bank.bank import FactorBank
from dynmerge.calibration.objective import cross_entropy
from dynmerge.errors import ConfigError, ExamplesError
from dynmerge.evaluation.bootstrap import SAMPLES, Estimate, mean, ratio, shares
from dynmerge.merging.choice import default_method, parse_method
from dynmerge.merging.merge import PREPARED_BYTES, Merger
from dynmerge.preference import Preference
from dynmerge.recipe import MethodChoice, Recipe
from dynmerge.student import Student
from dynmerge.texts.batches import batches
from dynmerge.texts.examples import Examples

BATCH = 16
HELD = 50_000_000  # accuracies, resampled ones too: 0.4 GB, six times that for the tables

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, eq=False)
class Score:
    """One skill's examples under one recipe, example by example."""

    right: Tensor  # (examples,): predictions whose likeliest class is the right one
    counts: Tensor  # (examples,): predictions
    nats: Tensor  # (examples,): cross-entropy, summed over the predictions; NaN if one is NaN

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
    """Estimates of an evaluation's scores, all of them paired: made on the same resamplings."""

    def __init__(self, evaluation: Evaluation, samples: int = SAMPLES, seed: int = 0) -> None:
        """Raise ConfigError where that is more than memory should hold: `check_samples`."""
        check_samples(samples, len(evaluation.scores), len(evaluation.alone))
        self.evaluation = evaluation
        self._accuracies: dict[Score, Estimate] = {}
        for skill, alone in evaluation.alone.items():
            found = list(dict.fromkeys([alone, *(by[skill] for _, by in evaluation.scores)]))
            right = torch.stack([score.right for score in found])
            estimates = shares(right, alone.counts, samples, seed, skill)
            self._accuracies.update(zip(found, estimates, strict=True))
        self._alone = self.accuracies(evaluation.alone)

    def accuracies(self, scores: Mapping[str, Score]) -> dict[str, Estimate]:
        """By skill, the share of right predictions."""
        return {skill: self._accuracies[score] for skill, score in scores.items()}

    def normalised(self, scores: Mapping[str, Score]) -> dict[str, Estimate]:
        """By skill, the accuracy over that of its own adapter on the same resamplings."""
        accuracies = self.accuracies(scores)
        return {skill: ratio(found, self._alone[skill]) for skill, found in accuracies.items()}

    def average(self, scores: Mapping[str, Score]) -> Estimate:
        """The mean of the skills' normalised accuracies."""
        return mean(list(self.normalised(scores).values()))


def check_samples(samples: int, merges: int, skills: int) -> None:
    """Raise ConfigError where so many resamplings of so many accuracies are too many to hold."""
    accuracies = (merges + 1) * skills
    if samples * accuracies > HELD:
        raise ConfigError(
            f"{samples} resamplings of {merges} merges and the own adapters, on {skills} skills, "
            f"are {samples * accuracies} numbers, and at most {HELD} are held: take at most "
            f"{HELD // accuracies} resamplings, or fewer methods and preferences"
        )


def evaluate(
    student: Student,
    examples: Mapping[str, Examples],
    recipes: Sequence[Recipe],
    batch: int = BATCH,
    progress: Progress = lambda done, total: None,
) -> Evaluation:
    """Run every recipe over all skills' examples, and each skill's own adapter over its own.

    `progress` counts examples. Raises ExamplesError where there are none or the right answers are
    not known, and where a merge predicts NaN.
    """
    _check_examples(examples)
    own = {skill: own_recipe(student.bank, skill) for skill in examples}
    # The own adapters first: one that is broken breaks its merges, and nobody waits for those.
    plan = {recipe: [skill] for skill, recipe in own.items()}
    plan.update({recipe: list(examples) for recipe in recipes})
    tell = _counting(
        progress, sum(len(examples[skill]) for skills in plan.values() for skill in skills)
    )
    merger = Merger(student.bank, torch.float32, PREPARED_BYTES)
    scores: dict[Recipe, dict[str, Score]] = {}
    for recipe, skills in plan.items():
        with _carrying(student, merger, recipe):
            scores[recipe] = {
                skill: _sound(score(examples[skill], batch, tell), skill, recipe)
                for skill in skills
            }
    alone = {skill: scores[recipe][skill] for skill, recipe in own.items()}
    return Evaluation(alone, [(recipe, scores[recipe]) for recipe in recipes])


def own_recipe(bank: FactorBank, skill: str) -> Recipe:
    """A skill's own adapter as it was trained."""
    return Recipe(Preference.of({skill: 1.0}), default_method(), bank.digest)


def stated(method: MethodChoice) -> str:
    """A method's text without what goes without saying; it reads back as the same method."""
    defaults = parse_method(method.name).parameters
    own = tuple(given for given in method.parameters if given not in defaults)
    return str(replace(method, parameters=own))


@torch.no_grad()
def score(
    examples: Examples, batch: int = BATCH, tell: Callable[[int], None] = lambda rows: None
) -> Score:
    """All examples under what the model carries; `tell` hears how many were done at a time.

    A prediction that is NaN is not right, and its example's `nats` are NaN.
    """
    right, counts, nats = (torch.zeros(len(examples), dtype=torch.float64) for _ in range(3))
    for rows in batches(examples, batch):
        logits, targets = examples.logits(rows), examples.targets(rows)
        assert targets is not None
        sizes = examples.counts(rows)
        losses = cross_entropy(targets, logits)
        # The likeliest of NaNs is the first class, which may well be the right one.
        hits = (logits.argmax(-1) == targets) & ~losses.isnan()
        right[rows] = _sums(hits, sizes)
        nats[rows] = _sums(losses, sizes)
        counts[rows] = torch.tensor(sizes, dtype=torch.float64)
        tell(len(rows))
    return Score(right, counts, nats)


def _check_examples(examples: Mapping[str, Examples]) -> None:
    if not examples:
        raise ExamplesError("there are no examples of any skill to evaluate")
    for skill, asked in examples.items():
        rows = range(len(asked))
        if not any(asked.counts(rows)):
            raise ExamplesError(f"the examples of {skill!r} ask for no prediction")
        if asked.targets(rows) is None:
            raise ExamplesError(f"the examples of {skill!r} have no answers to compare with")


def _sound(score: Score, skill: str, recipe: Recipe) -> Score:
    """The same, unless it is of predictions that are none."""
    if score.nats.isnan().any():
        merge = f"{stated(recipe.method)} at {recipe.preference}"
        raise ExamplesError(
            f"{merge} predicts NaN on the examples of {skill!r}: an adapter in it is too large, or "
            "the base model is broken"
        )
    return score


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
