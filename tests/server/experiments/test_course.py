"""What a change may change, and when an experiment has begun."""

from datetime import datetime, timezone
from typing import Any

import pytest

from dynmerge.errors import ExperimentError
from dynmerge_server.experiments.course import Course, first, patched, with_state
from dynmerge_server.experiments.declaration import Experiment

ARMS: dict[str, Any] = {"A": {"preference": "ada=1"}, "B": {"preference": "bob=1"}}
ALIKE = [
    {"metric": {"measure": "error"}, "at_most": 0.1},
    {"metric": {"outcome": "error"}, "at_most": 1e9},
]
NOW = 1_800_000_000.0


def tone(**more: Any) -> Experiment:
    return Experiment.parse("tone", {"arms": ARMS, **more})


def course(experiment: Experiment) -> Course:
    return Course((first(experiment, NOW, "api"),))


def at(seconds: float) -> str:
    return datetime.fromtimestamp(NOW + seconds, timezone.utc).isoformat()


def test_what_is_declared_is_what_is_kept() -> None:
    given = tone(
        weights={"A": 1, "B": 3},
        primary={"outcome": "helpful"},
        guardrails=[{"metric": {"measure": "ttft", "over": 2.0}, "at_most": 0.05}],
        namespace={"name": "chat", "end": 0.5},
        ramp=[{"at": at(10), "traffic": 0.5}],
    )
    assert course(given).experiment == given
    assert given.weights == {"A": 0.25, "B": 0.75}


@pytest.mark.parametrize(
    ("metric", "better"),
    [
        ({"outcome": "helpful"}, "higher"),
        ({"outcome": "complaint", "better": "lower"}, "lower"),
        ({"measure": "ttft", "over": 2.0}, "lower"),
        ({"measure": "error"}, "lower"),
        ({"measure": "tokens", "better": "higher"}, "higher"),
    ],
)
def test_less_is_better_of_what_nobody_wants(metric: dict[str, Any], better: str) -> None:
    given = tone(primary=metric)
    assert given.primary is not None
    assert given.primary.better == better
    assert course(given).experiment == given


def test_the_order_of_arms_is_kept_for_it_is_the_hashs() -> None:
    turned = Experiment.parse("tone", {"arms": dict(reversed(ARMS.items()))})
    assert list(course(turned).experiment.arms) == ["B", "A"]
    with pytest.raises(ExperimentError, match="arms cannot change"):
        course(tone()).changed(turned, NOW, "file")


@pytest.mark.parametrize(
    "changes",
    [
        {"arms": {**ARMS, "C": {}}},
        {"arms": {"A": {"preference": "ada=0.9, bob=0.1"}, "B": ARMS["B"]}},
        {"seed": "other"},
        {"unit": "user"},
        {"control": "B"},
        {"primary": {"outcome": "helpful"}},
        {"alpha": 0.1},
        {"namespace": {"name": "chat"}},
        {"holdout": {"name": "h", "share": 0.1}},
    ],
)
def test_what_was_compared_stays_what_it_was(changes: dict[str, Any]) -> None:
    begun = course(tone())
    with pytest.raises(ExperimentError, match=f"tone has begun: {next(iter(changes))} cannot"):
        begun.changed(patched(begun.experiment, changes), NOW + 1, "api")
    draft = course(tone(state="draft"))
    assert draft.changed(patched(draft.experiment, changes), NOW + 1, "api").number == 2


def test_an_experiment_that_waits_for_its_time_has_not_begun() -> None:
    waiting = course(tone(start=at(100)))
    changes = {"seed": "other"}
    assert waiting.changed(patched(waiting.experiment, changes), NOW + 99, "api")
    with pytest.raises(ExperimentError, match="seed cannot change"):
        waiting.changed(patched(waiting.experiment, changes), NOW + 101, "api")


def test_when_it_began_is_when_units_could_first_have_arms() -> None:
    waiting = course(tone(start=at(100)))
    assert [waiting.began(NOW + t) for t in (0, 99, 100, 200)] == [None, None, NOW + 100, NOW + 100]
    early = waiting.changed(with_state(waiting.experiment, "running"), NOW + 10, "api")
    both = Course((*waiting.revisions, early))
    assert both.began(NOW + 200) == NOW + 10
    assert course(tone(state="draft")).began(NOW + 9) is None


def test_it_has_begun_though_it_is_paused_since() -> None:
    begun = course(tone())
    paused = begun.changed(with_state(begun.experiment, "paused"), NOW + 10, "api")
    later = Course((*begun.revisions, paused))
    with pytest.raises(ExperimentError, match="seed cannot change"):
        later.changed(patched(later.experiment, {"seed": "x"}), NOW + 20, "api")
    with pytest.raises(ExperimentError, match="can be paused or stopped"):
        begun.changed(with_state(begun.experiment, "draft"), NOW + 1, "api")


