"""Who gets which arm: by the hash, kept where it was had, in one experiment at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dynmerge.errors import ExperimentError, UnknownExperiment
from dynmerge_server.experiments.assignment import arm_of
from dynmerge_server.experiments.course import Course
from dynmerge_server.experiments.declaration import Experiment, parse_all
from dynmerge_server.experiments.live import Experiments, Placed, Units
from dynmerge_server.experiments.log import Log, LogConfig
from dynmerge_server.experiments.records import Exposure, Revision

ARMS: dict[str, Any] = {"A": {"preference": "ada=1"}, "B": {"preference": "bob=1"}}
BANK = "bank"


class Clock:
    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.sqlite"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def live(path: Path, clock: Clock) -> Iterator[Experiments]:
    log = Log(LogConfig(path, flush_seconds=0.01))
    yield Experiments(log, clock=clock)
    log.close()


def exposed(live: Experiments, placed: Placed | None) -> Placed:
    """The same, logged as a request would be."""
    assert placed is not None
    live.log.expose(
        Exposure(
            id=f"{placed.experiment}-{placed.unit}-{live._clock()}",
            request_id="r",
            time=live._clock(),
            unit=placed.unit,
            kind=placed.kind,
            preference="ada=1",
            method="linear",
            merge_id="m",
            experiment=placed.experiment,
            arm=placed.arm,
            phase=placed.phase,
        )
    )
    return placed


async def arms(live: Experiments, count: int = 200) -> dict[str, tuple[str | None, str | None]]:
    """Experiment and arm of each of some units, which are logged."""
    found = {}
    for number in range(count):
        placed = exposed(live, await live.place(Units(header=f"u{number}"), BANK))
        found[f"u{number}"] = (placed.experiment, placed.arm)
    return found


async def test_the_hash_decides_where_nothing_was_before(live: Experiments) -> None:
    course = live.declare("tone", {"arms": ARMS, "traffic": 0.5})
    for unit, (_, arm) in (await arms(live)).items():
        assert arm == arm_of(course.experiment, unit).arm


async def test_more_traffic_moves_nobody(live: Experiments) -> None:
    live.declare("tone", {"arms": ARMS, "traffic": 0.3})
    before = await arms(live)
    live.change("tone", {"traffic": 0.8})
    after = await arms(live)
    kept = {unit: place for unit, place in before.items() if place[1]}
    assert kept == {unit: after[unit] for unit in kept}
    assert sum(arm is not None for _, arm in after.values()) > 1.5 * len(kept)


async def test_other_weights_leave_everybody_who_was_there_where_they_were(
    live: Experiments,
) -> None:
    live.declare("tone", {"arms": ARMS})
    before = await arms(live, 100)
    live.change("tone", {"weights": {"A": 1, "B": 9}})
    after = await arms(live, 400)
    assert all(after[unit] == place for unit, place in before.items())
    fresh = [arm for unit, (_, arm) in after.items() if unit not in before]
    assert 0.8 < fresh.count("B") / len(fresh) < 0.98


async def test_who_was_there_is_kept_by_another_process_too(
    live: Experiments, path: Path, clock: Clock
) -> None:
    live.declare("tone", {"arms": ARMS})
    before = await arms(live, 50)
    live.change("tone", {"weights": {"A": 1, "B": 9}})
    live.log.close()
    log = Log(LogConfig(path))
    again = Experiments(log, clock=clock)
    after = await arms(again, 50)
    log.close()
    assert after == before


async def test_a_unit_is_in_one_experiment_the_one_it_was_in_first(live: Experiments) -> None:
    live.declare("one", {"arms": ARMS, "traffic": 0.2})
    live.declare("two", {"arms": ARMS})
    before = await arms(live)
    assert {name for name, _ in before.values()} == {"one", "two"}
    live.change("one", {"traffic": 1.0})  # would take them all
    after = await arms(live)
    assert after == before
    fresh = await live.place(Units(header="somebody-new"), BANK)
    assert fresh is not None
    assert fresh.experiment == "one"


async def test_parts_of_a_namespace_share_nobody(live: Experiments) -> None:
    live.declare("one", {"arms": ARMS, "namespace": {"name": "chat", "end": 0.4}})
    live.declare("two", {"arms": ARMS, "namespace": {"name": "chat", "start": 0.4}})
    with pytest.raises(ExperimentError, match="two and three overlap in the namespace chat"):
        live.declare("three", {"arms": ARMS, "namespace": {"name": "chat", "start": 0.9}})
    alone = {}
    for only in ("one", "two"):
        placed = [await live.place(Units(header=f"u{n}"), BANK, only) for n in range(300)]
        alone[only] = {n for n, each in enumerate(placed) if each and each.arm}
    assert not alone["one"] & alone["two"]
    assert len(alone["one"] | alone["two"]) == 300
    live.turn("two", "stopped")
    live.declare("three", {"arms": ARMS, "namespace": {"name": "chat", "start": 0.9}})


async def test_a_holdout_gets_no_arm_and_is_known_as_one(live: Experiments) -> None:
    live.declare("tone", {"arms": ARMS, "holdout": {"name": "h", "share": 0.3}})
    placed = [await live.place(Units(header=f"u{n}"), BANK) for n in range(300)]
    kinds = [each.kind for each in placed if each]
    assert 0.2 < kinds.count("holdout") / 300 < 0.4
    assert kinds.count("assigned") == 300 - kinds.count("holdout")


async def test_who_names_no_unit_is_in_nothing(live: Experiments) -> None:
    live.declare("tone", {"arms": ARMS, "unit": "user"})
    assert await live.place(Units(), BANK) is None
    placed = await live.place(Units(header="u1"), BANK)
    assert placed is not None
    assert (placed.kind, placed.experiment) == ("outside", None)
    by_user = await live.place(Units(header="u1", user="u2"), BANK)
    assert by_user is not None
    assert by_user.unit == live.log.hashed("u2")


async def test_paused_and_broken_experiments_give_no_arms(live: Experiments) -> None:
    live.declare("tone", {"arms": ARMS})
    live.turn("tone", "paused")
    assert {arm for _, arm in (await arms(live, 20)).values()} == {None}
    live.turn("tone", "running")
    live.fail("tone", BANK, "no skill named 'ada'")
    assert {arm for _, arm in (await arms(live, 20)).values()} == {None}
    other = await live.place(Units(header="u1"), "another bank")
    assert other is not None
    assert other.arm


async def test_the_ramp_and_the_times_are_kept(live: Experiments, clock: Clock) -> None:
    begin = "2027-01-15T08:00:10+00:00"  # ten seconds from now
    assert clock.now == 1_800_000_000.0
    live.declare("tone", {"arms": ARMS, "start": begin, "stop": "2027-01-15T08:00:20+00:00"})
    shares = []
    for _ in range(3):
        shares.append({arm for _, arm in (await arms(live, 20)).values()} != {None})
        clock.now += 10
    assert shares == [False, True, False]


async def test_no_traffic_takes_everybody_out_after_weights_changed_too(live: Experiments) -> None:
    live.declare("tone", {"arms": ARMS})
    before = await arms(live, 50)
    live.change("tone", {"weights": {"A": 1, "B": 9}})
    live.change("tone", {"traffic": 0.2})
    assert await arms(live, 50) == before
    live.change("tone", {"traffic": 0})
    assert {arm for _, arm in (await arms(live, 50)).values()} == {None}


async def test_the_ramp_is_followed(live: Experiments, clock: Clock) -> None:
    at = ["2027-01-15T08:00:10+00:00", "2027-01-15T08:00:20+00:00"]
    ramp = [{"at": when, "traffic": share} for when, share in zip(at, (0.5, 1.0), strict=True)]
    live.declare("tone", {"arms": ARMS, "traffic": 0.0, "ramp": ramp})
    shares = []
    for _ in range(3):
        shares.append(sum(arm is not None for _, arm in (await arms(live, 100)).values()) / 100)
        clock.now += 10
    assert shares[0] == 0
    assert 0.35 < shares[1] < 0.65
    assert shares[2] == 1


@pytest.mark.parametrize("count", range(2, 33))
def test_pause_and_ramp_begin_no_phase(live: Experiments, count: int) -> None:
    live.declare("tone", {"arms": {f"A{n}": {} for n in range(count)}})
    for change in ({"state": "paused"}, {"traffic": 0.3}, {"state": "running"}):
        assert live.change("tone", change).phase == 0
    odd = {f"A{n}": 1 + n * 0.37 for n in range(count)}
    live.declare("odd", {"arms": {name: {} for name in odd}, "weights": odd})
    for change in ({"state": "paused"}, {"traffic": 0.3}, {"state": "running"}):
        assert live.change("odd", change).phase == 0


def test_what_changes_nothing_is_no_revision(live: Experiments) -> None:
    live.declare("tone", {"arms": ARMS})
    live.turn("tone", "running")
    live.change("tone", {"traffic": 1.0})
    assert live.course("tone").last.number == 1


def test_revisions_count_by_number_whatever_the_clock_says(live: Experiments, clock: Clock) -> None:
    live.declare("tone", {"arms": ARMS})
    live.change("tone", {"traffic": 0.5})
    clock.now -= 1000
    live.turn("tone", "stopped", "guardrail")
    live.log.close()
    log = Log(live.log._config)
    again = Experiments(log, clock=clock)
    log.close()
    assert again.course("tone").experiment.state == "stopped"


async def test_a_revision_of_another_version_stops_nobody(live: Experiments, clock: Clock) -> None:
    live.declare("tone", {"arms": ARMS})
    future = '{"arms": {"A": {}, "B": {}}, "novelty": 1}'
    live.log.add(Revision("later", 1, 0, clock.now, "api", future))
    live.refresh()
    assert "no setting named novelty" in live.unreadable["later"]
    placed = await live.place(Units(header="u1"), BANK)
    assert placed is not None
    assert placed.experiment == "tone"


class TeamFlags:
    """A team's own flag system, which knows some units."""

    def __init__(self, known: dict[str, str]) -> None:
        self.known = known

    async def arm(self, experiment: Experiment, unit: str) -> str | None:
        return self.known.get(unit)


