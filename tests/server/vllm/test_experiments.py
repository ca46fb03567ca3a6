"""What the middleware does for experiments: arms in, what became of them out, whatever happens."""

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
