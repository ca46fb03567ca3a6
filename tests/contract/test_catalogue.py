"""What there is to ask for, and how the server is."""

import httpx
import pytest

from tests.conftest import ADAPTERS
from tests.contract.asking import merge_of, say

pytestmark = pytest.mark.oldest

NAMES = ["tiny", *ADAPTERS, "careful", "mixed"]


async def test_models_are_the_base_then_skills_then_presets(client: httpx.AsyncClient) -> None:
    data = (await client.get("/v1/models")).json()["data"]
    assert [card["id"] for card in data] == NAMES
    assert data[0]["parent"] is None
    assert {card["parent"] for card in data[1:]} == {"tiny"}
    assert data[0]["max_model_len"] == 512
    assert all(card["object"] == "model" and card["root"] for card in data)


async def test_one_model_is_its_card(client: httpx.AsyncClient) -> None:
    for card in (await client.get("/v1/models")).json()["data"]:
        assert (await client.get(f"/v1/models/{card['id']}")).json() == card
    mixed = (await client.get("/v1/models/tiny@ada=0.5, bob=0.5")).json()
    assert (mixed["id"], mixed["parent"]) == ("tiny@ada=0.5, bob=0.5", "tiny")
    assert (await client.get("/v1/models/other")).json()["error"]["code"] == 404
    assert (await client.get("/v1/models/tiny@eve=1")).json()["error"]["code"] == 400


async def test_presets_are_listed(client: httpx.AsyncClient) -> None:
    presets = (await client.get("/v1/preferences/presets")).json()["data"]
    assert {preset["id"]: preset["text"] for preset in presets} == {
        "careful": "cyd=1",
        "mixed": "ada=0.7, bob=0.3",
    }


async def test_merges_are_listed_by_their_last_use(client: httpx.AsyncClient) -> None:
    asked = [await say(client, preference={name: 1}) for name in ("ada", "bob", "ada")]
    merges = (await client.get("/v1/merges")).json()
    listed = {merge["id"]: merge for merge in merges["data"]}
    assert list(listed)[:2] == [merge_of(asked[2]), merge_of(asked[1])]
    last = listed[merge_of(asked[2])]
    assert (last["preference"], last["method"]) == ("ada=1", "linear;p=1;scale=1")
    assert merges["cache"]["pinned"] == 0
    assert merges["cache"]["misses"] >= 1


@pytest.mark.parametrize("path", ["/health", "/ping", "/version", "/playground/"])
async def test_probes_and_pages(client: httpx.AsyncClient, path: str) -> None:
    reply = await client.get(path)
    assert reply.status_code == 200
    assert bool(reply.content) is (path not in ("/health", "/ping"))


async def test_metrics_count_requests_by_who_chose(client: httpx.AsyncClient) -> None:
    async def counted() -> float:
        text = (await client.get("/metrics")).text
        lines = [line for line in text.splitlines() if line.startswith("dynmerge_requests_total{")]
        return sum(float(line.split()[-1]) for line in lines if 'source="body"' in line)

    await say(client, preference={"ada": 1})
    before = await counted()
    await say(client, preference={"ada": 1})
    assert await counted() == before + 1
    text = (await client.get("/metrics")).text
    for name in ("num_requests_running", "generation_tokens_total", "lora_requests_info"):
        assert f"vllm:{name}" in text
