"""What the middleware does for experiments: arms in, what became of them out, whatever happens."""

import asyncio
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from dynmerge_server.config import ServerConfig
from dynmerge_server.experiments.lab import Lab, open_lab
from dynmerge_server.experiments.reading import open_readonly
from dynmerge_server.experiments.routes import ROUTES
from dynmerge_server.vllm.state import Door
from tests.server.vllm.stand_ins import EchoClient, EchoServer

PATH = "/v1/completions"
UNIT = {"X-Dynmerge-Unit": "u1", "X-Request-Id": "r1"}
ARMS = {"A": {"preference": "ada=1"}, "B": {"preference": "ada=0.5, bob=0.5"}}
DENSE = {"preference": "ada=0.5, bob=0.5", "method": "ties"}  # made by the workers, aside


@pytest.fixture
def lab(door: Door, tmp_path: Path) -> Iterator[Lab]:
    config = ServerConfig.load(
        experiments={"log": {"path": tmp_path / "log.sqlite", "flush_seconds": 0.01}}
    )
    lab = open_lab(config.experiments, lambda: door.versions.served.preferences)
    assert lab is not None
    lab.experiments.declare("tone", {"arms": ARMS})
    yield lab
    lab.log.close()


@pytest.fixture(autouse=True)
def with_experiments(server: EchoServer, door: Door, lab: Lab) -> None:
    server.app.state.dynmerge = replace(door, lab=lab)
    server.app.state.lab = lab
    server.app.router.routes[:0] = ROUTES


def logged(lab: Lab) -> list[dict[str, Any]]:
    """All exposures, when they are written."""
    lab.log.close()
    with closing(open_readonly(lab.path)) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute("SELECT * FROM exposures ORDER BY time")]


async def test_a_unit_gets_its_arms_merge(
    client: httpx.AsyncClient, server: EchoServer, lab: Lab
) -> None:
    reply = await client.post(PATH, json={"prompt": "a"}, headers=UNIT)
    block = reply.json()["dynmerge"]
    assert block["experiment"]["kind"] == "assigned"
    assert block["text"] == ARMS[block["experiment"]["arm"]]["preference"]
    assert reply.headers["x-dynmerge-experiment"] == f"tone={block['experiment']['arm']}"
    assert reply.headers["x-request-id"] == "r1"
    assert server.seen == [{"model": block["merge_id"], "prompt": "a"}]
    [row] = logged(lab)
    assert (row["request_id"], row["status"], row["cache"]) == ("r1", 200, "stored")
    assert row["merge_id"] == block["merge_id"]


async def test_tokens_of_a_stream_are_counted_without_the_client_seeing_it(
    client: httpx.AsyncClient, server: EchoServer, lab: Lab
) -> None:
    reply = await client.post(PATH, json={"prompt": "a", "stream": True}, headers=UNIT)
    assert server.seen[0]["stream_options"] == {"include_usage": True}
    assert '"choices":[]' not in reply.text
    assert "total_tokens" not in reply.text
    assert reply.text.count('"dynmerge"') == 1
    assert reply.text.endswith("data: [DONE]\n\n")
    [row] = logged(lab)
    assert (row["completion_tokens"], row["finish_reason"], row["empty"]) == (2, "stop", 0)


async def test_a_client_that_asked_for_usage_gets_it(
    client: httpx.AsyncClient, server: EchoServer, lab: Lab
) -> None:
    body = {"prompt": "a", "stream": True, "stream_options": {"include_usage": True}}
    reply = await client.post(PATH, json=body, headers=UNIT)
    assert reply.text.count('"choices":[]') == 1
    [row] = logged(lab)
    assert row["completion_tokens"] == 2


async def test_who_is_not_counted_is_asked_as_before(
    client: httpx.AsyncClient, server: EchoServer, lab: Lab
) -> None:
    await client.post(PATH, json={"prompt": "a", "stream": True})
    assert "stream_options" not in server.seen[0]
    assert logged(lab) == []


