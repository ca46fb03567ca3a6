"""Assignment, held to GrowthBook's own Python SDK, and to what randomisation promises."""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
from scipy.stats import chi2_contingency

from dynmerge_server.experiments.assignment import arm_of
from dynmerge_server.experiments.declaration import Arm, Experiment, Holdout, Namespace

UNITS = 100_000
LETTERS = "abcdefghij0123456789-_.:@ é漢🙂"


def experiment(name: str, arms: int = 2, **more: object) -> Experiment:
    return Experiment(name, {f"arm{index}": Arm() for index in range(arms)}, **more)  # type: ignore[arg-type]


def drawn(rng: random.Random, number: int) -> Experiment:
    """Any experiment: arms, weights with zeros among them, traffic, namespace, holdout, seed."""
    arms = rng.randint(2, 6)
    weights = [rng.choice([0.0, 1.0, rng.random()]) for _ in range(arms)]
    start, end = sorted(rng.sample(range(101), 2))
    made = experiment(
        f"e{number}",
        arms,
        weights={f"arm{index}": weight for index, weight in enumerate(weights)}
        if any(weights)
        else {},
        traffic=rng.choice([0.0, 0.1, rng.random(), 1.0, 1.0]),
        seed=rng.choice([None, "other", "séance"]),
    )
    if rng.random() < 0.5:
        made = replace(made, namespace=Namespace("chat", start / 100, end / 100))
    if rng.random() < 0.5:
        made = replace(made, holdout=Holdout("2026", round(rng.uniform(0.05, 0.5), 3)))
    return made


def units(rng: random.Random, count: int) -> Iterator[str]:
    for _ in range(count):
        yield "".join(rng.choices(LETTERS, k=rng.randint(1, 24)))


def test_every_unit_has_the_arm_that_growthbook_gives_it() -> None:
    """100,000 random units over 50 random experiments, in later phases too."""
    growthbook = pytest.importorskip("growthbook", reason="the oracle, GrowthBook's SDK, is absent")
    rng = random.Random(20)
    kinds: Counter[str] = Counter()
    for number in range(50):
        ours, phase = drawn(rng, number), rng.choice([0, 0, 1, 12])
        theirs = as_growthbook_has_it(growthbook, ours, phase)
        oracle = growthbook.GrowthBook()
        for unit in units(rng, UNITS // 50):
            oracle.set_attributes({"id": unit})
            result = oracle.run(theirs)
            found = arm_of(ours, unit, phase)
            kinds[found.kind] += 1
            assert found.arm == (result.value if result.inExperiment else None)
    assert min(kinds[kind] for kind in ("assigned", "holdout", "outside")) > UNITS / 20


def as_growthbook_has_it(growthbook: object, ours: Experiment, phase: int) -> object:
    filters = []
    if ours.namespace is not None:
        part = (ours.namespace.start, ours.namespace.end)
        seed = f"namespace:{ours.namespace.name}"
        filters.append({"seed": seed, "ranges": [part], "hashVersion": 2, "attribute": "id"})
    if ours.holdout is not None:
        seed, part = f"holdout:{ours.holdout.name}", (ours.holdout.share, 1.0)
        filters.append({"seed": seed, "ranges": [part], "hashVersion": 2, "attribute": "id"})
    own = ours.seed or ours.name
    return growthbook.Experiment(  # type: ignore[attr-defined]
        key=ours.name,
        variations=list(ours.arms),
        weights=list(ours.weights.values()),
        coverage=ours.traffic,
        seed=f"{own}:{phase}" if phase else own,
        hashVersion=2,
        filters=filters,
    )


def test_two_experiments_place_the_same_units_independently() -> None:
    """The control: with one seed they do not, and the test sees it."""
    one, two = experiment("tone", 3), experiment("length", 2)
    assert p_of_independence(one, two) > 0.001
    assert p_of_independence(replace(one, seed="s"), replace(two, seed="s")) < 1e-9


def test_phases_place_the_same_units_independently() -> None:
    assert p_of_independence(experiment("tone"), experiment("tone"), phase=1) > 0.001


def test_the_holdout_and_the_namespace_say_nothing_about_the_arm() -> None:
    """Arms are as large as their weights among those who are in."""
    within = experiment(
        "tone",
        weights={"arm0": 1, "arm1": 3},
        namespace=Namespace("chat", 0.2, 0.9),
        holdout=Holdout("2026", 0.1),
    )
    found = Counter(arm_of(within, f"u{unit}") for unit in range(20_000))
    arms = Counter({place.arm: count for place, count in found.items() if place.arm})
    assert sum(arms.values()) == pytest.approx(20_000 * 0.7 * 0.9, rel=0.03)
    assert arms["arm1"] / sum(arms.values()) == pytest.approx(0.75, abs=0.015)


def test_disjoint_parts_of_a_namespace_never_share_a_unit() -> None:
    one = experiment("tone", namespace=Namespace("chat", 0.0, 0.35))
    two = experiment("length", namespace=Namespace("chat", 0.35, 1.0))
    for unit in range(20_000):
        placed = [arm_of(each, f"u{unit}").kind for each in (one, two)]
        assert sorted(placed) == ["assigned", "outside"]


def test_a_holdout_keeps_the_same_units_out_of_all_its_experiments() -> None:
    each = [experiment(name, holdout=Holdout("2026", 0.2)) for name in ("tone", "length")]
    held = [
        {unit for unit in range(5000) if arm_of(one, f"u{unit}").kind == "holdout"} for one in each
    ]
    assert held[0] == held[1]
    assert len(held[0]) == pytest.approx(1000, rel=0.1)


def test_given_traffic_counts_instead_of_the_declared() -> None:
    declared = experiment("tone", traffic=0.1)
    assert arm_of(declared, "u1", traffic=1.0).kind == "assigned"
    assert arm_of(declared, "u1", traffic=0.0).kind == "outside"


def p_of_independence(one: Experiment, two: Experiment, phase: int = 0) -> float:
    """By chi-square, over 20,000 units that are in both."""
    both = Counter(
        (arm_of(one, f"u{unit}").arm, arm_of(two, f"u{unit}", phase).arm) for unit in range(20_000)
    )
    table = [[both[first, second] for second in two.arms] for first in one.arms]
    return float(chi2_contingency(table).pvalue)
