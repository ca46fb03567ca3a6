"""What is measured is measured against each adapter alone, on its own examples."""

from collections.abc import Mapping, Sequence
from typing import cast

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dynmerge.adapters.adapter import Adapter
from dynmerge.calibration.plan import Objective
from dynmerge.calibration.teachers import alone, anchor, floored, lessons
from dynmerge.errors import ExamplesError
from dynmerge.student import Student
from dynmerge.texts.passages import Passages
from tests import reference
from tests.calibration.conftest import passages
from tests.calibration.network import RANKS, Points
from tests.conftest import tiny_model

WEIGHTS = {"ada": 0.2, "bob": 0.5, "cyd": 0.3}


def predictions(
    adapters: Mapping[str, Adapter], weights: Mapping[str, float], texts: Passages
) -> list[Tensor]:
    """Of a model with W + Delta written out, one row at a time."""
    model = reference.written_out(tiny_model(), reference.merged_deltas(adapters, weights))
    with torch.no_grad():
        return [
            prediction
            for passage in texts.passages
            for prediction in reference.last_predictions(
                model, passage.tokens, len(passage.targets)
            )
        ]


def by_hand(
    adapters: Mapping[str, Adapter], name: str, texts: Passages, objective: Objective
) -> float:
    merged = predictions(adapters, WEIGHTS, texts)
    if objective == "entropy":
        found = [reference.entropy(prediction) for prediction in merged]
    elif objective == "labels":
        right = [cast("int", t) for passage in texts.passages for t in passage.targets]
        pairs = zip(right, merged, strict=True)
        found = [reference.cross_entropy(target, prediction) for target, prediction in pairs]
    else:
        own = predictions(adapters, {name: 1.0}, texts)
        found = [reference.divergence(q, p) for q, p in zip(own, merged, strict=True)]
    return sum(found) / len(found)


@pytest.mark.parametrize("objective", ["distil", "entropy", "labels"])
def test_a_lesson_is_the_mean_over_all_predictions(
    objective: Objective,
    pupil: Student,
    skilled: dict[str, Adapter],
    texts: dict[str, Passages],
) -> None:
    bank = pupil.bank
    weights = torch.tensor([WEIGHTS[name] for name in bank.names])
    cores = bank.layout.split(bank.flatten([group.weighted(weights) for group in bank.groups]))
    made = lessons(pupil, texts, objective, 4)
    for name, lesson in zip(bank.names, made, strict=True):
        expected = by_hand(skilled, name, texts[name], objective)
        with pupil.under(cores), torch.no_grad():
            everything = range(len(texts[name]))
            assert float(lesson.loss(everything)) == pytest.approx(expected, abs=2e-3)
            for batch in (2, 64):
                assert lesson.mean(batch) == pytest.approx(expected, abs=2e-3)


def test_an_anchor_is_the_measure_under_the_adapter_alone(
    pupil: Student, skilled: dict[str, Adapter], texts: dict[str, Passages]
) -> None:
    distilled, certain = (lessons(pupil, texts, kind, 4) for kind in ("distil", "entropy"))
    for task, name in enumerate(pupil.bank.names):
        assert anchor(pupil, task, distilled[task]) == pytest.approx(0, abs=1e-5)
        own = [reference.entropy(p) for p in predictions(skilled, {name: 1.0}, texts[name])]
        expected = sum(own) / len(own)
        assert anchor(pupil, task, certain[task]) == pytest.approx(expected, abs=1e-3)


def test_what_the_teacher_said_takes_no_gradient(
    pupil: Student, texts: dict[str, Passages]
) -> None:
    lesson = lessons(pupil, texts, "distil", 4)[1]
    cores = [core.requires_grad_() for core in alone(pupil.bank, 0)]
    with pupil.under(cores):
        loss = lesson.loss([0, 3])
    gradients = torch.autograd.grad(loss, cores)
    assert any(float(gradient.abs().max()) > 1e-3 for gradient in gradients)


class Masked(Points):
    """As a model that never says its last class."""

    def logits(self, rows: Sequence[int]) -> Tensor:
        return super().logits(rows) - torch.tensor([0.0, 0.0, 0.0, 1e9])


def test_a_masked_class_is_no_reason_for_nan(small: Student) -> None:
    masked = {name: Masked(small.model, task, 4, task) for task, name in enumerate(RANKS)}
    for task, lesson in enumerate(lessons(small, masked, "distil", 4)):
        assert anchor(small, task, lesson) == pytest.approx(0, abs=1e-5)
        assert lesson.mean(4) > 0


def test_a_skill_without_examples_or_answers_is_named(
    pupil: Student, texts: dict[str, Passages]
) -> None:
    with pytest.raises(ExamplesError, match=r"no texts for the skill 'bob' \(given: ada, cyd\)"):
        lessons(pupil, {name: texts[name] for name in ("ada", "cyd")}, "distil", 4)
    model = cast("PreTrainedModel", pupil.model)
    unknown = {**texts, "bob": passages(model, 1, 2, range(3, 9), known=False)}
    made = lessons(pupil, unknown, "labels", 4)
    with pytest.raises(ExamplesError, match="the texts of 'bob' have no answers"):
        made[1].mean(2)


def test_a_skill_that_loses_next_to_nothing_does_not_count_without_bounds() -> None:
    assert floored([0.3, -0.1, 0.2]) == [0.3, 0.1, 0.2]
    assert floored([0.3, 1e-9, 0.3]) == pytest.approx([0.3, 0.02, 0.3])
    assert min(floored([0.0, 0.0])) > 0


@pytest.mark.parametrize("objective", ["distil", "labels"])
def test_at_best_they_are_nought_however_sure_an_adapter_is(
    objective: Objective, pupil: Student, texts: dict[str, Passages]
) -> None:
    made = lessons(pupil, texts, objective, 4)
    assert [anchor(pupil, task, lesson) for task, lesson in enumerate(made)] == [0, 0, 0]
