"""Two answers: what is asked of them, and what is told of one that fails."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from transformers import PreTrainedTokenizerFast

from dynmerge.engines.engine import Chunk, Generation
from dynmerge.errors import Overloaded
from dynmerge_server.config import ServerConfig
from tests.server.asking import CHAT
from tests.server.conftest import PRESETS
from tests.server.echo_engine import EchoEngine

COMPARE = "/v1/experiments/tone/compare"


class Halved(EchoEngine):
    """Has room for one arm only."""

    async def generate(self, generation: Generation) -> AsyncIterator[Chunk]:
        if generation.merge and "ada" in str(generation.merge.recipe.preference):
            raise Overloaded("there is no room for ada=1")
        async for chunk in super().generate(generation):
            yield chunk


@pytest.fixture
def engine(tokenizer: PreTrainedTokenizerFast) -> EchoEngine:
    return Halved(tokenizer)


@pytest.fixture
def config(tmp_path: Path) -> ServerConfig:
    return ServerConfig.load(presets=PRESETS, experiments={"log": {"path": tmp_path / "log"}})


@pytest.fixture(autouse=True)
def experiment(app: Starlette) -> None:
    arms = {"A": {"preference": "ada=1"}, "B": {"preference": "bob=1"}, "C": {}}
    app.state.lab.experiments.declare("tone", {"arms": arms})


async def test_two_answers_have_ids_of_their_own(client: httpx.AsyncClient) -> None:
    asked = {**CHAT, "arms": ["B", "C"], "reveal": True}
    refused = await client.post(COMPARE, json={**asked, "request_id": "mine"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "request_id")
    headers = {"X-Request-Id": "a-proxys"}
    reply = await client.post(COMPARE, json={**asked, "request_id": None}, headers=headers)
    ids = {answer["id"] for answer in reply.json()["answers"]}
    assert (len(ids), any("a-proxys" in each for each in ids)) == (2, False)


@pytest.mark.parametrize("reveal", [False, True])
async def test_one_that_fails_is_said_without_its_arm_and_ends_the_other(
    client: httpx.AsyncClient, engine: EchoEngine, reveal: bool
) -> None:
    engine.gate.clear()
    asking = client.post(COMPARE, json={**CHAT, "arms": ["A", "B"], "reveal": reveal})
    reply = await asyncio.wait_for(asking, 20)
    error = reply.json()["error"]
    assert (reply.status_code, error["type"]) == (503, "ServiceUnavailableError")
    assert ("ada" in reply.text) == reveal
    assert ("one of the two answers failed" in error["message"]) != reveal
    assert engine.running == 0
