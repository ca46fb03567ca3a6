"""What a reply says was applied is true, and asks for the same again when it is fed back."""

import httpx
import pytest

from tests.contract.asking import HEADER, METHOD_HEADER, merge_of, reply_to, said, say

pytestmark = pytest.mark.oldest

OURS = ("preference", "normalize", "method")
SAID = [
    ("ada=0.6, bob=0.4", "linear;scale=0.9"),
    ("ada=1.2, cyd=0.4;raw", "linear"),
    ("ada=1, bob=-0.5;raw", "linear"),
    ("ada=0.6, bob=0.4", "ties"),
    ("ada=1.2, dee=-0.4;raw", "knots-ties"),
    ("base=1", "ties"),
    ("dee=1", "linear"),
]


@pytest.mark.parametrize(("text", "method"), SAID)
async def test_what_was_applied_fed_back_is_the_same_merge(
    client: httpx.AsyncClient, text: str, method: str
) -> None:
    first = await reply_to(client, {HEADER: text, METHOD_HEADER: method})
    block = first.json()["dynmerge"]
    assert first.headers["x-dynmerge-merge-id"] == block["merge_id"]
    applied = first.headers["x-dynmerge-applied"]
    assert applied == f"{block['text']};source=header"
    headers = {
        HEADER: applied.removesuffix(";source=header"),
        METHOD_HEADER: first.headers["x-dynmerge-method"],
    }
    for again in (
        await say(client, headers),
        await say(client, **{name: block[name] for name in OURS}),
        await say(client, preference=block["text"], method=block["method"]),
    ):
        assert merge_of(again) == block["merge_id"]
        assert said(again) == said(first.json())


async def test_the_block_says_all_that_determines_the_merge(client: httpx.AsyncClient) -> None:
    block = (await say(client, preference={"ada": 3, "bob": 1}))["dynmerge"]
    merges = (await client.get("/v1/merges")).json()["data"]
    (bank,) = {merge["bank"] for merge in merges if merge["id"] == block["merge_id"]}
    assert block.pop("cache") in ("stored", "hit")
    assert block.pop("merge_id")
    assert block == {
        "preference": {"ada": 0.75, "bob": 0.25},
        "normalize": True,
        "text": "ada=0.75, bob=0.25",
        "method": "linear;p=1;scale=1",
        "bank": bank,
        "source": "body",
    }


async def test_the_cache_is_told_of_in_words_and_headers(client: httpx.AsyncClient) -> None:
    # No other test asks for this merge.
    first = await reply_to(client, {HEADER: "ada=0.123, bob=0.877"})
    second = await reply_to(client, {HEADER: "ada=0.123, bob=0.877"})
    base = await reply_to(client, {HEADER: "ada=0"})
    for reply, word, status in (
        (first, "stored", "dynmerge; fwd=miss; stored"),
        (second, "hit", "dynmerge; hit"),
        (base, "base", "dynmerge; fwd=bypass"),
    ):
        assert reply.json()["dynmerge"]["cache"] == word
        assert reply.headers["cache-status"] == status
    assert first.headers["x-dynmerge-method"] == "linear;p=1;scale=1"
    assert HEADER in first.headers["vary"]
