import re

import httpx

from dynmerge import __version__
from dynmerge.runtime import Runtime
from dynmerge_server.app import PLAYGROUND
from tests.server.asking import chat, stream


async def test_models_are_the_base_then_skills_then_presets(client: httpx.AsyncClient) -> None:
    data = (await client.get("/v1/models")).json()["data"]
    assert [card["id"] for card in data] == ["random", "ada", "bob", "cyd", "careful", "double"]
    assert data[0]["parent"] is None
    assert {card["parent"] for card in data[1:]} == {"random"}
    assert data[0]["max_model_len"] == 512
    assert all(card["object"] == "model" and card["root"] for card in data)


async def test_one_model_is_its_card(client: httpx.AsyncClient) -> None:
    for card in (await client.get("/v1/models")).json()["data"]:
        assert (await client.get(f"/v1/models/{card['id']}")).json() == card
    mixed = (await client.get("/v1/models/random@ada=0.5, bob=0.5")).json()
    assert (mixed["id"], mixed["parent"]) == ("random@ada=0.5, bob=0.5", "random")
    reply = await client.get("/v1/models/org/none")
    assert reply.status_code == 404
    error = reply.json()["error"]
    assert (error["code"], error["param"]) == (404, "model")
    assert error["reason"] == "model_not_found"
    assert "org/none" in error["message"]
    assert (await client.get("/v1/models/random@eve=1")).status_code == 400


async def test_presets_and_merges_are_listed(client: httpx.AsyncClient) -> None:
    presets = (await client.get("/v1/preferences/presets")).json()["data"]
    assert {preset["id"]: preset["text"] for preset in presets} == {
        "careful": "ada=0.75, bob=0.25",
        "double": "cyd=1",
    }
    first = await chat(client, preset="careful")
    second = await chat(client, preset="double")
    merges = (await client.get("/v1/merges")).json()
    assert [merge["id"] for merge in merges["data"]] == [
        second["dynmerge"]["merge_id"],
        first["dynmerge"]["merge_id"],
    ]
    assert merges["cache"]["misses"] == 2
    for number in range(150):
        await chat(
            client, preference={"ada": number / 1000, "bob": 1 - number / 1000}, max_tokens=1
        )
    assert len((await client.get("/v1/merges")).json()["data"]) == 100


async def test_probes(client: httpx.AsyncClient) -> None:
    health = await client.get("/health")
    assert (health.status_code, health.content) == (200, b"")
    for method in ("GET", "POST"):
        assert (await client.request(method, "/ping")).status_code == 200
    assert (await client.get("/version")).json() == {"version": __version__}
    assert (await client.get("/load")).json() == {"server_load": 0}


async def test_metrics_count_and_their_labels_stay_flat(
    client: httpx.AsyncClient, runtime: Runtime
) -> None:
    def series(text: str) -> set[str]:
        return {line.rpartition(" ")[0] for line in text.splitlines() if line[0] != "#"}

    before = (await client.get("/metrics")).text
    for name in (
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "request_queue_time",
    ):
        assert f"vllm:{name}" in before
    await chat(client, n=2, preference={"ada": 1})
    await stream(client, model="ada")
    first = (await client.get("/metrics")).text
    assert "vllm:generation_tokens_total{" in first
    assert float(re.findall(r"^vllm:generation_tokens_total\S* (\S+)", first, re.M)[0]) == 24
    assert 'vllm:request_success_total{finished_reason="length",model_name="random"} 3.0' in first
    assert 'running_lora_adapters="ada,bob,cyd"' in first
    assert 'dynmerge_requests_total{model_name="random",source="model"} 1.0' in first
    for number in range(1, 60):
        await chat(
            client, {"X-Request-Id": f"id-{number}"}, model=f"random@ada=1,bob=0.{number:03}"
        )
        await client.get(f"/nowhere/{number}")
    assert runtime.cache.stats().entries > 50
    assert series((await client.get("/metrics")).text) == series(first)


async def test_the_playground_asks_nobody_else(client: httpx.AsyncClient) -> None:
    page = await client.get("/playground/")
    assert page.status_code == 200
    assert "text/html" in page.headers["content-type"]
    for name in ("playground.js", "playground.css"):
        assert name in page.text
        assert (await client.get(f"/playground/{name}")).status_code == 200
    for file in PLAYGROUND.iterdir():
        assert not re.search(
            r"(https?:)?//[a-z]", re.sub(r"^\s*//.*|\s// .*", "", file.read_text())
        )
    assert (await client.get("/playground/../app.py")).status_code == 404
    assert (await client.get("/playground/%2e%2e/app.py")).status_code == 404