async def test_a_teams_flag_chooses_the_arm_or_nobody_does(path: Path) -> None:
    log = Log(LogConfig(path))
    live = Experiments(log, flags=TeamFlags({"u1": "B"}))
    live.declare("tone", {"arms": ARMS, "flag": "tone-flag"})
    known = await live.place(Units(header="u1"), BANK)
    unknown = await live.place(Units(header="u2"), BANK)
    log.close()
    assert known is not None
    assert unknown is not None
    assert (known.kind, known.arm) == ("flagged", "B")
    assert (unknown.kind, unknown.arm) == ("outside", None)


def test_what_one_experiment_cannot_take_leaves_that_one_as_it_was(live: Experiments) -> None:
    live.declare_all(parse_all({"one": {"arms": ARMS}, "two": {"arms": ARMS, "traffic": 0.5}}))
    live.declare("mine", {"arms": ARMS})
    live.declare_all(
        parse_all({"one": {"arms": ARMS}, "two": {"arms": ARMS}, "over": {"arms": ARMS}})
    )
    live.turn("over", "stopped")
    said = {
        "one": {"arms": ARMS, "traffic": 0.1},
        "two": {"arms": ARMS, "seed": "x"},
        "over": {"arms": ARMS, "traffic": 0.1},
        "mine": {"arms": ARMS},
    }
    notes = live.declare_all(parse_all(said))
    assert [note.split(",")[0].split(":")[0] for note in notes] == [
        "experiment two has begun",
        "experiment over is stopped",
        "experiment mine exists",
    ]
    assert live.course("one").experiment.traffic == 0.1
    assert live.course("two").experiment.seed is None