async def test_a_merge_that_cannot_be_made_is_a_failed_request_of_its_arm(
    client: httpx.AsyncClient, vllm: EchoClient, lab: Lab
) -> None:
    lab.experiments.declare("dense", {"arms": {"A": DENSE, "B": DENSE}})
    headers = {**UNIT, "X-Dynmerge-Experiment": "dense"}
    vllm.failing = "no memory"
    failed = await client.post(PATH, json={"prompt": "a"}, headers=headers)
    vllm.failing, vllm.dead = "", True
    dead = await client.post(PATH, json={"prompt": "a"}, headers=headers)
    assert (failed.status_code, dead.status_code) == (500, 503)
    for row, status in zip(logged(lab), (500, 503), strict=True):
        assert (row["experiment"], row["kind"], row["status"]) == ("dense", "assigned", status)
        assert row["empty"] is None


async def test_what_vllm_refuses_is_logged_with_its_status(
    client: httpx.AsyncClient, server: EchoServer, lab: Lab
) -> None:
    server.status = 400
    reply = await client.post(PATH, json={"prompt": "a"}, headers=UNIT)
    assert reply.status_code == 400
    [row] = logged(lab)
    assert (row["status"], row["empty"]) == (400, None)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("experiment", ["tone", "base"])
async def test_a_handler_that_breaks_is_an_error_and_no_client_that_left(
    client: httpx.AsyncClient, server: EchoServer, lab: Lab, experiment: str, stream: bool
) -> None:
    lab.experiments.declare("base", {"arms": {"A": {}, "B": {}}})
    server.broken = True
    headers = {**UNIT, "X-Dynmerge-Experiment": experiment}
    reply = await client.post(PATH, json={"prompt": "a", "stream": stream}, headers=headers)
    assert reply.status_code == (200 if stream else 500)
    [row] = logged(lab)
    assert (row["experiment"], row["status"], row["empty"]) == (experiment, 500, None)


@pytest.mark.parametrize(
    "event",
    [
        'data: {"error": {"message": "no", "type": "InternalServerError", "code": 500}}',
        'data: {"error":{"message":"no"}}',
        'event: error\ndata: {"type":"error","error":{"type":"internal_error","message":"no"}}',
        'data: {"type": "message-end", "delta": {"error": "no", "finish_reason": "ERROR"}}',
    ],
)
async def test_an_error_within_a_stream_is_one(
    client: httpx.AsyncClient, server: EchoServer, lab: Lab, event: str
) -> None:
    server.events = (f"{event}\n\n",)
    reply = await client.post(PATH, json={"prompt": "a", "stream": True}, headers=UNIT)
    assert (reply.status_code, event in reply.text) == (200, True)
    [row] = logged(lab)
    assert (row["status"], row["empty"]) == (500, None)


async def test_a_text_about_an_error_is_none(
    client: httpx.AsyncClient, server: EchoServer, lab: Lab
) -> None:
    server.text = 'data: {"error":"no"}\n\nevent: error\n'
    await client.post(PATH, json={"prompt": "a", "stream": True}, headers=UNIT)
    [row] = logged(lab)
    assert (row["status"], row["empty"]) == (200, 0)


async def test_a_client_that_leaves_is_no_error(
    client: httpx.AsyncClient, server: EchoServer, lab: Lab
) -> None:
    server.content = None  # vLLM's handlers end so when they hear of it
    await client.post(PATH, json={"prompt": "a"}, headers=UNIT)
    server.gate.clear()  # and Starlette cancels them
    leaving = asyncio.create_task(client.post(PATH, json={"prompt": "a"}, headers=UNIT))
    while len(server.merges) < 2:
        await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.wait([leaving])
    assert [(row["status"], row["empty"]) for row in logged(lab)] == [(499, None)] * 2


