"""Flags and DynmergeProvider, with OpenFeature's own SDK and its in-memory provider."""

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dynmerge.errors import ConfigError
from dynmerge_server.config import FlagsConfig
from dynmerge_server.experiments.assignment import arm_of
from dynmerge_server.experiments.declaration import Arm, Experiment, Holdout, Namespace
from dynmerge_server.experiments.flags import WORKERS, Flags

pytest.importorskip("openfeature", reason="needs openfeature-sdk")

from openfeature import api
from openfeature.evaluation_context import EvaluationContext
from openfeature.exception import ErrorCode
from openfeature.flag_evaluation import FlagResolutionDetails, Reason
from openfeature.provider import AbstractProvider
from openfeature.provider.in_memory_provider import InMemoryFlag, InMemoryProvider

from dynmerge_server.experiments.provider import DynmergeProvider

TONE = Experiment("tone", {"plain": Arm(), "warm": Arm()}, flag="tone-of-voice")
CONFIG = FlagsConfig("tests.server.experiments.test_flags:team_flags", seconds=5.0)


def by_unit(_flag: InMemoryFlag[str], context: EvaluationContext) -> FlagResolutionDetails[str]:
    """Units say by their name what they get, and what fails."""
    unit = context.targeting_key or ""
    if unit.startswith("broken"):
        raise RuntimeError("the flag service is away")
    return FlagResolutionDetails(unit.split("-")[0], reason=Reason.TARGETING_MATCH)


def team_flags() -> InMemoryProvider:
    flag = InMemoryFlag("plain", {"plain": "plain"}, context_evaluator=by_unit)
    return InMemoryProvider({"tone-of-voice": flag, "wrong-type": InMemoryFlag("on", {"on": True})})


class Slow(InMemoryProvider):
    """Answers when `go` is set, and not before. Counts who asks."""

    def __init__(self) -> None:
        super().__init__({})
        self.go = threading.Event()
        self.asked: list[str | None] = []

    def resolve_string_details(
        self,
        flag_key: str,
        default_value: str,
        evaluation_context: EvaluationContext | None = None,
    ) -> FlagResolutionDetails[str]:
        assert evaluation_context is not None
        self.asked.append(evaluation_context.targeting_key)
        assert self.go.wait(30)
        return FlagResolutionDetails("warm")


@pytest.fixture(autouse=True)
def _no_providers() -> Iterator[None]:
    yield
    api.shutdown()


async def ready(flags: Flags) -> Flags:
    client = api.get_client("dynmerge")
    while client.get_provider_status().value == "NOT_READY":
        await asyncio.sleep(0.001)
    return flags


def opened(provider: AbstractProvider, **settings: object) -> Flags:
    return Flags(provider, replace(CONFIG, **settings))  # type: ignore[arg-type]


async def test_the_flag_chooses_the_arm_and_never_through_the_default_provider() -> None:
    flags = await ready(Flags.of(CONFIG))
    assert await flags.arm(TONE, "warm-1") == "warm"
    assert await flags.arm(TONE, "plain-1") == "plain"
    assert flags.refusals() == []
    assert api.get_client().get_string_value("tone-of-voice", "?") == "?"
    flags.close()


async def test_a_value_that_is_no_arm_enrols_nobody_and_is_shown() -> None:
    flags = await ready(opened(team_flags()))
    assert [await flags.arm(TONE, unit) for unit in ("cold-1", "cold-2", "cold-1")] == [None] * 3
    (refusal,) = flags.refusals()
    assert (refusal.experiment, refusal.reason, refusal.count) == ("tone", "no arm", 3)
    assert refusal.last == "flag tone-of-voice is 'cold', which is no arm (known: plain, warm)"
    flags.close()


@pytest.mark.parametrize(
    ("flag", "unit", "reason"),
    [
        ("tone-of-voice", "broken-1", "general"),
        ("wrong-type", "warm-1", "type mismatch"),
        ("nowhere", "warm-1", "flag not found"),
    ],
)
async def test_a_provider_that_fails_enrols_nobody(flag: str, unit: str, reason: str) -> None:
    flags = await ready(opened(team_flags()))
    assert await flags.arm(replace(TONE, flag=flag), unit) is None
    assert [(each.reason, each.count) for each in flags.refusals()] == [(reason, 1)]
    flags.close()


async def test_a_provider_that_is_not_ready_enrols_nobody() -> None:
    begun, go = threading.Event(), threading.Event()

    class Beginning(InMemoryProvider):
        def initialize(self, evaluation_context: EvaluationContext) -> None:
            begun.set()
            assert go.wait(30)

    flags = opened(Beginning({}))
    assert await asyncio.to_thread(begun.wait, 30)
    assert await flags.arm(TONE, "warm-1") is None
    assert [each.reason for each in flags.refusals()] == ["provider not ready"]
    go.set()
    flags.close()


async def test_a_slow_provider_holds_neither_the_request_nor_the_event_loop() -> None:
    slow = Slow()
    flags = await ready(opened(slow, seconds=0.05))
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.001)

    ticking = asyncio.create_task(tick())
    assert await asyncio.gather(*(flags.arm(TONE, f"u{unit}") for unit in range(20))) == [None] * 20
    ticking.cancel()
    assert ticks > 3
    assert [(each.reason, each.count) for each in flags.refusals()] == [("late", 20)]
    # All threads are taken by what nobody waits for: the next is told at once, and asks nobody.
    assert len(slow.asked) == WORKERS
    assert await flags.arm(TONE, "u7") is None
    assert len(slow.asked) == WORKERS
    slow.go.set()
    flags.close()


