"""Tune, on logs of simulated units whose metric has a known best preference."""

import json
import random
import sqlite3
import sys
from collections.abc import Iterator, Mapping
from itertools import count
from math import dist
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from dynmerge.errors import ExperimentError, UnknownExperiment
from dynmerge.preference import Preference
from dynmerge_server.experiments.course import first
from dynmerge_server.experiments.declaration import Arm, Experiment, Metric, parse_all
from dynmerge_server.experiments.reading import open_readonly
from dynmerge_server.experiments.rows import add_revisions, store
from dynmerge_server.experiments.schema import connect, create, transaction
from dynmerge_server.experiments.tune import LEAST_WEIGHT, propose
from tests.server.experiments.logged import exposure, outcome

pytest.importorskip("botorch", reason="needs dynmerge[experiments]")

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SKILLS = ("code", "law", "math")
OPTIMUM = (0.5, 0.3, 0.2)
CORNERS = {"a": "code=1", "b": "law=1", "c": "math=1", "d": "code=1, law=1, math=1"}
SCORE = Metric("score")


class Simulated:
    """A log whose units like a preference the less, the farther it is from OPTIMUM."""

    def __init__(self, path: Path, seed: int = 0, better: str = "higher", sd: float = 0.3) -> None:
        create(path)
        self._rng = random.Random(seed)
        self._sign = 1 if better == "higher" else -1
        self.sd = sd
        self._units = count()
        self._writing = connect(path)
        self.reading = open_readonly(path)

    def close(self) -> None:
        self.reading.close()
        self._writing.close()

    def declare(self, experiment: Experiment) -> None:
        add_revisions(self._writing, [first(experiment, 1.0, "file")])

    def serve(self, experiment: str, arm: str, text: str, units: int, **other: Any) -> None:
        weights = Preference.parse(text, allow_negative=True).vector(SKILLS)
        mean = 0.5 - dist(weights, OPTIMUM) ** 2
        with transaction(self._writing):
            for unit in (f"u{next(self._units)}" for _ in range(units)):
                given = {"preference": text, "experiment": experiment, "arm": arm, "time": 2.0}
                store(self._writing, exposure(unit, unit, **given | other))
                value = self._sign * self._rng.gauss(mean, self.sd)
                store(self._writing, outcome(unit, name="score", value=value))

    def run(self, name: str, arms: Mapping[str, str], units: int, **other: Any) -> None:
        """An experiment, declared and over."""
        better = "higher" if self._sign == 1 else "lower"
        given = {"primary": Metric("score", better=better), **other}
        made = {arm: Arm(text) for arm, text in arms.items()}
        self.declare(Experiment(name, made, **given))
        for arm, text in arms.items():
            self.serve(name, arm, str(Preference.parse(text)), units)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Simulated]:
    made = Simulated(tmp_path / "log.db")
    yield made
    made.close()


def away(preference: Preference) -> float:
    return dist(preference.vector(SKILLS), OPTIMUM)


def tuned(path: Path, seed: int, rounds: int, units: int) -> float:
    """How far from the optimum the best is after rounds of three proposals and the best so far."""
    log = Simulated(path, seed)
    log.run("tone", CORNERS, units)
    ran = ["tone"]
    for _ in range(rounds):
        found = propose(log.reading, ran[-1], experiments=ran, seed=seed)
        (declared,) = parse_all(tomllib.loads(found.toml())["experiments"]).values()
        arms = {arm: str(given.preference) for arm, given in declared.arms.items()}
        log.run(declared.name, arms, units)
        ran.append(declared.name)
    best = propose(log.reading, ran[-1], experiments=ran, seed=seed).best
    log.close()
    return away(best.preference)


def drawn_at_random(path: Path, seed: int, arms: int, units: int) -> float:
    """The same, with random preferences instead, of which the same estimates say the best."""
    log = Simulated(path, seed)
    rng = random.Random(seed)
    random_arms = {
        f"r{number}": str(Preference.of({skill: rng.expovariate(1) for skill in SKILLS}))
        for number in range(arms)
    }
    log.run("tone", CORNERS | random_arms, units)
    best = propose(log.reading, "tone", seed=seed).best
    log.close()
    return away(best.preference)


def test_two_rounds_of_proposals_come_near_the_best_mix_and_nearer_than_chance(
    tmp_path: Path,
) -> None:
    """12 arms of 150 units whose deviation is a third of what the metric can range over."""
    rounds, units, seeds = 2, 150, range(4)
    ours = [tuned(tmp_path / f"ours{seed}", seed, rounds, units) for seed in seeds]
    chance = [drawn_at_random(tmp_path / f"r{seed}", seed, 4 * rounds, units) for seed in seeds]
    assert max(ours) < 0.15
    assert fmean(ours) < 0.09
    assert fmean(ours) < 0.6 * fmean(chance)


