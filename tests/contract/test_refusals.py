"""A wish that cannot be honoured is refused with its name, and the next request is fine."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.contract.asking import HEADER, METHOD_HEADER, PRESET_HEADER, reply_to
from tests.server.asking import COMPLETION_PATH, refused


@pytest.fixture(autouse=True)
async def the_next_request_is_fine(client: httpx.AsyncClient) -> AsyncIterator[None]:
    yield
    reply = await reply_to(client, {HEADER: "ada"}, max_tokens=1)
    assert reply.headers["x-dynmerge-applied"] == "ada=1;source=header"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ada=0.7,,bob=1", "column 9"),
        ("ada=.5", "column 5"),
        ("Ada=1", "column 1"),
        ("ada=nan", "ada"),
        ('ada="0.7"', "not a number"),
        ("ada=(1 2)", "not a number"),
        ("ada=0.7654", "column"),
        ("ada=1e999", "column"),
        ("ada=0.7, ada=0.2", "twice"),
        ("ada=-0.5", "negative"),
        ("ada=3;raw", "within"),
        ("ada=1;rav", "rav"),
        ("eve=1", "known: ada, bob, cyd, dee"),
        ("eve=0", "eve"),
        ("ada=\xe9", "not ASCII"),
        ("", "names no skill"),
        (", ".join(f"s{index}=1" for index in range(1000)), "at most 256"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_bad_header_is_refused_with_its_name_and_place(
    client: httpx.AsyncClient, text: str, says: str, stream: bool
) -> None:
    headers = [(HEADER, text.encode("latin-1"))]
    error = await refused(client, headers=headers, stream=stream)  # type: ignore[arg-type]
    assert HEADER in error["message"]
    assert says in error["message"]
    assert (error["param"], error["type"]) == (HEADER, "BadRequestError")


@pytest.mark.parametrize(
    ("headers", "param"),
    [
        ({PRESET_HEADER: "nothing"}, PRESET_HEADER),
        ({METHOD_HEADER: "magic"}, METHOD_HEADER),
        ({METHOD_HEADER: "ties;sparsity=0.5"}, METHOD_HEADER),
        ({METHOD_HEADER: "ties;density=1.5"}, METHOD_HEADER),
        ({METHOD_HEADER: "lora-soups"}, METHOD_HEADER),
        ({"X-Dynmerge-Prefernce": "ada"}, "x-dynmerge-prefernce"),
    ],
)
async def test_other_headers_are_refused_by_their_names(
    client: httpx.AsyncClient, headers: dict[str, str], param: str
) -> None:
    error = await refused(client, headers=headers)
    assert error["param"] == param
    assert param in error["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"preference": {"eve": 1}}, "preference"),
        ({"preference": {}}, "preference"),
        ({"preference": {"ada": "much"}}, "preference"),
        ({"preference": {"ada": None}}, "preference"),
        ({"preference": {"ada": -1}}, "preference"),
        ({"preference": {"ada": 2.5}, "normalize": False}, "preference"),
        ({"preference": "ada=0.7,,bob=1"}, "preference"),
        ({"preference": 5}, "body.preference"),
        ({"preference": "ada=0.5;raw", "normalize": True}, "normalize"),
        ({"normalize": False}, "normalize"),
        ({"preset": "nothing"}, "preset"),
        ({"method": "magic"}, "method"),
        ({"method": "linear;density=0.5"}, "method"),
        ({"lora": []}, "lora"),
        ({"lora": [{"id": 0, "scale": 1}]}, "lora"),
        ({"vllm_xargs": {"preference": 1}}, "vllm_xargs.preference"),
        ({"model": "tiny@eve"}, "model"),
        ({"model": "tiny@"}, "model"),
        ({"model": "tiny@ada=0.7,,"}, "model"),
        ({"model": "tiny@ada=1\r\nX: y"}, "model"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", COMPLETION_PATH])
async def test_a_bad_body_is_refused_with_its_field(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], param: str
) -> None:
    error = await refused(client, path=path, **body)
    assert error["param"].startswith(param)
    assert param.rsplit(".", maxsplit=1)[-1] in error["message"]


@pytest.mark.parametrize("model", ["other", "other@ada", "ada@bob", "Tiny", "\x00"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", COMPLETION_PATH])
async def test_an_unknown_model_is_not_found_whether_streamed_or_not(
    client: httpx.AsyncClient, model: str, path: str
) -> None:
    for stream in (False, True):
        error = await refused(client, 404, path, model=model, stream=stream)
        assert (error["type"], error["param"]) == ("NotFoundError", "model")
        assert error["message"].startswith(f"The model `{model}` does not exist.")


async def test_a_refusal_makes_no_merge(client: httpx.AsyncClient) -> None:
    before = (await client.get("/v1/merges")).json()["cache"]["misses"]
    for _ in range(10):
        await refused(client, headers={HEADER: "ada=1, eve=0.5"})
    assert (await client.get("/v1/merges")).json()["cache"]["misses"] == before
