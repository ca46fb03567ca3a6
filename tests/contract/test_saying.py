"""Every way to say a preference is the same preference."""

from typing import Any

import httpx
import pytest

from tests.conftest import ADAPTERS
from tests.contract.asking import HEADER, PRESET_HEADER, merge_of, reply_to, said, say

TEXT = "ada=0.7, bob=0.3"

# Each way of saying: seven tenths ada, three tenths bob. In headers, in the body.
WAYS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "header, other order and zeros": ({HEADER: "bob=0.30,ada=0.700"}, {}),
    "header, not normalised": ({HEADER: "ada=7, bob=3"}, {}),
    "header, multipliers": ({HEADER: "ada=0.7;raw, bob=0.3"}, {}),
    "header, an unlisted skill": ({HEADER: "ada=0.7, bob=0.3, cyd=0"}, {}),
    "preset header": ({PRESET_HEADER: "mixed"}, {}),
    "body": ({}, {"preference": {"ada": 0.7, "bob": 0.3}}),
    "body, as text": ({}, {"preference": TEXT}),
    "body, multipliers": ({}, {"preference": {"bob": 0.3, "ada": 0.7}, "normalize": False}),
    "preset": ({}, {"preset": "mixed"}),
    "llama.cpp": ({}, {"lora": [{"id": "ada", "scale": 0.7}, {"id": "bob", "scale": 0.3}]}),
    "xargs": ({}, {"vllm_xargs": {"preference": TEXT}}),
    "xargs, preset": ({}, {"vllm_xargs": {"preset": "mixed"}}),
    "model": ({}, {"model": f"tiny@{TEXT}"}),
    "model at preset": ({}, {"model": "tiny@mixed"}),
    "preset as model": ({}, {"model": "mixed"}),
}


@pytest.mark.parametrize("way", WAYS)
async def test_every_way_of_saying_it_names_the_same_merge(
    client: httpx.AsyncClient, way: str
) -> None:
    headers, body = WAYS[way]
    plain, other = await say(client, {HEADER: TEXT}), await say(client, headers, **body)
    assert (merge_of(other), said(other)) == (merge_of(plain), said(plain))
    assert other["dynmerge"]["text"] == TEXT


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({HEADER: "cyd"}, {}),
        ({PRESET_HEADER: "careful"}, {}),
        ({}, {"preference": {"cyd": 1}}),
        ({}, {"model": "cyd"}),
        ({}, {"model": "tiny@cyd"}),
        ({}, {"model": "careful"}),
    ],
)
async def test_every_way_of_saying_one_skill_names_the_same_merge(
    client: httpx.AsyncClient, headers: dict[str, str], body: dict[str, Any]
) -> None:
    plain, other = await say(client, {HEADER: "cyd=1.0"}), await say(client, headers, **body)
    assert (merge_of(other), said(other)) == (merge_of(plain), said(plain))
    assert other["dynmerge"]["preference"] == {"cyd": 1}


async def test_a_preference_is_heard(client: httpx.AsyncClient) -> None:
    wishes = [{}, {"preset": "mixed"}, *({"preference": {skill: 1}} for skill in ADAPTERS)]
    replies = [await say(client, **wish) for wish in wishes]
    assert len({said(reply) for reply in replies}) == len(wishes)
    assert len({merge_of(reply) for reply in replies}) == len(wishes)


async def test_a_thousandth_more_is_another_merge(client: httpx.AsyncClient) -> None:
    texts = (TEXT, "ada=0.701, bob=0.299")
    assert len({merge_of(await say(client, {HEADER: text})) for text in texts}) == 2


async def test_repeated_header_lines_are_one_list(client: httpx.AsyncClient) -> None:
    reply = await reply_to(client, [(HEADER, "ada=0.7"), (HEADER, "bob=0.3")])
    assert reply.headers["x-dynmerge-applied"] == f"{TEXT};source=header"


@pytest.mark.parametrize("model", ["tiny", "ada", "mixed", "tiny@ada=1,bob=0.5"])
async def test_a_reply_names_the_model_as_it_was_asked_for(
    client: httpx.AsyncClient, model: str
) -> None:
    assert (await say(client, model=model))["model"] == model
    assert (await say(client, {HEADER: "bob"}, model=model))["model"] == model


async def test_completions_take_the_same_preferences(client: httpx.AsyncClient) -> None:
    path = "/v1/completions"
    by_header = (await reply_to(client, {HEADER: TEXT}, path=path)).json()
    by_body = (await reply_to(client, path=path, preference=TEXT)).json()
    by_model = (await reply_to(client, path=path, model="mixed")).json()
    replies = (by_header, by_body, by_model)
    assert len({(merge_of(reply), said(reply)) for reply in replies}) == 1
    assert merge_of(by_header) == merge_of(await say(client, preset="mixed"))
