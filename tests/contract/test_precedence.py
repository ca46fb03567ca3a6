"""Which of several wishes counts: header over body over model name over the server's default."""

from typing import Any

import httpx
import pytest

from tests.contract.asking import HEADER, METHOD_HEADER, PRESET_HEADER, say
from tests.server.asking import refused


async def test_header_over_body_over_model_over_default(client: httpx.AsyncClient) -> None:
    model = {"model": "tiny@cyd"}
    body = {"preference": {"bob": 1}, **model}
    for headers, wish, text, source in (
        ({HEADER: "ada"}, body, "ada=1", "header"),
        ({PRESET_HEADER: "mixed"}, body, "ada=0.7, bob=0.3", "header"),
        ({}, body, "bob=1", "body"),
        ({}, model, "cyd=1", "model"),
        ({}, {}, "base=1", "default"),
    ):
        reply = await say(client, headers, **wish)
        assert (reply["dynmerge"]["text"], reply["dynmerge"]["source"]) == (text, source)
        assert reply["choices"] == (await say(client, {HEADER: text}))["choices"]


async def test_the_method_has_the_same_precedence_of_its_own(client: httpx.AsyncClient) -> None:
    preference = {"preference": {"ada": 1, "bob": 1}}
    both = await say(client, {METHOD_HEADER: "linear;scale=0.5"}, method="ties", **preference)
    assert both["dynmerge"]["method"] == "linear;p=1;scale=0.5"
    assert both["dynmerge"]["source"] == "body"
    for body in ({"method": "linear;scale=0.5"}, {"vllm_xargs": {"method": "linear;scale=0.5"}}):
        reply = await say(client, **body, **preference)
        assert reply["dynmerge"]["merge_id"] == both["dynmerge"]["merge_id"]
        assert reply["choices"] == both["choices"]


@pytest.mark.parametrize(
    ("headers", "body", "names"),
    [
        ({HEADER: "ada", PRESET_HEADER: "mixed"}, {}, (HEADER, PRESET_HEADER)),
        ({}, {"preference": {"ada": 1}, "preset": "mixed"}, ("preference", "preset")),
        ({}, {"preset": "mixed", "lora": [{"id": "ada", "scale": 1}]}, ("preset", "lora")),
        (
            {},
            {"preference": "ada", "vllm_xargs": {"preference": "ada"}},
            ("preference", "vllm_xargs.preference"),
        ),
        (
            {},
            {"method": "linear", "vllm_xargs": {"method": "linear"}},
            ("method", "vllm_xargs.method"),
        ),
    ],
)
async def test_saying_it_twice_at_one_level_is_refused_naming_both(
    client: httpx.AsyncClient, headers: dict[str, str], body: dict[str, Any], names: tuple[str, str]
) -> None:
    error = await refused(client, headers=headers, **body)
    for name in names:
        assert name in error["message"]


async def test_a_mistake_in_an_overridden_level_is_a_mistake(client: httpx.AsyncClient) -> None:
    headers = {HEADER: "ada"}
    assert (await refused(client, headers=headers, preference={"eve": 1}))["param"] == "preference"
    assert (await refused(client, headers=headers, model="tiny@eve"))["param"] == "model"
    assert (await refused(client, 404, headers=headers, model="other"))["param"] == "model"
    headers[METHOD_HEADER] = "linear"
    assert (await refused(client, headers=headers, method="magic"))["param"] == "method"
