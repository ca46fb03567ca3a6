"""Results: an evaluation in numbers that can be written down, and as tables."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from dynmerge.errors import ConfigError
from dynmerge.evaluation.bootstrap import (
    LEVEL,
    SAMPLES,
    Estimate,
    Interval,
    difference,
    least,
    mean,
)
from dynmerge.evaluation.front import Monotonicity, hypervolume, monotonicity, on_front
from dynmerge.evaluation.scores import Evaluation, Judgement, Score, stated
from dynmerge.recipe import Recipe
from dynmerge.texts.examples import Examples


@dataclass(frozen=True, slots=True)
class TaskEntry:
    """What a skill was asked, and how its own adapter answers."""

    digest: str  # of its examples
    predictions: list[int]  # of each example
    alone: Interval
    alone_nats: float
    alone_right: list[int]


@dataclass(frozen=True, slots=True)
class SkillEntry:
    """One skill under one merge; `normalised` is over its own adapter's accuracy."""

    accuracy: Interval
    normalised: Interval
    nats: float
    right: list[int]  # predictions of each example


@dataclass(frozen=True, slots=True)
class MergeEntry:
    """One merge. `average` is over the skills, of normalised accuracies.

    A preference has shares; multipliers, which are no point of the simplex, are raw weights.
    """

    method: str
    preference: str
    shares: dict[str, float] | None
    raw_weights: dict[str, float] | None
    recipe: str
    skills: dict[str, SkillEntry]
    average: Interval
    on_front: bool


@dataclass(frozen=True, slots=True)
class MethodEntry:
    """One method over all preferences. `over_first` is its average less the first method's."""

    method: str
    average: Interval
    over_first: Interval
    worst: Interval
    hypervolume: Interval
    monotonicity: Monotonicity


@dataclass(frozen=True, slots=True)
class Results:
    """An evaluation's numbers: intervals are percentiles of a bootstrap over examples."""

    base: str
    bank: str
    level: float
    samples: int
    seed: int
    tasks: dict[str, TaskEntry]
    merges: list[MergeEntry]
    methods: list[MethodEntry]

    @classmethod
    def of(
        cls,
        evaluation: Evaluation,
        examples: Mapping[str, Examples],
        base: str,
        bank: str,
        samples: int = SAMPLES,
        seed: int = 0,
    ) -> "Results":
        """The numbers of an evaluation of `examples` on the base model and bank so named.

        Raises ConfigError where no merge was evaluated, or `check_samples` refuses.
        """
        if not evaluation.scores:
            raise ConfigError("no recipe was evaluated: results are of one merge or more")
        judgement = Judgement(evaluation, samples, seed)
        front = on_front([judgement.accuracies(scores) for _, scores in evaluation.scores])
        merges = [
            _merge_entry(judgement, recipe, scores, best)
            for (recipe, scores), best in zip(evaluation.scores, front, strict=True)
        ]
        tasks = {
            skill: _task_entry(judgement, skill, score, examples[skill].digest)
            for skill, score in evaluation.alone.items()
        }
        methods = _method_entries(judgement, evaluation.scores)
        return cls(base, bank, LEVEL, samples, seed, tasks, merges, methods)

    def to_json(self) -> str:
        """All of it; what is infinite or no number (a ratio to an accuracy of 0) is null."""
        return json.dumps(_finite(asdict(self)), allow_nan=False)

    def merge_table(self) -> tuple[list[str], list[list[str]]]:
        """Heads and rows: each merge's accuracy by skill; first each skill's own adapter."""
        heads = ["method", "preference", *self.tasks, "average, normalised"]
        own = ["own adapter", "1 each", *(str(task.alone) for task in self.tasks.values()), "1"]
        rows = [
            [
                merge.method,
                merge.preference,
                *(str(skill.accuracy) for skill in merge.skills.values()),
                str(merge.average) + " *" * merge.on_front,
            ]
            for merge in self.merges
        ]
        return heads, [own, *rows]

    def method_table(self) -> tuple[list[str], list[list[str]]]:
        """Heads and rows: each method over all preferences."""
        first = self.methods[0].method
        heads = ["method", "average", f"less {first}", "worst skill", "hypervolume", "steps kept"]
        rows = [
            [
                entry.method,
                str(entry.average),
                str(entry.over_first),
                str(entry.worst),
                str(entry.hypervolume),
                f"{entry.monotonicity.within} of {entry.monotonicity.steps}",
            ]
            for entry in self.methods
        ]
        return heads, rows

    def to_markdown(self) -> str:
        """Both tables, and what their numbers are."""
        asked = ", ".join(
            f"{skill} {len(task.predictions)} ({sum(task.predictions)})"
            for skill, task in self.tasks.items()
        )
        return "\n".join(
            [
                f"# {self.base}, bank {self.bank[:12]}",
                "",
                f"Examples (predictions): {asked}. Accuracy is the share of right predictions; in "
                f"brackets, {self.level:.0%} percentile intervals of a bootstrap over examples "
                f"({self.samples} resamplings, seed {self.seed}). Normalised: over the skill's own "
                "adapter on the same resamplings. \\* on the Pareto front of all merges here.",
                "",
                *_markdown(*self.merge_table()),
                "",
                "Over all preferences, normalised. Hypervolume: above 0 in every skill. Steps "
                "kept: of the steps between neighbouring preferences that give a skill more, how "
                "many do not lower its accuracy beyond their interval; raw weights are no steps.",
                "",
                *_markdown(*self.method_table()),
                "",
            ]
        )


def _task_entry(judgement: Judgement, skill: str, score: Score, digest: str) -> TaskEntry:
    return TaskEntry(
        digest,
        _whole(score.counts.tolist()),
        judgement.accuracies({skill: score})[skill].interval(),
        score.loss,
        _whole(score.right.tolist()),
    )


def _merge_entry(
    judgement: Judgement, recipe: Recipe, scores: Mapping[str, Score], best: bool
) -> MergeEntry:
    accuracies, normalised = judgement.accuracies(scores), judgement.normalised(scores)
    skills = {
        skill: SkillEntry(
            accuracies[skill].interval(),
            normalised[skill].interval(),
            score.loss,
            _whole(score.right.tolist()),
        )
        for skill, score in scores.items()
    }
    preference = recipe.preference
    return MergeEntry(
        stated(recipe.method),
        str(preference),
        None if preference.is_raw else preference.weights,
        preference.weights if preference.is_raw else None,
        recipe.digest,
        skills,
        judgement.average(scores).interval(),
        best,
    )


def _method_entries(
    judgement: Judgement, scores: Sequence[tuple[Recipe, Mapping[str, Score]]]
) -> list[MethodEntry]:
    groups: dict[str, list[tuple[Recipe, Mapping[str, Score]]]] = {}
    for recipe, by_skill in scores:
        groups.setdefault(stated(recipe.method), []).append((recipe, by_skill))
    entries: list[MethodEntry] = []
    first: Estimate | None = None
    for method, members in groups.items():
        reached = [judgement.normalised(by_skill) for _, by_skill in members]
        average = mean([mean(list(point.values())) for point in reached])
        first = average if first is None else first
        entries.append(
            MethodEntry(
                method,
                average.interval(),
                difference(average, first).interval(),
                mean([least(list(point.values())) for point in reached]).interval(),
                hypervolume(reached).interval(),
                monotonicity(
                    [recipe.preference for recipe, _ in members],
                    [judgement.accuracies(by_skill) for _, by_skill in members],
                ),
            )
        )
    return entries


def _whole(values: Sequence[float]) -> list[int]:
    return [round(value) for value in values]


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(heads) + " |",
        "|" + "---|" * len(heads),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