async def test_only_a_stream_shows_when_its_first_token_came(
    client: httpx.AsyncClient, lab: Lab
) -> None:
    for stream in (False, True):
        await client.post(PATH, json={"prompt": "a", "stream": stream}, headers=UNIT)
    whole, streamed = logged(lab)
    assert whole["ttft"] is None
    assert whole["latency"] > 0
    assert 0 < streamed["ttft"] <= streamed["latency"]


CALLED = {"id": "call-1", "function": {"name": "look", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("content", "empty"),
    [
        ({"choices": [{"text": "a"}]}, False),
        ({"choices": [{"text": ""}, {"text": ' a "quoted" word'}]}, False),
        ({"choices": [{"text": ""}]}, True),
        ({"choices": [{"text": " \n\t\u3000"}]}, True),
        ({"choices": [{"message": {"content": None, "tool_calls": [CALLED]}}]}, False),
        ({"choices": [{"message": {"content": None, "tool_calls": []}}]}, True),
        ({"output": [{"type": "function_call", "name": "look", "arguments": "{}"}]}, False),
        ({"content": [{"type": "tool_use", "name": "look", "input": {}}]}, False),
        ({"content": [{"type": "text", "text": "\\"}]}, False),
    ],
)
async def test_a_whole_reply_is_empty_without_words_and_calls(
    client: httpx.AsyncClient, server: EchoServer, lab: Lab, content: dict[str, Any], empty: bool
) -> None:
    server.content = content
    await client.post(PATH, json={"prompt": "a"}, headers=UNIT)
    [row] = logged(lab)
    assert row["empty"] == empty


@pytest.mark.parametrize(
    ("text", "event", "empty"),
    [
        ("", {}, True),
        (" \n", {}, True),
        (" \n", {"choices": [{"delta": {"content": " a"}}]}, False),
        ("", {"choices": [{"delta": {"tool_calls": [{"index": 0, **CALLED}]}}]}, False),
        ("", {"content_block": {"type": "tool_use", "name": "look"}}, False),
    ],
)
async def test_a_stream_is_empty_without_words_and_calls(
    client: httpx.AsyncClient,
    server: EchoServer,
    lab: Lab,
    text: str,
    event: dict[str, Any],
    empty: bool,
) -> None:
    server.text = text
    server.events = (f"data: {json.dumps(event, separators=(',', ':'))}\n\n",)
    await client.post(PATH, json={"prompt": "a", "stream": True}, headers=UNIT)
    [row] = logged(lab)
    assert row["empty"] == empty


async def test_two_answers_are_two_requests_of_one_comparison(
    client: httpx.AsyncClient, server: EchoServer, lab: Lab
) -> None:
    body = {"prompt": "a", "temperature": 0}
    headers = {"X-Dynmerge-Unit": "u1"}
    reply = await client.post("/v1/experiments/tone/compare", json=body, headers=headers)
    assert reply.status_code == 200, reply.text
    rows = logged(lab)
    assert {row["kind"] for row in rows} == {"pair"}
    assert {row["pair"] for row in rows} == {reply.json()["id"]}
    assert sorted(row["position"] for row in rows) == [0, 1]
    assert {row["arm"] for row in rows} == {"A", "B"}
    assert {row["unit"] for row in rows} == {lab.log.hashed("u1")}
    assert len({seen["model"] for seen in server.seen}) == 2


async def test_a_merge_of_one_answer_that_fails_does_not_say_which(
    client: httpx.AsyncClient, server: EchoServer, vllm: EchoClient, lab: Lab
) -> None:
    lab.experiments.declare("dense", {"arms": {"linear": ARMS["A"], "ties": DENSE}})
    vllm.failing = "no memory"
    server.gate.clear()
    asking = client.post("/v1/experiments/dense/compare", json={"prompt": "a"})
    reply = await asyncio.wait_for(asking, 20)
    assert reply.status_code == 500
    assert "one of the two answers" in reply.json()["error"]["message"]
    statuses = {row["arm"]: row["status"] for row in logged(lab)}
    assert statuses == {"linear": 499, "ties": 500}