def test_other_weights_begin_a_phase_and_other_traffic_does_not() -> None:
    begun = course(tone())
    ramped = begun.changed(patched(begun.experiment, {"traffic": 0.1}), NOW + 1, "api")
    assert (ramped.number, ramped.phase) == (2, 0)
    weighed = begun.changed(
        patched(begun.experiment, {"weights": {"A": 1, "B": 9}}), NOW + 1, "api"
    )
    assert weighed.phase == 1
    draft = course(tone(state="draft"))
    early = draft.changed(patched(draft.experiment, {"weights": {"A": 1, "B": 9}}), NOW, "api")
    assert early.phase == 0


def test_a_stopped_experiment_is_over() -> None:
    over = course(tone(state="stopped"))
    for state in ("running", "paused"):
        with pytest.raises(ExperimentError, match="tone is stopped, for good"):
            over.changed(with_state(over.experiment, state), NOW, "api")


def test_traffic_follows_the_ramp_until_somebody_sets_it() -> None:
    ramped = tone(traffic=0.1, ramp=[{"at": at(10), "traffic": 0.5}, {"at": at(20), "traffic": 1}])
    assert [ramped.traffic_at(NOW + t) for t in (0, 9, 10, 19, 20)] == [0.1, 0.1, 0.5, 0.5, 1.0]
    assert patched(ramped, {"traffic": 0.2}).traffic_at(NOW + 99) == 0.2
    assert patched(ramped, {"metrics": [{"outcome": "x"}]}).traffic_at(NOW + 99) == 1.0


def test_it_runs_between_its_times() -> None:
    timed = tone(start=at(10), stop=at(20))
    assert [timed.runs_at(NOW + t) for t in (9, 10, 19.9, 20)] == [False, True, True, False]
    assert with_state(timed, "running").runs_at(NOW)  # by hand, before its time


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"arms": {"A": {}}}, "1 of them; an experiment has 2 to 32"),
        ({"arms": ARMS, "weights": {"A": 1}}, "none for the arm 'B'"),
        ({"arms": ARMS, "weights": {"A": 0, "B": 0}}, "all are 0"),
        ({"arms": ARMS, "weights": {"A": 1, "C": 1}}, r"no arm named 'C' \(known: A, B\)"),
        ({"arms": ARMS, "control": "C"}, r"no arm named 'C' \(known: A, B\)"),
        ({"arms": ARMS, "trafic": 1}, "no setting named trafic"),
        ({"arms": ARMS, "traffic": 2}, "traffic: .* less than or equal to 1"),
        ({"arms": {"A": {"prefer": 1}, "B": {}}}, r"arms.A.prefer \(known: preference, preset"),
        ({"arms": {"A": {"preference": "ada=1", "preset": "x"}, "B": {}}}, "give one of them"),
        ({"arms": ARMS, "primary": {"outcome": "x", "measure": "ttft"}}, "one outcome or of one"),
        ({"arms": ARMS, "primary": {"measure": "tokens"}}, "higher or lower"),
        ({"arms": ARMS, "primary": {"outcome": "is it helpful?"}}, "primary.outcome"),
        ({"arms": ARMS, "traffic": True}, "traffic"),
        ({"arms": ARMS, "traffic": "0.5"}, "traffic"),
        ({"arms": ARMS, "start": 5}, "a time is written as"),
        ({"arms": ARMS, "weights": {"A": 1e308, "B": 1e308}}, "weights.A"),
        ({"arms": ARMS, "plan": {"units": 10**400}}, "plan.units"),
        ({"arms": ARMS, "plan": {"units": 100, "power": 0.001}}, "plan.power"),
        ({"arms": ARMS, "guardrails": ALIKE}, "two different metrics are both called error"),
        ({"arms": ARMS, "primary": {"measure": "speed"}}, "primary.measure: .*'ttft'"),
        ({"arms": ARMS, "guardrails": [{"metric": {"measure": "error"}}]}, "one of at_most"),
        ({"arms": ARMS, "metrics": [{"outcome": "x"}] * 2}, "x stands there twice"),
        ({"arms": ARMS, "start": "2026-12-01"}, "times have a zone"),
        ({"arms": ARMS, "start": at(9), "stop": at(1)}, "follow each other"),
        ({"arms": ARMS, "namespace": {"name": "n", "start": 1.0}}, "is empty"),
        ("tone", "dictionary"),
    ],
)
def test_a_declaration_that_is_wrong_is_refused_by_name(table: Any, message: str) -> None:
    with pytest.raises(ExperimentError, match=f"experiment tone: .*{message}"):
        Experiment.parse("tone", table)
