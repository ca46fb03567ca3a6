"""Experiments: the same arms, words and log, whatever runs the model."""

import sqlite3
from contextlib import closing
from typing import Any

import httpx
import pytest

from dynmerge_server.experiments.assignment import arm_of
from dynmerge_server.experiments.declaration import parse_all
from dynmerge_server.experiments.feedback import bare
from dynmerge_server.experiments.reading import open_readonly
from tests.contract.asking import HEADER, METHOD_HEADER, reply_to, said, say
from tests.contract.server import EXPERIMENTS, Served
from tests.server.asking import CHAT, CHAT_PATH, COMPLETION_PATH, events

try:
    import tomllib
except ModuleNotFoundError:
    import tomli as tomllib

UNIT = "X-Dynmerge-Unit"
EXPERIMENT = "X-Dynmerge-Experiment"
TONE = parse_all(tomllib.loads(EXPERIMENTS)["experiments"])["tone"]
SAME: dict[str, dict[str, str]] = {
    "plain": {HEADER: "ada=1"},
    "mixed": {"X-Dynmerge-Preset": "mixed", METHOD_HEADER: "linear;scale=0.9"},
    "none": {},
}


def unit_of(arm: str, after: int = 0) -> str:
    """A unit that the hash gives `arm`."""
    return next(
        unit for unit in (f"u-{n}" for n in range(after, 1000)) if arm_of(TONE, unit).arm == arm
    )


