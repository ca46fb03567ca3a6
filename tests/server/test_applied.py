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
