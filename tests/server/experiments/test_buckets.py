"""GrowthBook's published vectors (its SDKs' `cases.json`, version 0.7.1 of the specification)."""

import pytest

from dynmerge_server.experiments.buckets import Range, chosen, place, ranges

PLACES = [
    ("seed", "a", 0.0505),
    ("seed", "b", 0.2696),
    ("foo", "ab", 0.2575),
    ("foo", "def", 0.2019),
    ("89123klj", "8952klfjas09ujkasdf", 0.124),
    ("90850943850283058242805", "123", 0.7516),
    ("()**(%$##$%#$#", '___)((*":&', 0.0128),
]

# Those with weights that sum to 1 and a traffic from 0 to 1: a declaration has no others.
PARTS = [
    ([0.5, 0.5], 1, [(0, 0.5), (0.5, 1)]),
    ([0.5, 0.5], 0.5, [(0, 0.25), (0.5, 0.75)]),
    ([0.5, 0.5], 0, [(0, 0), (0.5, 0.5)]),
    ([0.25] * 4, 1, [(0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1)]),
    ([0.4, 0.6], 1, [(0, 0.4), (0.4, 1)]),
    ([0.2, 0.3, 0.5], 1, [(0, 0.2), (0.2, 0.5), (0.5, 1)]),
    ([0.2, 0.3, 0.5], 0.2, [(0, 0.04), (0.2, 0.26), (0.5, 0.6)]),
]

EVEN, REDUCED = [(0, 0.5), (0.5, 1)], [(0, 0.25), (0.5, 0.75)]
CHOICES = [
    (0.2, EVEN, 0),
    (0.4, EVEN, 0),
    (0.6, EVEN, 1),
    (0.8, EVEN, 1),
    (0, EVEN, 0),
    (0.5, EVEN, 1),
    (0.2, REDUCED, 0),
    (0.4, REDUCED, None),
    (0.6, REDUCED, 1),
    (0.8, REDUCED, None),
    (0.25, REDUCED, None),
    (0.5, REDUCED, 1),
    (0.5, [(0, 0.5), (0.5, 0.5), (0.5, 1)], 2),
]


@pytest.mark.parametrize(("seed", "unit", "where"), PLACES)
def test_a_place_is_where_growthbook_has_it(seed: str, unit: str, where: float) -> None:
    assert place(seed, unit) == where


@pytest.mark.parametrize(("weights", "traffic", "parts"), PARTS)
def test_parts_are_those_of_growthbook(
    weights: list[float], traffic: float, parts: list[Range]
) -> None:
    for found, wanted in zip(ranges(weights, traffic), parts, strict=True):
        assert found == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(("where", "parts", "index"), CHOICES)
def test_a_place_chooses_the_part_growthbook_chooses(
    where: float, parts: list[Range], index: int | None
) -> None:
    assert chosen(where, parts) == index


def test_more_traffic_moves_nobody_who_had_an_arm() -> None:
    units = [str(unit) for unit in range(2000)]
    few, more = (ranges([0.2, 0.3, 0.5], traffic) for traffic in (0.3, 0.7))
    before = {unit: chosen(place("tone", unit), few) for unit in units}
    after = {unit: chosen(place("tone", unit), more) for unit in units}
    assert all(after[unit] == arm for unit, arm in before.items() if arm is not None)
    assert sum(arm is not None for arm in after.values()) > 1.8 * sum(
        arm is not None for arm in before.values()
    )
