"""Guardrails: broken where an arm is surely worse than it may be, and not by noise."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynmerge.errors import UnknownExperiment
from dynmerge_server.experiments.declaration import Guardrail, Metric
from dynmerge_server.experiments.records import Exposure, Finish
from dynmerge_server.experiments.report.guardrails import broken, check
from dynmerge_server.experiments.report.results import Counts
from dynmerge_server.experiments.report.source import Floats
from dynmerge_server.experiments.report.table import Column, Table
from tests.server.experiments.report.log_factory import BEGAN, LogFile

ERROR = Metric(measure="error")  # of which less is better
LIKED = Metric(outcome="liked")


def table(metric: Metric, *arms: Floats) -> Table:
    arm = np.repeat(np.arange(len(arms)), [len(each) for each in arms])
    now = np.concatenate(arms)
    column = Column(metric, now, now * np.nan, ~np.isnan(now))
    names = tuple("ABCDE"[: len(arms)])
    return Table(names, 0, arm, now * 0, (column,), Counts((), (), (), 0, 0, 0, 0))


def rate(ones: int, units: int) -> Floats:
    return np.repeat([1.0, 0.0], [ones, units - ones])


def states(rail: Guardrail, *arms: Floats) -> list[str]:
    return [each.state for each in check(table(rail.metric, *arms), [rail], 0.05)]


@pytest.mark.parametrize(
    ("limit", "arms", "expected"),
    [
        ({"at_most": 0.05}, (rate(10, 500), rate(100, 500)), ["ok", "broken"]),
        ({"at_most": 0.05}, (rate(10, 500), rate(30, 500)), ["ok", "ok"]),  # above, not surely
        ({"at_most": 0.05}, (rate(10, 500), rate(99, 99)), ["ok", "unknown"]),
        ({"at_most": 0.05}, (rate(0, 500), rate(500, 500)), ["ok", "broken"]),
        ({"at_least": 0.5}, (rate(300, 500), rate(100, 500)), ["ok", "broken"]),
        ({"at_least": 0.5}, (rate(249, 500), rate(500, 500)), ["ok", "ok"]),
        ({"worse_by": 0.02}, (rate(10, 500), rate(100, 500)), ["broken"]),
        ({"worse_by": 0.02}, (rate(100, 500), rate(10, 500)), ["ok"]),
        ({"worse_by": 0.02}, (rate(10, 99), rate(100, 500)), ["unknown"]),
    ],
)
def test_an_arm_is_broken_only_surely(
    limit: dict[str, Any], arms: tuple[Floats, ...], expected: list[str]
) -> None:
    assert states(Guardrail(ERROR, **limit), *arms) == expected


def test_worse_is_lower_where_higher_is_better() -> None:
    rail = Guardrail(LIKED, worse_by=0.02)
    assert states(rail, rate(300, 500), rate(100, 500)) == ["broken"]
    assert states(rail, rate(100, 500), rate(300, 500)) == ["ok"]


def test_of_errors_fewer_are_better_unless_it_is_said() -> None:
    """What is worse where nobody says so: more errors, more seconds, fewer votes."""
    rng = np.random.default_rng(0)
    slow, fast = rng.exponential(3, 500), rng.exponential(1, 500)
    for metric in (Metric(measure="error"), Metric(measure="empty")):
        rail = Guardrail(metric, worse_by=0.02)
        assert states(rail, rate(10, 500), rate(100, 500)) == ["broken"]
        assert states(rail, rate(100, 500), rate(10, 500)) == ["ok"]
    for metric in (Metric(measure="ttft"), Metric(measure="latency")):
        rail = Guardrail(metric, worse_by=0.5)
        assert states(rail, fast, slow) == ["broken"]
        assert states(rail, slow, fast) == ["ok"]
    other_way = Guardrail(Metric(measure="error", better="higher"), worse_by=0.02)
    assert states(other_way, rate(100, 500), rate(10, 500)) == ["broken"]


@pytest.mark.parametrize("same", [0.0, 3.0])
def test_numbers_that_are_all_alike_say_nothing_of_how_they_vary(same: float) -> None:
    """But shares do, as a share says how much it varies."""
    numbers = np.full(500, same)
    numbers[:10] = 7.0  # so that they are no shares
    alike = Guardrail(ERROR, at_most=0.01)
    assert states(alike, numbers, numbers) == ["unknown", "unknown"]
    assert states(alike, rate(0, 500), rate(500, 500)) == ["ok", "broken"]
    varied = np.where(np.arange(500) % 2, 0.0, 8.0)
    rail = Guardrail(ERROR, worse_by=0.5)
    assert states(rail, numbers, numbers) == ["unknown"]
    assert states(rail, np.zeros(500), varied) == ["broken"]  # the arm says how much units vary


def test_of_numbers_that_are_all_0_no_top_is_known() -> None:
    nothing = np.zeros(2000)
    assert states(Guardrail(LIKED, at_least=0.5), nothing, nothing) == ["unknown"] * 2
    for metric in (Metric(outcome="liked", per_unit="any"), Metric(outcome="liked", over=2.0)):
        assert states(Guardrail(metric, at_least=0.5), nothing, nothing) == ["broken"] * 2
    assert states(Guardrail(LIKED, at_most=0.5), nothing, nothing + 1) == ["ok", "broken"]


def test_parts_of_units_are_shares_too() -> None:
    """Of a unit with two requests one may have failed."""
    numbers = np.repeat([1.0, 0.5, 0.0], [60, 80, 360])
    rail = Guardrail(ERROR, at_most=0.05)
    (parts,) = {each.bound for each in check(table(ERROR, numbers, numbers), [rail], 0.05)}
    (whole,) = {each.bound for each in check(table(ERROR, *[rate(100, 500)] * 2), [rail], 0.05)}
    assert parts == pytest.approx(whole)


def test_numbers_too_large_to_be_added_say_nothing() -> None:
    assert states(Guardrail(LIKED, at_most=1.0), np.full(200, 1e308), rate(1, 200)) == [
        "unknown",
        "ok",
    ]


def test_the_bound_that_decided_is_told() -> None:
    rail = Guardrail(ERROR, at_most=0.05)
    _, found = check(table(ERROR, rate(10, 500), rate(100, 500)), [rail], 0.05)
    assert found.bound is not None
    assert 0.05 < found.bound < 0.2
    assert found.text == (
        f"error in B, at most 0.05: broken; it is 0.2 in 500 units, surely above {found.bound:.4g}"
    )


def test_all_bounds_of_an_experiment_share_alpha() -> None:
    one, two = Guardrail(ERROR, at_most=0.05), Guardrail(ERROR, worse_by=0.5)
    arms = table(ERROR, rate(10, 500), rate(100, 500))
    alone = check(arms, [one], 0.05)[1].bound
    together = check(arms, [one, two], 0.05)[1].bound
    assert alone is not None
    assert together is not None
    assert together < alone


def test_an_experiment_of_the_same_arms_is_stopped_in_5_percent_at_most() -> None:
    """Whole tables, looked at 5 times, against a limit of no difference at all."""
    rng, rails = np.random.default_rng(0), [Guardrail(ERROR, worse_by=0.0)]
    stopped = 0
    for _ in range(30):
        one, other, third = (rng.binomial(1, 0.03, 3000).astype(float) for _ in range(3))
        stopped += any(
            each.state == "broken"
            for n in range(600, 3001, 600)
            for each in check(table(ERROR, one[:n], other[:n], third[:n]), rails, 0.05)
        )
    print(f"stopped without a reason: {stopped / 30:.3f}")
    assert stopped / 30 <= 0.05


def test_a_server_hears_of_broken_guardrails_that_stop(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "log.db")
    error = {"measure": "error"}
    log.declare(
        "tone",
        {
            "arms": {"A": {}, "B": {"preset": "law"}},
            "guardrails": [
                {"metric": error, "at_most": 0.1},
                {"metric": error, "worse_by": 0.1, "action": "show"},
            ],
        },
    )
    log.declare("calm", {"arms": {"A": {}, "B": {"preset": "law"}}})
    connection = log.open()
    assert broken(connection, "tone") == []
    exposures, finishes = [], []
    for index in range(800):
        arm, name = "AB"[index % 2], f"x{index}"
        exposures.append(
            Exposure(name, name, BEGAN + index, name, "assigned", "sql", "linear", "m", "tone", arm)
        )
        finishes.append(Finish(name, 500 if arm == "B" and index % 3 else 200))
    log.add(exposures, finishes)
    (reason,) = broken(connection, "tone")
    assert reason.startswith("error in B, at most 0.1: broken")
    assert broken(connection, "calm") == []
    with pytest.raises(UnknownExperiment, match="known: tone, calm"):
        broken(connection, "tune")
    connection.close()