def test_units_that_must_not_be_shared_let_nothing_of_a_file_count(live: Experiments) -> None:
    live.declare("mine", {"arms": ARMS, "namespace": {"name": "chat"}})
    said = {"one": {"arms": ARMS}, "two": {"arms": ARMS, "namespace": {"name": "chat", "end": 0.1}}}
    with pytest.raises(ExperimentError, match=r"mine and two overlap|two and mine overlap"):
        live.declare_all(parse_all(said))
    assert list(live.courses) == ["mine"]


def test_a_flag_needs_somebody_to_ask(live: Experiments) -> None:
    with pytest.raises(ExperimentError, match=r"tone: flag needs \[experiments.flags\]"):
        live.declare("tone", {"arms": ARMS, "flag": "tone"})


def test_what_a_file_says_again_changes_nothing(live: Experiments) -> None:
    said = parse_all({"tone": {"arms": ARMS}})
    live.declare_all(said)
    live.change("tone", {"traffic": 0.5})
    live.declare_all(said)
    assert live.course("tone").experiment.traffic == 0.5
    live.declare_all(parse_all({"tone": {"arms": ARMS, "traffic": 0.7}}))
    assert live.course("tone").experiment.traffic == 0.7
    assert [each.source for each in live.course("tone").revisions] == ["file", "api", "file"]


def test_what_a_file_names_no_more_is_paused(live: Experiments) -> None:
    live.declare("mine", {"arms": ARMS})
    live.declare_all(parse_all({"tone": {"arms": ARMS}}))
    live.declare_all({})
    assert live.course("tone").experiment.state == "paused"
    assert live.course("mine").experiment.state == "running"


def test_another_process_sees_what_changed(live: Experiments, path: Path, clock: Clock) -> None:
    log = Log(LogConfig(path))
    other = Experiments(log, clock=clock)
    live.declare("tone", {"arms": ARMS})
    with pytest.raises(UnknownExperiment, match=r"no experiment named 'tone' \(known: none\)"):
        other.course("tone")
    other.refresh()
    other.change("tone", {"traffic": 0.5})
    live.change("tone", {"metrics": [{"outcome": "x"}]})  # sees the other's first
    assert live.course("tone").experiment.traffic == 0.5
    assert [each.number for each in live.course("tone").revisions] == [1, 2, 3]
    log.close()


def test_arms_that_cannot_be_served_are_not_accepted(path: Path) -> None:
    def check(course: Course) -> None:
        raise ExperimentError("no skill named 'ada'")

    log = Log(LogConfig(path))
    live = Experiments(log, check)
    with pytest.raises(ExperimentError, match="no skill"):
        live.declare("tone", {"arms": ARMS})
    with pytest.raises(ExperimentError, match="no skill"):
        live.declare_all(parse_all({"tone": {"arms": ARMS}}))
    assert not live.courses
    log.close()
