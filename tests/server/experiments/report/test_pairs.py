"""Strengths from votes: found where they are, and not made up where votes do not say them."""

from math import log

import numpy as np
import pytest
from scipy.special import expit

from dynmerge_server.experiments.report import words
from dynmerge_server.experiments.report.pairs import APART, NEVER, ONE_SIDED, TIED, Vote, pairs
from dynmerge_server.experiments.report.results import Pairs

ARMS = ("A", "B", "C")


def votes(
    rng: np.random.Generator, count: int, strength: dict[str, float], first: float = 0.0
) -> list[Vote]:
    """Each of a unit of its own; one in ten a tie."""
    made: list[Vote] = []
    for index in range(count):
        one, other = (str(arm) for arm in rng.permutation(list(strength))[:2])
        wins = rng.random() < expit(strength[one] - strength[other] + first)
        made.append((one, other, "first" if wins else "second", f"u{index}"))
    return made


def found(given: list[Vote], arms: tuple[str, ...] = ARMS) -> Pairs:
    made = pairs(given, arms, arms[0], 0.05)
    assert made is not None
    return made


def test_strengths_and_the_bias_to_the_first_shown_are_found() -> None:
    strength = {"A": 0.0, "B": 0.8, "C": -0.5}
    made = found(votes(np.random.default_rng(0), 4000, strength, first=0.4))
    for each in made.arms[1:]:
        assert each.interval is not None
        assert each.interval.low is not None
        assert each.interval.high is not None
        assert each.interval.low < strength[each.arm] < each.interval.high
        assert each.strength == pytest.approx(strength[each.arm], abs=0.2)
        assert each.against_control == pytest.approx(expit(strength[each.arm]), abs=0.05)
    assert made.first_shown == pytest.approx(expit(0.4), abs=0.03)
    assert made.clustered
    assert made.trouble is None


def test_two_arms_without_bias_have_the_log_odds_of_their_wins() -> None:
    given: list[Vote] = [("A", "B", "first", "u")] * 3 + [("B", "A", "second", "u")] * 3
    given += [("A", "B", "second", "u")] * 7 + [("B", "A", "first", "u")] * 7
    made = found(given, ("A", "B"))
    assert made.arms[1].strength == pytest.approx(log(7 / 3))
    assert (made.arms[0].wins, made.arms[1].wins) == (6, 14)
    assert made.first_shown == pytest.approx(0.5)
    assert not made.clustered


def test_a_tie_is_half_a_win_for_each() -> None:
    given: list[Vote] = [("A", "B", "tie", "u"), ("B", "A", "tie", "u")] * 10
    given += [("A", "B", "second", "u"), ("B", "A", "first", "u")] * 5
    given += [("A", "B", "first", "u"), ("B", "A", "second", "u")] * 2
    made = found(given, ("A", "B"))
    assert made.arms[1].wins == 20 / 2 + 10
    assert made.arms[1].strength == pytest.approx(log(20 / 14))
    assert made.ties == 20


def test_votes_of_one_unit_do_not_count_as_many() -> None:
    rng = np.random.default_rng(1)
    alone = votes(rng, 400, {"A": 0.0, "B": 0.5})
    # The same units voting ten times each, always alike.
    many = [vote for vote in alone[:40] for _ in range(10)]
    one, ten = found(alone, ("A", "B")).arms[1], found(many, ("A", "B")).arms[1]
    assert one.interval is not None
    assert ten.interval is not None
    assert one.interval.high is not None
    assert one.interval.low is not None
    assert ten.interval.high is not None
    assert ten.interval.low is not None
    wider = (ten.interval.high - ten.interval.low) / (one.interval.high - one.interval.low)
    assert wider == pytest.approx(np.sqrt(10), rel=0.3)


def test_votes_that_name_no_unit_are_counted_and_not_called_independent() -> None:
    """They may be 40 votes of one person."""
    rng = np.random.default_rng(4)
    named = votes(rng, 100, {"A": 0.0, "B": 0.5})
    nameless: list[Vote] = [(*vote[:3], "") for vote in votes(rng, 40, {"A": 0.0, "B": 0.5})]
    some, none = found(named + nameless, ("A", "B")), found(nameless, ("A", "B"))
    assert (some.votes, some.units, some.without_unit) == (140, 100, 40)
    assert (none.votes, none.units, none.without_unit) == (40, 0, 40)
    assert found(named, ("A", "B")).clustered
    assert not some.clustered
    assert not none.clustered
    for each in (some, none):
        assert "40 named no unit" in words.voters(each)
        assert "being one person's" in words.of_pairs(each)[1]
    assert "named no unit" not in words.voters(found(named, ("A", "B")))


def test_intervals_hold_as_often_as_they_say() -> None:
    rng = np.random.default_rng(2)
    missed = 0
    for _ in range(200):
        each = found(votes(rng, 200, {"A": 0.0, "B": 0.3}, first=0.2), ("A", "B")).arms[1].interval
        assert each is not None
        assert each.low is not None
        assert each.high is not None
        missed += not each.low < 0.3 < each.high
    print(f"missed {missed / 200:.3f}")
    assert missed / 200 < 0.1


@pytest.mark.parametrize(
    ("given", "trouble"),
    [
        ([("A", "B", "first", "u"), ("B", "A", "second", "u")] * 9, ONE_SIDED),
        # B always beats C, whatever else is known.
        (
            [("A", "B", "first", "u"), ("A", "B", "second", "u"), ("B", "A", "first", "u")] * 3
            + [("B", "C", "first", "u"), ("C", "B", "second", "u")],
            ONE_SIDED,
        ),
        # The first always wins.
        ([("A", "B", "first", "u"), ("B", "A", "first", "u")] * 9, ONE_SIDED),
        ([("A", "B", "first", "u"), ("A", "B", "second", "u")], APART),
        ([("B", "C", "first", "u"), ("C", "B", "first", "u")], NEVER),
        ([("A", "B", "tie", "u"), ("B", "A", "tie", "u")], TIED),
    ],
)
def test_where_votes_do_not_say_strengths_the_reason_is_said(
    given: list[Vote], trouble: str
) -> None:
    made = found(given)
    assert made.trouble == trouble
    assert all(each.strength is None for each in made.arms)
    assert made.first_shown is None
    assert sum(each.wins for each in made.arms) == made.votes


def test_an_arm_that_was_never_shown_has_no_strength() -> None:
    made = found(votes(np.random.default_rng(3), 200, {"A": 0.0, "B": 0.3}))
    assert made.arms[2].strength is None
    assert made.arms[1].strength is not None


def test_without_votes_there_is_nothing() -> None:
    assert pairs([], ARMS, "A", 0.05) is None
    assert pairs([("X", "A", "first", "u")], ARMS, "A", 0.05) is None