def test_proposals_are_the_same_for_one_seed_and_touch_nobodys_random_numbers(
    log: Simulated,
) -> None:
    log.run("tone", CORNERS, 50)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    one = propose(log.reading, "tone", seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert propose(log.reading, "tone", seed=3) == one
    assert propose(log.reading, "tone", seed=4).proposals != one.proposals
    assert torch.get_num_threads() == threads


def test_proposals_are_different_mixes_of_the_skills_on_the_grid(log: Simulated) -> None:
    log.run("tone", CORNERS, 50)
    found = propose(log.reading, "tone", count=5)
    preferences = [each.preference for each in found.proposals]
    assert len({found.best.preference, *preferences}) == 6
    for each in preferences:
        assert not each.is_raw
        assert set(each.skills) <= set(SKILLS)
        assert min(each.weights.values()) >= LEAST_WEIGHT - 0.001
        assert Preference.parse(str(each)) == each


def test_a_metric_that_is_better_low_is_made_low(tmp_path: Path) -> None:
    log = Simulated(tmp_path / "log.db", better="lower", sd=0.05)
    log.run("tone", CORNERS, 50)
    found = propose(log.reading, "tone")
    assert str(found.best.preference) == str(Preference.parse(CORNERS["d"]))
    assert min(each.estimate.low for each in found.proposals) < found.best.estimate.mean
    assert "chosen for being small" in found.note
    log.close()


def test_estimates_are_shrunk_towards_each_other_and_hold_the_truth(log: Simulated) -> None:
    log.run("tone", CORNERS, 400)
    found = propose(log.reading, "tone")
    for tried in found.tried:
        truth = 0.5 - away(tried.preference) ** 2
        assert tried.estimate.low - 0.02 < truth < tried.estimate.high + 0.02
        assert tried.units == 400
    far = max(found.proposals, key=lambda each: each.estimate.high - each.estimate.low)
    assert 0 <= far.exploit <= 1
    assert far.why == f"exploit {far.exploit:.0%}, explore {1 - far.exploit:.0%}"


def test_everything_that_is_shown_says_that_it_is_no_test(log: Simulated) -> None:
    log.run("tone", CORNERS, 50)
    found = propose(log.reading, "tone")
    note = (
        "optimisation, not a test: the estimates below are shrunk and chosen for being large; "
        "declare an experiment to compare them"
    )
    assert found.note == note
    assert str(found).splitlines()[0] == note
    assert found.toml().splitlines()[0] == f"# {note}"
    table = json.loads(json.dumps(found.table()))
    assert (table["object"], table["note"]) == ("optimisation", note)
    for proposal in table["proposals"]:
        assert set(proposal) == {
            *("preference", "mean", "interval", "level", "exploit", "explore"),
        }


def test_the_next_experiment_compares_the_proposals_with_the_best_so_far(log: Simulated) -> None:
    log.run(
        "tone-2",
        CORNERS,
        50,
        unit="session",
        traffic=0.5,
        metrics=(Metric(measure="latency", better="lower"),),
    )
    log.run("tone-3", CORNERS, 2)
    found = propose(log.reading, "tone-2")
    (made,) = parse_all(tomllib.loads(found.toml())["experiments"]).values()
    assert made == found.experiment()
    assert (made.name, made.state, made.control) == ("tone-4", "draft", "best")
    assert made.arms["best"].preference == str(found.best.preference)
    assert list(made.arms) == ["best", "p1", "p2", "p3"]
    assert (made.unit, made.traffic, made.primary) == ("session", 0.5, SCORE)
    assert [metric.name for metric in made.metrics] == ["latency"]
    assert len(set(made.weights.values())) == 1


def test_the_log_is_not_written_to(tmp_path: Path) -> None:
    log = Simulated(tmp_path / "log.db")
    log.run("tone", CORNERS, 20)
    before = "\n".join(log.reading.iterdump())
    propose(log.reading, "tone")
    assert "\n".join(log.reading.iterdump()) == before
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        log.reading.execute("DELETE FROM outcomes")
    log.close()


def test_an_arm_is_the_preference_that_was_applied_whatever_was_declared(log: Simulated) -> None:
    arms = {"plain": Arm(), "warm": Arm(preset="warm"), "mixed": Arm("code=0.5, law=0.5")}
    log.declare(Experiment("tone", arms, primary=SCORE))
    for arm, text in {"plain": "base=1", "warm": "law=1", "mixed": "code=0.5, law=0.5"}.items():
        log.serve("tone", arm, text, 20)
    found = propose(log.reading, "tone")
    assert found.skills == ("base", "code", "law")
    assert {str(each.preference): each.arms for each in found.tried}["law=1"] == ("tone/warm",)


def test_an_arm_served_with_two_preferences_is_left_out_and_named(log: Simulated) -> None:
    log.run("tone", CORNERS, 20)
    log.serve("tone", "a", "code=0.9, law=0.1", 20)
    found = propose(log.reading, "tone", skills=("code", "law", "math"))
    assert [each.arms for each in found.tried] == [("tone/b",), ("tone/c",), ("tone/d",)]
    assert found.left_out == (
        "tone/a was served with different preferences: code=0.9, law=0.1; code=1",
    )
    assert f"left out: {found.left_out[0]}" in str(found)


def test_skills_that_no_arm_had_may_be_mixed_in(log: Simulated) -> None:
    log.run("tone", CORNERS, 20)
    found = propose(log.reading, "tone", skills=["math", "law", "code", "base"])
    assert found.skills == ("base", "code", "law", "math")


def test_a_method_goes_into_the_next_experiment_where_arms_declare_one(log: Simulated) -> None:
    arms = {arm: Arm(text, method="ties") for arm, text in CORNERS.items()}
    log.declare(Experiment("tone", arms, primary=SCORE))
    for arm, text in CORNERS.items():
        log.serve("tone", arm, str(Preference.parse(text)), 10, method="ties")
    found = propose(log.reading, "tone")
    assert {arm.method for arm in found.experiment().arms.values()} == {"ties"}


def refused(log: Simulated, *, match: str, **asked: Any) -> None:
    with pytest.raises(ExperimentError, match=match):
        propose(log.reading, "tone", **asked)


def test_what_there_is_nothing_to_go_by_is_named(log: Simulated) -> None:
    refused(log, match=r"no experiment named 'tone' \(known: none\)")
    log.run("tone", CORNERS, 1)
    refused(log, match="0 different preferences have score of 2 units or more.* needs 3")
    refused(log, match=r"tone/a has score of 1 units")
    refused(log, match="count is 0", count=0)
    refused(log, match="no experiment named 'length'", experiments=["length"])
    with pytest.raises(UnknownExperiment):
        propose(log.reading, "nothing")


def test_as_many_preferences_as_skills_are_needed(log: Simulated) -> None:
    log.run("tone", {arm: CORNERS[arm] for arm in "abc"}, 5)
    assert len(propose(log.reading, "tone").tried) == 3
    refused(
        log,
        match="3 different preferences .* tuning 4 skills needs 4",
        skills=[*SKILLS, "base"],
    )
    refused(log, match="arm tone/c has the skill math, which is not in", skills=["code", "law"])


def test_an_experiment_without_a_primary_metric_is_refused(log: Simulated) -> None:
    log.run("tone", CORNERS, 5, primary=None)
    refused(log, match="experiment tone has no primary metric")


def test_a_family_shares_one_primary_metric(log: Simulated) -> None:
    log.run("tone", CORNERS, 5)
    log.run("length", CORNERS, 5, primary=Metric(measure="tokens", better="lower"))
    refused(
        log,
        match=r"tone and length have different .*, score \(higher .* tokens \(lower",
        experiments=["length"],
    )


def test_raw_preferences_are_refused_by_name(log: Simulated) -> None:
    log.run("tone", CORNERS, 5)
    log.declare(Experiment("raw", {"x": Arm("code=1"), "y": Arm()}, primary=SCORE))
    log.serve("raw", "y", "code=0.7, law=0.7;raw", 5)
    refused(
        log, match="arm raw/y has the raw preference code=0.7, law=0.7;raw", experiments=["raw"]
    )


def test_arms_of_different_methods_are_no_points_of_one_surface(log: Simulated) -> None:
    log.run("tone", CORNERS, 5)
    log.serve("tone", "d", "math=1", 5, method="ties")
    refused(log, match=r"different methods: linear \(tone/a\), ties \(tone/d\)")


def test_arms_that_lost_units_are_not_ranked(log: Simulated) -> None:
    """As its report shows no difference then, and names no best."""
    log.run("tone", CORNERS, 100)
    log.serve("tone", "a", str(Preference.parse(CORNERS["a"])), 100)
    refused(log, match="experiment tone has a sample ratio mismatch.*a 200 of 125.0.*be ranked")


def test_a_metric_that_is_always_the_same_teaches_nothing(log: Simulated) -> None:
    log.run("tone", CORNERS, 5, primary=Metric("score", over=1e9))
    refused(log, match=r"score over 1e\+09 is 0 for every unit of every arm")


def test_units_that_happen_to_agree_do_not_make_an_arm_certain(log: Simulated) -> None:
    arms = CORNERS | {"same": "code=0.5, law=0.5"}
    log.declare(Experiment("tone", {arm: Arm() for arm in arms}, primary=SCORE))
    for arm, text in arms.items():
        log.sd = 0.0 if arm == "same" else 0.3
        log.serve("tone", arm, str(Preference.parse(text)), 30)
    tried = propose(log.reading, "tone").tried[-1]
    assert tried.arms == ("tone/same",)
    assert tried.estimate.high - tried.estimate.low > 0.03
