"""The held-out score: 0 is every adapter itself, 1 the base model where each of them differs from
it by enough.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dynmerge.bank.bank import ModuleFactors
from dynmerge.calibration.draws import centre
from dynmerge.calibration.judge import Judge
from dynmerge.calibration.teachers import alone, lessons
from dynmerge.errors import CalibrationError
from dynmerge.student import Student
from dynmerge.texts.passages import Passages
from tests.calibration.network import Network, Points, network_bank

MIXED = torch.tensor([0.2, 0.5, 0.3])


def nothing(student: Student) -> list[Tensor]:
    return [torch.zeros(module.core_shape) for module in student.bank.modules]


@pytest.mark.parametrize("objective", ["distil", "labels"])
def test_the_base_model_is_one_and_an_adapter_on_its_own_is_nought(
    objective: str, pupil: Student, held_out: dict[str, Passages]
) -> None:
    judge = Judge.of(pupil, held_out, objective)  # type: ignore[arg-type]
    assert judge.at(MIXED, nothing(pupil)) == pytest.approx(1, abs=1e-4)
    assert judge.score(lambda rho: nothing(pupil)) == pytest.approx(1, abs=1e-4)
    # An adapter may be wrong about answers; under labels nought is who is sure of all of them.
    for task in range(3) if objective == "distil" else ():
        corner = torch.eye(3)[task]
        assert judge.at(corner, alone(pupil.bank, task)) == pytest.approx(0, abs=1e-4)


def faint(module: ModuleFactors) -> ModuleFactors:
    """With a tenth of the first task's update."""
    left = module.left.clone()
    left[:, module.slices()[0]] /= 10
    return replace(module, left=left)


def test_a_skill_that_hardly_differs_from_the_base_model_counts_for_less() -> None:
    bank = network_bank()
    bank = replace(bank, modules=tuple(map(faint, bank.modules)))
    student = Student(Network(), bank)
    held_out = {name: Points(student.model, task, 9, task) for task, name in enumerate(bank.names)}
    judge = Judge.of(student, held_out, "distil")
    gaps = [lesson.mean(64) for lesson in lessons(student, held_out, "distil", 64)]
    least = sum(gaps) / 3 / 10
    assert gaps[0] < 0.5 * least < least < min(gaps[1:])
    assert judge.scales == pytest.approx([least, *gaps[1:]])
    base = float(MIXED[0]) * gaps[0] / least + float(MIXED[1:].sum())
    assert judge.at(MIXED, nothing(student)) == pytest.approx(base)
    assert base < 0.9
    for task in range(3):
        assert judge.at(torch.eye(3)[task], alone(bank, task)) == pytest.approx(0, abs=1e-4)


def test_it_is_the_weighted_gap_of_those_who_are_wanted(
    pupil: Student, held_out: dict[str, Passages]
) -> None:
    judge = Judge.of(pupil, held_out, "distil")
    cores = alone(pupil.bank, 2)
    gaps = []
    for lesson in lessons(pupil, held_out, "distil", 64):
        base = lesson.mean(64)
        with pupil.under(cores):
            gaps.append(lesson.mean(64) / base)
    expected = sum(float(share) * gap for share, gap in zip(MIXED, gaps, strict=True))
    assert judge.at(MIXED, cores) == pytest.approx(expected, rel=1e-3)
    assert judge.at(torch.tensor([1.0, 0, 0]), cores) == pytest.approx(gaps[0], rel=1e-3)


def test_the_score_is_the_mean_over_the_centre_and_four_others(
    pupil: Student, held_out: dict[str, Passages]
) -> None:
    judge = Judge.of(pupil, held_out, "distil")
    assert len(judge.preferences) == 5
    assert judge.preferences[0].equal(centre(3))
    assert len({tuple(rho.tolist()) for rho in judge.preferences}) == 5
    asked: list[Tensor] = []

    def cores(rho: Tensor) -> list[Tensor]:
        asked.append(rho)
        return alone(pupil.bank, 0)

    found = judge.score(cores)
    expected = [judge.at(rho, alone(pupil.bank, 0)) for rho in asked]
    assert found == pytest.approx(sum(expected) / 5)
    assert asked == list(judge.preferences)
    one = Judge.of(pupil, held_out, "distil", MIXED)
    assert list(one.preferences) == [MIXED]


def test_where_a_skill_predicts_no_numbers_nothing_is_judged(
    pupil: Student, held_out: dict[str, Passages]
) -> None:
    nan = float("nan")
    modules = tuple(replace(module, left=module.left * nan) for module in pupil.bank.modules)
    student = Student(pupil.model, replace(pupil.bank, modules=modules))
    with pytest.raises(CalibrationError, match=r"held-out texts of 'ada' .* predicts NaN"):
        Judge.of(student, held_out, "distil")
    student.close()


def test_certainty_is_judged_by_divergence(pupil: Student, held_out: dict[str, Passages]) -> None:
    scores = [
        Judge.of(pupil, held_out, objective, MIXED).score(lambda rho: alone(pupil.bank, 1))
        for objective in ("distil", "entropy", "labels")
    ]
    assert scores[0] == scores[1] != scores[2]
