"""What a reply says was applied: true, complete, and good enough to ask for the same again."""

import httpx
import pytest

from dynmerge_server.openai.requests import ChatRequest
from tests.server.asking import CHAT, chat, stream

HEADER = "X-Dynmerge-Preference"
SAID = ["ada=0.7, bob=0.3", "ada=1.2, cyd=0.4;raw", "base=1", "ada=0", "cyd", "ada=1, base=3"]


@pytest.mark.parametrize("text", SAID)
async def test_what_was_applied_fed_back_names_the_same_merge(
    client: httpx.AsyncClient, text: str
) -> None:
    first = await client.post(
        "/v1/chat/completions",
        json=CHAT,
        headers={HEADER: text, "X-Dynmerge-Method": "linear;scale=0.9"},
    )
    applied = first.headers["x-dynmerge-applied"].removesuffix(";source=header")
    block = first.json()["dynmerge"]
    by_header = await chat(
        client, {HEADER: applied, "X-Dynmerge-Method": first.headers["x-dynmerge-method"]}
    )
    own = [name for name in block if name in ChatRequest.model_fields]
    assert set(own) == {"preference", "normalize", "method"}
    by_body = await chat(client, **{name: block[name] for name in own})
    by_text = await chat(client, preference=block["text"], method=block["method"])
    for reply in (by_header, by_body, by_text):
        assert reply["dynmerge"]["merge_id"] == first.headers["x-dynmerge-merge-id"]
        assert reply["dynmerge"]["merge_id"] == block["merge_id"]


async def test_a_stream_says_what_was_applied_once(client: httpx.AsyncClient) -> None:
    plain = await stream(client, preference={"ada": 1})
    assert [chunk.get("dynmerge", {}).get("text") for chunk in plain[:-1]] == [None] * (
        len(plain) - 1
    )
    assert plain[-1]["dynmerge"]["text"] == "ada=1"
    assert plain[-1]["choices"][0]["finish_reason"] == "length"
    counted = await stream(client, preference={"ada": 1}, stream_options={"include_usage": True})
    assert counted[-1]["choices"] == []
    assert counted[-1]["dynmerge"]["text"] == "ada=1"
    assert not any("dynmerge" in chunk for chunk in counted[:-1])


async def test_the_reply_headers(client: httpx.AsyncClient) -> None:
    async def ask(text: str) -> httpx.Headers:
        reply = await client.post("/v1/chat/completions", json=CHAT, headers={HEADER: text})
        return reply.headers

    first, second, base = await ask("ada, bob"), await ask("ada=0.5, bob=0.5"), await ask("ada=0")
    assert first["cache-status"] == "dynmerge; fwd=miss; stored"
    assert second["cache-status"] == "dynmerge; hit"
    assert base["cache-status"] == "dynmerge; fwd=bypass"
    assert first["x-dynmerge-applied"] == "ada=0.5, bob=0.5;source=header"
    assert first["x-dynmerge-method"] == "linear;p=1;scale=1"
    assert first["x-dynmerge-merge-id"] == second["x-dynmerge-merge-id"]
    assert {part.split(";")[0] for part in first["server-timing"].split(", ")} == {
        "queue",
        "merge",
        "prefill",
    }
    assert HEADER in first["vary"]


@pytest.mark.parametrize(
    ("method", "energy"), [("ties;space=full;rank=1", (0.2, 0.999)), ("knots-ties", (1.0, 1.0))]
)
async def test_a_merge_that_left_the_shared_bases_says_its_rank_and_the_energy_it_kept(
    client: httpx.AsyncClient, method: str, energy: tuple[float, float]
) -> None:
    reply = await chat(client, {"X-Dynmerge-Method": method}, preference={"ada": 1, "bob": 1})
    block = reply["dynmerge"]
    assert energy[0] <= block["energy"] <= energy[1]
    assert block["rank"] == (1 if "rank" in method else 6)
    again = await chat(client, preference=block["text"], method=block["method"])
    assert (again["dynmerge"]["merge_id"], again["dynmerge"]["cache"]) == (block["merge_id"], "hit")
    assert "energy" not in (await chat(client, preference={"ada": 1}))["dynmerge"]


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("ties;density=0", "ties;density must lie within 0.001 .. 1, not 0"),
        ("ties;density=1.5", "ties;density must lie within 0.001 .. 1, not 1.5"),
        ("ties;space=latent", "ties;space is one of core|knots|full"),
        ("ties;rank=3", "rank=3 is for space=full"),
        ("lora-soups", "lora-soups needs learned weights"),
        ("tara", "no method 'tara' (known: linear"),
    ],
)
async def test_a_method_that_cannot_be_served_is_a_400_that_says_what_is_allowed(
    client: httpx.AsyncClient, method: str, says: str
) -> None:
    headers = {"X-Dynmerge-Method": method}
    refused = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
    body = await client.post("/v1/chat/completions", json={**CHAT, "method": method})
    for reply, param in ((refused, "X-Dynmerge-Method"), (body, "method")):
        assert reply.status_code == 400
        error = reply.json()["error"]
        assert says in error["message"]
        assert error["message"].startswith(f"{param}: ")
        assert error["param"] == param
    fine = {"X-Dynmerge-Method": "ties;density=0.001"}
    served = await client.post("/v1/chat/completions", json=CHAT, headers=fine)
    assert served.status_code == 200