async def feedback(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post("/v1/feedback", json=body)


@pytest.mark.parametrize("arm", list(TONE.arms))
async def test_a_unit_gets_its_arm_and_is_told(client: httpx.AsyncClient, arm: str) -> None:
    reply = await reply_to(client, {UNIT: unit_of(arm)})
    assert reply.headers["x-dynmerge-experiment"] == f"tone={arm}"
    assert reply.headers["x-dynmerge-applied"].endswith(";source=experiment")
    block = reply.json()["dynmerge"]
    assert block["experiment"] == {"name": "tone", "arm": arm, "kind": "assigned"}
    same = await say(client, SAME[arm])
    assert said(reply.json()) == said(same)
    assert same["dynmerge"]["merge_id"] == block["merge_id"]
    assert "experiment" not in same["dynmerge"]


async def test_a_user_or_a_session_is_a_unit_too(client: httpx.AsyncClient) -> None:
    unit = unit_of("mixed")
    for reply in (
        await reply_to(client, user=unit),
        await reply_to(client, {"X-Session-ID": unit}),
        await reply_to(client, {"X-Session-ID": unit}, user=unit_of("plain")),
        await reply_to(client, {UNIT: unit, "X-Session-ID": unit_of("plain")}),
    ):
        assert reply.headers["x-dynmerge-experiment"] == "tone=mixed"


async def test_who_says_what_to_serve_is_in_no_experiment(client: httpx.AsyncClient) -> None:
    unit = {UNIT: unit_of("mixed")}
    for reply in (
        await reply_to(client, {**unit, HEADER: "bob=1"}),
        await reply_to(client, unit, preference={"bob": 1}),
        await reply_to(client, {**unit, METHOD_HEADER: "linear"}),
        await reply_to(client, unit, model="ada"),
        await reply_to(client),
    ):
        assert "x-dynmerge-experiment" not in reply.headers
        assert not reply.headers["x-dynmerge-applied"].endswith("=experiment")


async def test_an_arm_can_be_asked_for(client: httpx.AsyncClient) -> None:
    for reply in (
        await reply_to(client, {EXPERIMENT: "tone=mixed", UNIT: unit_of("plain")}),
        await reply_to(client, experiment="tone=mixed"),
    ):
        assert reply.headers["x-dynmerge-experiment"] == "tone=mixed;forced"
        assert reply.json()["dynmerge"]["experiment"]["kind"] == "forced"


@pytest.mark.parametrize(
    ("headers", "body", "message"),
    [
        ({EXPERIMENT: "tone=loud"}, {}, "no arm 'loud' (known: plain, mixed, none)"),
        ({EXPERIMENT: "tune"}, {}, "no experiment named 'tune' (known: tone)"),
        ({EXPERIMENT: "tone"}, {}, "nothing names its unit"),
        ({EXPERIMENT: "tone=mixed"}, {"preference": "ada=1"}, "not both"),
        ({EXPERIMENT: "tone=mixed"}, {"experiment": "tone=mixed"}, "give one of them"),
        ({EXPERIMENT: "tone=0.5"}, {}, "as in tone=B"),
        ({EXPERIMENT: "tone=mixed, tone=plain, x=y"}, {}, "as in tone=B"),
        ({UNIT: ""}, {}, "1 to 512"),
        ({UNIT: "x" * 513}, {}, "1 to 512"),
    ],
)
async def test_what_cannot_be_joined_is_refused(
    client: httpx.AsyncClient, headers: dict[str, str], body: dict[str, Any], message: str
) -> None:
    reply = await client.post("/v1/chat/completions", json={**CHAT, **body}, headers=headers)
    assert reply.status_code == 400, reply.text
    assert message in reply.json()["error"]["message"]


async def test_feedback_on_a_reply_is_kept_once(client: httpx.AsyncClient) -> None:
    reply = await reply_to(client, {UNIT: unit_of("plain")})
    vote = {"request_id": reply.json()["id"], "name": "helpful", "value": True, "id": "vote-1"}
    assert (await feedback(client, **vote)).json()["status"] == "stored"
    vote["request_id"] = reply.headers["x-request-id"]
    assert (await feedback(client, **vote)).json()["status"] == "again"
    assert (await feedback(client, **{**vote, "value": False})).status_code == 409
    assert (await feedback(client, request_id="nobody", name="x", value=1)).status_code == 404
    assert (await feedback(client, **{**vote, "value": None})).status_code == 400


async def test_feedback_finds_a_request_by_the_clients_own_id(client: httpx.AsyncClient) -> None:
    headers = {UNIT: unit_of("plain"), "X-Request-Id": "mine.1"}
    reply = await reply_to(client, headers)
    assert reply.json()["id"].endswith("mine.1")
    stored = await feedback(client, request_id="mine.1", name="helpful", value=0.5)
    assert stored.json()["status"] == "stored"


@pytest.mark.parametrize("path", [CHAT_PATH, COMPLETION_PATH])
async def test_a_stream_is_told_and_counted_alike(
    client: httpx.AsyncClient, served: Served, path: str
) -> None:
    reply = await reply_to(client, {UNIT: unit_of("mixed")}, path=path, stream=True)
    assert reply.headers["x-dynmerge-experiment"] == "tone=mixed"
    chunks = events(reply)
    assert chunks[-1]["dynmerge"]["experiment"]["arm"] == "mixed"
    assert not any(chunk.get("usage") for chunk in chunks)
    assert all(chunk["choices"] for chunk in chunks)
    request_id = chunks[0]["id"]
    assert (await feedback(client, request_id=request_id, name="x", value=1)).status_code == 200
    found = logged(served, request_id)
    assert found == {**found, "arm": "mixed", "status": 200, "completion_tokens": 8}
    assert found["prompt_tokens"] > 0
    assert 0 < found["ttft"] <= found["latency"]


@pytest.mark.parametrize("path", [CHAT_PATH, COMPLETION_PATH])
async def test_what_was_measured_is_in_the_log(
    client: httpx.AsyncClient, served: Served, path: str
) -> None:
    reply = await reply_to(client, {UNIT: unit_of("plain")}, path=path)
    request_id = reply.json()["id"]
    await feedback(client, request_id=request_id, name="x", value=1)
    found = logged(served, request_id)
    block = reply.json()["dynmerge"]
    assert found["unit"] != unit_of("plain")
    for name, value in {
        "kind": "assigned",
        "experiment": "tone",
        "arm": "plain",
        "preference": block["text"],
        "method": block["method"],
        "merge_id": block["merge_id"],
        "cache": block["cache"],
        "status": 200,
        "prompt_tokens": reply.json()["usage"]["prompt_tokens"],
        "completion_tokens": 8,
        "finish_reason": "length",
    }.items():
        assert found[name] == value


def logged(served: Served, request_id: str) -> dict[str, Any]:
    """A request as the server's log has it."""
    with closing(open_readonly(served.folder / "experiments.sqlite")) as connection:
        connection.row_factory = sqlite3.Row
        query = "SELECT * FROM exposures WHERE request_id = ?"
        return dict(connection.execute(query, (bare(request_id),)).fetchone())


async def test_two_answers_come_without_their_arms(client: httpx.AsyncClient) -> None:
    body = {**CHAT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    asked = {**body, "arms": ["plain", "mixed"]}
    reply = await client.post("/v1/experiments/tone/compare", json=asked)
    assert reply.status_code == 200, reply.text
    found = reply.json()
    assert [answer["position"] for answer in found["answers"]] == ["first", "second"]
    assert "mixed" not in reply.text
    assert "dynmerge" not in reply.text
    one, two = said(await say(client, SAME["plain"])), said(await say(client, SAME["mixed"]))
    assert {said(answer) for answer in found["answers"]} == {one, two}
    vote = await feedback(client, request_id=found["id"], name="vote", value="first")
    assert vote.json()["status"] == "stored"
    bad = await client.post("/v1/experiments/tone/compare", json={**body, "arms": ["plain", "x"]})
    assert bad.status_code == 400
    assert "plain, mixed, none" in bad.json()["error"]["message"]


async def test_an_experiment_is_declared_changed_and_ended(client: httpx.AsyncClient) -> None:
    arms = {"a": {"preference": "ada=1"}, "b": {"preference": "bob=1"}}
    body = {"name": "length", "arms": arms, "state": "draft"}
    made = await client.post("/v1/experiments", json=body)
    assert made.status_code == 201, made.text
    unknown = {**body, "name": "other", "arms": {**arms, "b": {"preference": "zed=1"}}}
    refused = await client.post("/v1/experiments", json=unknown)
    assert "no skill named 'zed'" in refused.json()["error"]["message"]
    forced = await reply_to(client, {EXPERIMENT: "length=b"})
    assert forced.headers["x-dynmerge-experiment"] == "length=b;forced"
    assert (await client.post("/v1/experiments/length/start", json={})).json()["runs"] is True
    joined = await reply_to(client, {EXPERIMENT: "length", UNIT: "u-1"})
    assert joined.headers["x-dynmerge-experiment"].startswith("length=")
    ramped = await client.post("/v1/experiments/length/ramp", json={"traffic": 0})
    assert ramped.json()["traffic"] == 0
    outside = await reply_to(client, {EXPERIMENT: "length", UNIT: "u-1"})
    assert "x-dynmerge-experiment" not in outside.headers
    changed = await client.patch("/v1/experiments/length", json={"arms": {"a": {}, "b": {}}})
    assert "has begun: arms cannot change" in changed.json()["error"]["message"]
    stopped = await client.post("/v1/experiments/length/stop", json={})
    assert stopped.json()["state"] == "stopped"
    assert (await client.post("/v1/experiments/length/start", json={})).status_code == 400
    assert (await client.get("/v1/experiments/nothing")).status_code == 404


async def test_who_is_forgotten_is_gone(client: httpx.AsyncClient) -> None:
    reply = await reply_to(client, {UNIT: "somebody"})
    gone = await client.post("/v1/feedback/forget", json={"unit": "somebody"})
    assert gone.json() == {"object": "forgotten", "exposures": 1}
    late = await feedback(client, request_id=reply.json()["id"], name="helpful", value=True)
    assert late.status_code == 404


async def test_a_report_is_made_where_its_libraries_are(client: httpx.AsyncClient) -> None:
    await reply_to(client, {UNIT: unit_of("plain", after=500)})
    reply = await client.get("/v1/experiments/tone")
    page = await client.get("/v1/experiments/tone/report.html")
    if reply.status_code == 501:
        assert "pip install 'dynmerge[experiments]'" in reply.json()["error"]["message"]
        assert "/" not in reply.json()["error"]["message"]
        return
    assert reply.json()["report"]["verdict"]["decision"] == "few"
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "tone" in page.text
