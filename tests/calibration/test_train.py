"""A training learns, is guarded, ends early, and goes on where it was stopped."""

import io
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from dynmerge.calibration.draws import centre, preference
from dynmerge.calibration.learned import Learned
from dynmerge.calibration.objective import smooth_tchebycheff
from dynmerge.calibration.plan import Plan, published
from dynmerge.calibration.teachers import floored, lessons
from dynmerge.calibration.train import Training, improved
from dynmerge.errors import StateError
from dynmerge.merging.carried.maps import LINEAR
from dynmerge.student import Student
from dynmerge.texts.passages import Passages
from tests.calibration.network import Points

Texts = dict[str, Passages]
Sheets = dict[str, Points]
PLAN = Plan("tara-a", steps=9, batch=2, check=3)


def tables(learned: Learned) -> list[Tensor]:
    return [table.detach().clone() for _, table in learned.parameters()]


def same(one: Learned, other: Learned) -> bool:
    pairs = zip(tables(one), tables(other), strict=True)
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


def stored(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Through a file, as a later process finds it."""
    file = io.BytesIO()
    torch.save(dict(state), file)
    file.seek(0)
    found: Mapping[str, Any] = torch.load(file, weights_only=True)
    return found


def test_what_is_learned_holds_on_texts_that_were_held_out(
    pupil: Student, texts: Texts, held_out: Texts
) -> None:
    plan = replace(PLAN, steps=16, batch=4, check=8)
    training = Training(pupil, texts, held_out, plan)
    reports: list[int] = []
    best = training.run(lambda training: reports.append(training.step))
    assert reports == [check.step for check in training.checks[1:]] == [8, 16]
    assert improved(training.checks)
    scores = [check.score for check in training.checks]
    assert min(scores) < 0.95 * scores[0]
    judge = training._judge
    assert judge.score(best.cores) == pytest.approx(min(scores))
    assert not any(table.requires_grad for table in tables(best))


@pytest.mark.parametrize("method", ["tara-a", "core"])
def test_a_step_takes_the_gradient_of_the_whole_though_it_holds_one_skill_at_a_time(
    method: str, small: Student, points: Sheets, held_points: Sheets
) -> None:
    plan = replace(PLAN, method=method, mu=0.1, pull=0.05)
    training, twin = (Training(small, points, held_points, plan) for _ in range(2))
    for _ in range(2):  # the second is away from the start
        twin.restore(training.state())
        training._advance()
        rho = preference(len(points), twin._generator)
        present = [task for task in range(len(points)) if rho[task]]
        with small.under(twin.learned.cores(rho)):
            gaps = torch.stack([twin._gap(task) for task in present])
        whole = smooth_tchebycheff(gaps, rho[present], plan.mu) + plan.pull * twin._distance()
        expected = torch.autograd.grad(whole, twin._tables)
        for table, slope in zip(training._tables, expected, strict=True):
            assert table.grad is not None
            assert_close(table.grad, slope, rtol=1e-4, atol=1e-7)
        assert training._losses[-1] == pytest.approx(float(whole.detach()))


def test_gaps_are_divided_by_those_that_the_start_leaves_on_the_texts(
    small: Student, points: Sheets, held_points: Sheets
) -> None:
    training = Training(small, points, held_points, PLAN)
    made = lessons(small, points, PLAN.objective, 64)
    with small.under(training.learned.cores(centre(3))):
        gaps = [lesson.mean(64) for lesson in made]
    assert training._scales == pytest.approx(floored(gaps))
    base = floored([lesson.mean(64) for lesson in made])
    assert training._scales != pytest.approx(base, rel=0.1)


def test_a_seed_makes_a_training(small: Student, points: Sheets, held_points: Sheets) -> None:
    def trained(seed: int) -> Training:
        training = Training(small, points, held_points, replace(PLAN, steps=3, seed=seed))
        training.run()
        return training

    one, again, other = trained(0), trained(0), trained(1)
    assert one.checks == again.checks != other.checks
    assert same(one.learned, again.learned)
    assert not same(one.learned, other.learned)


@pytest.mark.parametrize("method", ["tara-b", "core"])
def test_a_training_goes_on_where_it_was_stopped(
    method: str, small: Student, points: Sheets, held_points: Sheets
) -> None:
    plan = replace(PLAN, method=method, pull=0.1, decay=0.01)
    states: list[Mapping[str, Any]] = []
    whole = Training(small, points, held_points, plan)
    whole.run(lambda training: states.append(stored(training.state())))
    assert len(states) == 3
    later = Training(small, points, held_points, plan)
    later.restore(states[0])
    assert (later.step, len(later.checks)) == (3, 2)
    later.run()
    assert later.checks == whole.checks
    assert same(later.learned, whole.learned)
    assert same(later.best, whole.best)
    ended = Training(small, points, held_points, plan)
    ended.restore(states[-1])
    narrow = [{name: table[:1, :1] for name, table in own.items()} for own in states[0]["best"]]
    with pytest.raises(StateError, match="the state is none of this training"):
        later.restore({**states[0], "best": narrow})
    assert ended.done
    assert same(ended.run(), whole.best)


def test_a_state_does_not_move_with_the_training(
    small: Student, points: Sheets, held_points: Sheets
) -> None:
    training = Training(small, points, held_points, PLAN)
    states: list[Mapping[str, Any]] = []
    training.run(lambda training: states.append(training.state()))
    later = Training(small, points, held_points, PLAN)
    later.restore(states[0])
    assert later.step == 3
    later.run()
    assert later.checks == training.checks
    assert same(later.learned, training.learned)


def test_a_score_that_does_not_fall_ends_it(
    small: Student, points: Sheets, held_points: Sheets
) -> None:
    plan = replace(PLAN, rate=0.0, steps=100, check=1, patience=2)
    training = Training(small, points, held_points, plan)
    training.run()
    assert training.step == 2
    assert not improved(training.checks)


def test_what_is_worse_than_the_start_is_not_kept(
    small: Student, points: Sheets, held_points: Sheets
) -> None:
    start = Learned.start(small.bank, "core", "ratio", LINEAR)
    plan = replace(PLAN, method="core", rate=1e4, check=1, patience=2)
    training = Training(small, points, held_points, plan)
    best = training.run()
    assert training.done
    assert not improved(training.checks)
    assert same(best, start)
    assert not same(training.learned, start)


def test_a_score_that_is_no_number_ends_it(pupil: Student, texts: Texts, held_out: Texts) -> None:
    plan = replace(PLAN, method="core", rate=1e30, check=1)
    training = Training(pupil, texts, held_out, plan)
    best = training.run()
    assert training.step == 1
    assert not improved(training.checks)
    assert same(best, Learned.start(pupil.bank, "core", "ratio", LINEAR))


def test_a_pull_keeps_tables_near_their_start(
    small: Student, points: Sheets, held_points: Sheets
) -> None:
    start = tables(Learned.start(small.bank, "core", "ratio", LINEAR))

    def moved(pull: float) -> float:
        plan = replace(PLAN, method="core", pull=pull, steps=6, check=6)
        training = Training(small, points, held_points, plan)
        training.run()
        pairs = zip(tables(training.learned), start, strict=True)
        return max(float((mine - first).abs().max()) for mine, first in pairs)

    assert moved(1e3) < 0.5 * moved(0.0)


class Counted:
    """Examples that say whether the model was asked about them."""

    def __init__(self, examples: Points) -> None:
        self.examples = examples
        self.asked = 0

    def __len__(self) -> int:
        return len(self.examples)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.examples, name)

    def logits(self, rows: list[int]) -> Tensor:
        self.asked += 1
        return self.examples.logits(rows)


def test_for_one_preference_the_absent_are_not_asked(
    small: Student, points: Sheets, held_points: Sheets
) -> None:
    counted = {name: Counted(own) for name, own in points.items()}
    plan = replace(published("tara-a", (0.25, 0.0, 0.75)), steps=3, batch=2, check=3)
    training = Training(small, counted, held_points, plan)  # type: ignore[arg-type]
    assert training._scales == [1.0, 1.0, 1.0]
    before = {name: each.asked for name, each in counted.items()}
    training.run()
    asked = {name: each.asked - before[name] for name, each in counted.items()}
    assert asked == {"ada": 3, "bob": 0, "cyd": 3}
    start = Learned.start(small.bank, "tara-a", "fixed")
    for group, own, first in zip(
        small.bank.groups, training.learned.tables, start.tables, strict=True
    ):
        assert not torch.equal(own["fixed"], first["fixed"]) or group.present == [1]