async def test_a_late_answer_is_there_for_the_next_request() -> None:
    slow = Slow()
    flags = await ready(opened(slow, seconds=0.02))
    assert await flags.arm(TONE, "u1") is None
    slow.go.set()
    deadline = time.monotonic() + 30
    while await flags.arm(TONE, "u1") is None and time.monotonic() < deadline:
        await asyncio.sleep(0.001)
    asked = len(slow.asked)
    assert await flags.arm(TONE, "u1") == "warm"
    assert len(slow.asked) == asked
    flags.close()


async def test_a_value_is_kept_for_its_time_and_the_one_used_last_the_longest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dynmerge_server.experiments.flags.KEEP", 2)
    now = 0.0
    quick = Slow()
    quick.go.set()
    flags = await ready(Flags(quick, replace(CONFIG, keep_seconds=10.0), clock=lambda: now))
    for unit in ("a", "b", "a", "c", "a", "b"):
        assert await flags.arm(TONE, unit) == "warm"
    assert quick.asked == ["a", "b", "c", "b"]
    now = 10.0
    assert await flags.arm(TONE, "b") == "warm"
    assert quick.asked[-2:] == ["b", "b"]
    flags.close()


@pytest.mark.parametrize(
    ("provider", "message"),
    [
        ("nowhere.at_all:make", "package.module:factory"),
        ("tests.server.experiments.test_flags:absent", "no provider at"),
        ("tests.server.experiments.test_flags", "package.module:factory"),
        ("builtins:dict", "made a dict, not an OpenFeature AbstractProvider"),
    ],
)
def test_a_provider_that_is_none_is_named(provider: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Flags.of(FlagsConfig(provider))


def asked(
    experiments: dict[str, Experiment], unit: str | None, flag: str = "tone", now: float = 0.0
) -> tuple[str, str | None, str | None, ErrorCode | None]:
    """By the SDK's client, as a team's service asks: value, variant, reason and error."""
    api.set_provider_and_wait(DynmergeProvider(experiments, clock=lambda: now), "team")
    details = api.get_client("team").get_string_details(flag, "-", EvaluationContext(unit))
    return details.value, details.variant, details.reason, details.error_code


def test_a_service_gets_the_arm_that_the_server_gives() -> None:
    tone = Experiment(
        "tone",
        {"plain": Arm(), "warm": Arm()},
        weights={"plain": 1, "warm": 2},
        traffic=0.8,
        namespace=Namespace("chat", 0.1, 1.0),
        holdout=Holdout("2026", 0.2),
    )
    for unit in (f"u{number}" for number in range(300)):
        placed = arm_of(tone, unit)
        value, variant, reason, error = asked({"tone": tone}, unit)
        assert (value, variant) == (placed.arm or "-", placed.arm)
        assert reason == (Reason.SPLIT if placed.arm else Reason.DEFAULT)
        assert error is None


def test_an_experiment_that_does_not_run_is_disabled() -> None:
    tone = Experiment.parse(
        "tone",
        {"arms": {"plain": {}, "warm": {}}, "start": "2026-12-01T09:00:00Z"},
    )
    begins = tone.start.timestamp() if tone.start else 0.0
    assert asked({"tone": tone}, "u1", now=begins - 1)[2] == Reason.DISABLED
    assert asked({"tone": tone}, "u1", now=begins)[2] == Reason.SPLIT
    assert asked({"tone": replace(tone, state="paused")}, "u1", now=begins)[2] == Reason.DISABLED


def test_what_cannot_be_resolved_says_why() -> None:
    plain = {"tone": replace(TONE, flag=None)}
    assert asked(plain, "u1", flag="length")[3] == ErrorCode.FLAG_NOT_FOUND
    assert asked(plain, None)[3] == ErrorCode.TARGETING_KEY_MISSING
    assert asked({"tone": TONE}, "u1")[3] == ErrorCode.GENERAL
    client = api.get_client("team")
    assert client.get_boolean_details("tone", True).error_code == ErrorCode.TYPE_MISMATCH
    assert client.get_integer_details("tone", 1).error_code == ErrorCode.TYPE_MISMATCH
    assert client.get_float_details("tone", 1.0).error_code == ErrorCode.TYPE_MISMATCH
    assert client.get_object_details("tone", {}).error_code == ErrorCode.TYPE_MISMATCH


def test_a_file_of_experiments_is_a_provider(tmp_path: Path) -> None:
    path = tmp_path / "experiments.toml"
    path.write_text("[experiments.tone.arms]\nplain = {}\nwarm = { preference = 'warm=1' }\n")
    found = DynmergeProvider.of_file(path).resolve_string_details(
        "tone", "-", EvaluationContext("u1")
    )
    assert found.value == arm_of(Experiment("tone", {"plain": Arm(), "warm": Arm()}), "u1").arm
    path.write_text("[experiment.tone.arms]\nplain = {}\nwarm = {}\n")
    with pytest.raises(ConfigError, match=r"no table named experiment \(known: experiments\)"):
        DynmergeProvider.of_file(path)
    path.write_text("[experiments.tone]\narms = 3\n")
    with pytest.raises(ConfigError, match=r"^experiments\.toml: "):
        DynmergeProvider.of_file(path)
    with pytest.raises(ConfigError, match=r"absent\.toml"):
        DynmergeProvider.of_file(tmp_path / "absent.toml")
