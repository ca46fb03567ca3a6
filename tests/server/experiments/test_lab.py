"""The file of declarations: read whole, again when it changes, never at the cost of what runs."""

import re
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette

from dynmerge.errors import ConfigError
from dynmerge.runtime import Runtime
from dynmerge_server.app import create_app
from dynmerge_server.config import ServerConfig
from dynmerge_server.experiments.assignment import arm_of
from dynmerge_server.experiments.declaration import Experiment
from dynmerge_server.experiments.keeper import Keeper, stamp
from dynmerge_server.experiments.lab import Lab
from tests.server.asking import CHAT
from tests.server.conftest import PRESETS

TONE = """
[experiments.tone]
traffic = {traffic}
guardrails = [{{ metric = {{ measure = "error" }}, at_most = 0.1 }}]
[experiments.tone.arms]
A = {{ preference = "ada=1" }}
B = {{ preset = "careful" }}
"""
TONE_STOPPED = "[experiments.tone]\nstate = 'stopped'"
OTHER_OK = """
[experiments.other]
arms = { A = {}, B = { preset = "careful" } }
"""
OTHER = """
[experiments.other]
arms = { A = {}, B = { preset = "bold" } }
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "experiments.toml"
    path.write_text(TONE.format(traffic=1.0))
    return path


@pytest.fixture
def config(tmp_path: Path, file: Path) -> ServerConfig:
    return ServerConfig.load(
        presets=PRESETS,
        experiments={"log": {"path": tmp_path / "log.sqlite"}, "file": file},
    )


@pytest.fixture
def lab(app: Starlette) -> Lab:
    lab = app.state.lab
    assert isinstance(lab, Lab)
    return lab


def no_guard(lab: Lab, experiment: Experiment) -> Sequence[str]:
    return []


@pytest.fixture
def keeper(lab: Lab) -> Keeper:
    """One that looks when it is told to."""
    return looking_when_told(Keeper(lab, no_guard))


def looking_when_told(keeper: Keeper) -> Keeper:
    keeper._over.set()
    keeper._thread.join()
    keeper.look()
    return keeper


def look(keeper: Keeper) -> None:
    """Twice: a file counts when it stays as it is."""
    keeper.look()
    keeper.look()


def traffic(lab: Lab) -> float:
    return lab.experiments.course("tone").experiment.traffic


async def test_a_change_of_the_file_counts_from_then_on(
    lab: Lab, keeper: Keeper, file: Path
) -> None:
    assert traffic(lab) == 1.0
    file.write_text(TONE.format(traffic=0.25))
    keeper.look()
    assert traffic(lab) == 1.0  # somebody may be writing it
    keeper.look()
    assert traffic(lab) == 0.25
    assert lab.experiments.file_error is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TONE.format(traffic=2.0), "experiments.toml: experiment tone: traffic: "),
        (TONE.format(traffic=0.5) + OTHER, "experiment other, arm B: no preset named 'bold'"),
        ("[experiments.tone", "cannot read the configuration"),
        ("[experiment.tone]", r"no table named experiment \(known: experiments\)"),
        ("experiments = " + "[" * 5000 + "]" * 5000, "nested too deeply|experiments.toml"),
        ("experiments = 3", "a table of experiments by name"),
    ],
)
async def test_a_malformed_change_leaves_the_old_one_and_is_shown(
    client: httpx.AsyncClient, lab: Lab, keeper: Keeper, file: Path, text: str, message: str
) -> None:
    file.write_text(text)
    look(keeper)
    assert traffic(lab) == 1.0
    shown = (await client.get("/v1/experiments")).json()
    assert [(each["name"], each["traffic"]) for each in shown["data"]] == [("tone", 1.0)]
    assert re.search(message, shown["file_error"])
    assert str(file.parent) not in shown["file_error"]
    file.write_text(TONE.format(traffic=0.5))
    look(keeper)
    assert lab.experiments.file_error is None
    assert traffic(lab) == 0.5


async def test_a_change_that_the_log_could_not_take_is_tried_again(
    lab: Lab, keeper: Keeper, file: Path
) -> None:
    file.write_text(TONE.format(traffic=0.25))
    with closing(sqlite3.connect(lab.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        look(keeper)
        assert "locked" in (lab.experiments.error or "")
        other.execute("ROLLBACK")
    keeper.look()
    assert traffic(lab) == 0.25
    assert lab.experiments.error is None


async def test_a_server_starts_though_its_file_says_what_cannot_change(
    runtime: Runtime, config: ServerConfig, file: Path
) -> None:
    first = create_app(runtime, config).state.lab
    first.experiments.turn("tone", "stopped")
    first.close()
    file.write_text(TONE.format(traffic=0.5))
    lab = create_app(runtime, config).state.lab
    lab.close()
    assert "tone is stopped, for good" in lab.experiments.file_error


@pytest.mark.parametrize(
    "headers",
    [
        [("X-Dynmerge-Experiment", "tone=A"), ("X-Dynmerge-Experiment", "tone=B")],
        [("X-Dynmerge-Experiment", "tone=A;x=1")],
        [("X-Dynmerge-Unit", "u1"), ("X-Dynmerge-Unit", "u2")],
    ],
)
async def test_what_is_said_twice_is_refused(
    client: httpx.AsyncClient, headers: list[tuple[str, str]]
) -> None:
    reply = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == headers[0][0]


async def test_a_session_is_hashed_as_its_text(client: httpx.AsyncClient, lab: Lab) -> None:
    headers = [(b"X-Session-ID", "ü".encode())]
    by_header = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
    by_body = await client.post("/v1/chat/completions", json={**CHAT, "user": "ü"})
    arms = [reply.headers["x-dynmerge-experiment"] for reply in (by_header, by_body)]
    assert (
        arms[0] == arms[1] == f"tone={arm_of(lab.experiments.course('tone').experiment, 'ü').arm}"
    )


async def test_a_report_without_its_log_says_so_and_not_where(
    client: httpx.AsyncClient, lab: Lab
) -> None:
    lab.path.rename(lab.path.with_name("elsewhere"))
    reply = await client.get("/v1/experiments/tone")
    assert reply.status_code == 503
    assert reply.json()["error"]["message"] == (
        "cannot read the log of experiments: there is no such file"
    )


async def test_a_file_that_is_gone_changes_nothing(lab: Lab, keeper: Keeper, file: Path) -> None:
    file.unlink()
    look(keeper)
    assert traffic(lab) == 1.0
    assert lab.experiments.file_error is not None
    assert stamp(file) is None


def test_a_server_does_not_start_on_a_wrong_file(
    runtime: Runtime, config: ServerConfig, file: Path
) -> None:
    file.write_text(TONE.format(traffic=1.0).replace("ada=1", "zed=1"))
    with pytest.raises(ConfigError, match=r"experiments.toml: .*arm A.*no skill named 'zed'"):
        create_app(runtime, config)


def test_a_file_without_a_log_is_refused(runtime: Runtime, file: Path) -> None:
    config = ServerConfig.load(experiments={"file": file})
    with pytest.raises(ConfigError, match=r"experiments.file needs experiments.log"):
        create_app(runtime, config)


async def test_a_broken_guardrail_ends_the_experiment(lab: Lab, keeper: Keeper) -> None:
    asked = []

    def broken(_: Lab, experiment: Experiment) -> Sequence[str]:
        asked.append(experiment.name)
        return ["error: 0.4 in the arm B, at most 0.1"]

    guarding = looking_when_told(Keeper(lab, broken))
    guarding._guarded -= lab.config.guard_seconds
    guarding.look()
    guarding.look()  # not so soon again, nor when it is stopped
    last = lab.experiments.course("tone").last
    assert asked == ["tone"]
    assert (last.source, last.reason) == ("guardrail", "error: 0.4 in the arm B, at most 0.1")
    assert lab.experiments.course("tone").experiment.state == "stopped"


async def test_a_fault_is_shown_and_ends_nothing(
    client: httpx.AsyncClient, lab: Lab, file: Path
) -> None:
    def fails(_: Lab, experiment: Experiment) -> Sequence[str]:
        raise sqlite3.OperationalError(f"database or disk is full: {lab.path}")

    guarding = looking_when_told(Keeper(lab, fails))
    guarding._guarded -= lab.config.guard_seconds
    file.write_text(TONE.format(traffic=0.25))
    guarding.look()
    shown = (await client.get("/v1/experiments")).json()
    assert shown["error"] == "database or disk is full: the log"
    guarding.look()
    assert traffic(lab) == 0.25
    assert lab.experiments.error is None


async def test_a_file_that_is_empty_for_a_while_ends_nothing(
    lab: Lab, keeper: Keeper, file: Path
) -> None:
    whole = file.read_text()
    file.write_text("")
    look(keeper)
    last = lab.experiments.course("tone").last
    assert (lab.experiments.course("tone").experiment.state, last.reason) == ("paused", "not in it")
    file.write_text(whole)
    look(keeper)
    assert lab.experiments.course("tone").experiment.state == "running"


async def test_a_file_may_say_that_what_was_stopped_is_stopped(
    lab: Lab, keeper: Keeper, file: Path
) -> None:
    lab.experiments.turn("tone", "stopped", "guardrail", "error")
    file.write_text(TONE.format(traffic=1.0).replace("[experiments.tone]", TONE_STOPPED) + OTHER_OK)
    look(keeper)
    assert lab.experiments.file_error is None
    assert lab.experiments.course("other").experiment.state == "running"


async def test_a_comparison_needs_an_experiment_that_runs(
    client: httpx.AsyncClient, lab: Lab
) -> None:
    lab.experiments.turn("tone", "paused")
    reply = await client.post("/v1/experiments/tone/compare", json=CHAT)
    assert (reply.status_code, "does not run" in reply.text) == (400, True)


async def test_nobody_is_turned_by_a_page_of_another_site(client: httpx.AsyncClient) -> None:
    for how in ({}, {"content": b"{}", "headers": {"Content-Type": "text/plain"}}):
        reply = await client.post("/v1/experiments/tone/stop", **how)
        assert reply.status_code == 400
        assert "application/json" in reply.text


@pytest.mark.parametrize("how", ["user", "session"])
async def test_a_unit_without_end_is_refused(client: httpx.AsyncClient, how: str) -> None:
    body = {**CHAT, "user": "x" * 513} if how == "user" else CHAT
    headers = {"X-Session-ID": "x" * 513} if how == "session" else {}
    reply = await client.post("/v1/chat/completions", json=body, headers=headers)
    assert reply.status_code == 400
    assert "names a unit, of 1 to 512 characters" in reply.text


async def test_without_experiments_the_routes_say_so_and_arms_are_refused(
    runtime: Runtime,
) -> None:
    app = create_app(runtime, ServerConfig())
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        listed = await client.get("/v1/experiments")
        voted = await client.post("/v1/feedback", json={})
        headers = {"X-Dynmerge-Experiment": "tone=A"}
        asked = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
        plain = await client.post(
            "/v1/chat/completions", json=CHAT, headers={"X-Dynmerge-Unit": "u1"}
        )
    app.state.serving.prompts.close()
    assert (listed.status_code, voted.status_code, asked.status_code) == (404, 404, 400)
    assert "experiments.log" in listed.json()["error"]["message"]
    assert "no experiments" in asked.json()["error"]["message"]
    assert plain.status_code == 200


async def test_an_arm_whose_skill_is_gone_stops_nobody_from_being_answered(
    client: httpx.AsyncClient, lab: Lab
) -> None:
    preferences = lab.preferences()
    offered = preferences._models.presets
    preferences._arms.clear()
    object.__setattr__(preferences._models, "presets", {})  # as if the bank had changed
    answers = [
        await client.post(
            "/v1/chat/completions", json=CHAT, headers={"X-Dynmerge-Unit": f"u{number}"}
        )
        for number in range(12)
    ]
    object.__setattr__(preferences._models, "presets", offered)
    assert {reply.status_code for reply in answers} == {200}
    assert "x-dynmerge-experiment" not in answers[-1].headers
    shown = (await client.get("/v1/experiments")).json()["data"][0]
    assert "no preset named 'careful'" in shown["failure"]
