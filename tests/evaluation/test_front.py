import math

import pytest
import torch

from dynmerge.evaluation.bootstrap import Estimate, difference, least, mean, ratio
from dynmerge.evaluation.front import (
    dominated_volume,
    hypervolume,
    monotonicity,
    on_front,
    steps,
)
from dynmerge.evaluation.simplex import corners, even_grid
from dynmerge.preference import Preference
from tests import reference


@pytest.mark.parametrize("skills", [1, 2, 3, 4])
def test_the_dominated_volume_is_that_of_the_union_of_boxes(skills: int) -> None:
    points = torch.rand(9, skills, generator=torch.Generator().manual_seed(skills))
    corner = torch.full((skills,), 0.1)
    expected = reference.hypervolume(points.double().tolist(), corner.double().tolist())
    assert dominated_volume(points, corner) == pytest.approx(expected, abs=1e-9)


def sure(*values: float, spread: float = 0.0) -> dict[str, Estimate]:
    """Estimates of skills a, b, ...; every resampling says the same but for `spread`."""
    luck = torch.linspace(-spread, spread, 101, dtype=torch.float64)
    return {chr(97 + n): Estimate(value, value + luck) for n, value in enumerate(values)}


def test_the_hypervolume_is_resampled() -> None:
    points = [sure(1.0, 0.5), sure(0.5, 1.0), sure(0.4, 0.4)]
    found = hypervolume(points).interval()
    assert found.value == found.low == found.high == pytest.approx(0.75)
    assert hypervolume(points, reference=0.5).value == 0
    found = hypervolume([sure(1.0, 0.5, spread=0.1)]).interval()
    assert found.value == pytest.approx(0.5)
    assert found.low < 0.45
    assert found.high > 0.55
    assert math.isnan(hypervolume([sure(1.0, math.nan)]).value)


def test_a_point_that_is_infinite_in_a_skill_dominates_without_bounds_unless_it_is_nothing() -> (
    None
):
    assert hypervolume([sure(1.0, math.inf), sure(0.5, 0.5)]).value == math.inf
    assert hypervolume([sure(0.0, math.inf), sure(0.5, 0.5)]).value == pytest.approx(0.25)
    assert hypervolume([sure(0.0, math.inf)]).value == 0


def test_where_an_own_adapter_is_never_right_all_numbers_made_of_it_have_the_same_bounds() -> None:
    """In a fifth of the resamplings, and the merge is right there: no end above can be known."""
    rare = torch.cat([torch.full((80,), 0.25), torch.zeros(20)]).double()
    sound = torch.full((100,), 0.5, dtype=torch.float64)
    own = {"a": Estimate(0.5, sound), "b": Estimate(0.25, rare)}
    found = {"a": Estimate(0.4, 0.8 * sound), "b": Estimate(0.25, 0.5 * sound)}
    point = {skill: ratio(found[skill], own[skill]) for skill in own}
    average, volume = mean(list(point.values())).interval(), hypervolume([point]).interval()
    assert (average.low, average.high) == (pytest.approx(0.9), math.inf)
    assert (volume.low, volume.high) == (pytest.approx(0.8), math.inf)
    worst = least(list(point.values())).interval()
    assert (worst.low, worst.high) == (pytest.approx(0.8), pytest.approx(0.8))
    assert difference(mean(list(point.values())), own["a"]).interval().high == math.inf


def test_the_front_is_what_nothing_beats() -> None:
    points = [sure(1.0, 0.2), sure(0.5, 0.5), sure(0.4, 0.5), sure(0.2, 1.0), sure(0.5, 0.5)]
    assert on_front(points) == [True, True, False, True, True]


def test_steps_lead_to_the_next_preference_that_gives_more_to_one_at_another_s_cost() -> None:
    grid = even_grid(["a", "b"], 2)
    assert [grid[2].weights, grid[1].weights] == [{"b": 1.0}, {"a": 0.5, "b": 0.5}]
    assert sorted(steps(grid, ["a", "b"])) == [(0, 1, "b"), (1, 0, "a"), (1, 2, "b"), (2, 1, "a")]
    three = even_grid(["a", "b", "c"], 4)
    # Each of the 6 directions has lines of 5, 4, 3 and 2 points.
    assert len(steps(three, ["a", "b", "c"])) == 6 * (4 + 3 + 2 + 1)
    raw = [
        Preference.of({"a": 1.0, "b": 0.5}, normalize=False),
        Preference.of({"a": 0.5, "b": 0.2}, normalize=False),
    ]
    assert steps(raw, ["a", "b"]) == []
    beyond = Preference.of({"a": 2.0, "b": -1.0}, normalize=False, allow_negative=True)
    further = Preference.of({"a": 1.5, "b": -0.5}, normalize=False, allow_negative=True)
    found = steps([beyond, further, *corners(["a", "b"])], ["a", "b"])
    assert found == [(3, 2, "a"), (2, 3, "b")]
    assert steps([*corners(["a", "b"]), *corners(["a", "b"])], ["a", "b"]).count((0, 1, "b")) <= 1


def test_monotonicity_counts_steps_that_do_not_fall() -> None:
    grid = even_grid(["a", "b"], 2)  # a=1, half, b=1
    rising = [sure(0.9, 0.1), sure(0.6, 0.5), sure(0.2, 0.8)]
    found = monotonicity(grid, rising)
    assert (found.steps, found.as_measured, found.within) == (4, 4, 4)
    falling = [sure(0.5, 0.1), sure(0.6, 0.5), sure(0.2, 0.8)]  # a falls from half to a=1
    found = monotonicity(grid, falling)
    assert (found.steps, found.as_measured, found.within) == (4, 3, 3)
    unsure = [sure(0.5, 0.1, spread=0.3), sure(0.6, 0.5, spread=-0.3), sure(0.2, 0.8)]
    found = monotonicity(grid, unsure)
    assert (found.as_measured, found.within) == (3, 4)
