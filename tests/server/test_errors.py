import json
import time
from typing import Any

import httpx
import pytest

from dynmerge_server.errors import SchemaError
from dynmerge_server.json_body import parse
from tests.server.asking import CHAT, refused

JSON = {"Content-Type": "application/json"}


async def post(client: httpx.AsyncClient, content: bytes) -> dict[str, Any]:
    reply = await client.post("/v1/chat/completions", content=content, headers=JSON)
    assert reply.status_code == 400, reply.text
    return reply.json()["error"]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"model":',
        b'"text"',
        b"[1]",
        b"42",
        b"null",
        b"true",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"messages": [], "temperature": NaN}',
        b'{"messages": [], "temperature": 1e999}',
        b'{"messages": [], "temperature": -Infinity}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b'{"preference": {"ada": 1, "ada": 0.5}, "messages": []}',
        b"9" * 10_000,
    ],
)
async def test_what_is_not_strict_json_is_refused(
    client: httpx.AsyncClient, content: bytes
) -> None:
    error = await post(client, content)
    assert error["type"] == "Bad Request"
    assert len(error["message"]) < 500


def test_good_json_survives_unchanged() -> None:
    assert parse('{"a": [1, 2.5, "\\ud83d\\ude00é", null, true]}'.encode()) == {
        "a": [1, 2.5, "😀é", None, True]
    }
    with pytest.raises(SchemaError, match="twice"):
        parse(b'[{"x": {"y": 1, "y": 1}}]')


@pytest.mark.parametrize("media", ["text/plain", "application/x-www-form-urlencoded", None])
async def test_only_json_is_read(client: httpx.AsyncClient, media: str | None) -> None:
    headers = {"Content-Type": media} if media else {}
    reply = await client.post("/v1/chat/completions", content=b"{}", headers=headers)
    error = reply.json()["error"]
    assert (reply.status_code, error["type"]) == (400, "Bad Request")
    assert "Only 'application/json' is allowed" in error["message"]


async def test_schema_errors_name_the_field_and_stay_short(client: httpx.AsyncClient) -> None:
    error = await post(client, b"{}")
    assert error["param"] == "body.messages"
    long = await client.post("/v1/chat/completions", json={**CHAT, "max_tokens": "A" * 100_000})
    assert len(long.content) < 4000
    many = await client.post("/v1/chat/completions", json={"messages": [1] * 5000})
    assert len(many.content) < 4000
    wrong = ["n", "seed", "stop", "top_p", "top_k", "min_p", "stream", "max_tokens", "min_tokens"]
    wrong += ["temperature", "ignore_eos", "bad_words", "truncation_side"]
    error = await refused(client, **{name: {"x": 1} for name in wrong})
    assert error["message"].endswith(" more")
    assert error["message"].count("; ") == 10


async def test_unknown_paths_and_methods_have_the_error_form(client: httpx.AsyncClient) -> None:
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("XVULNCARD01", "/tokenize", 405),
        ("POST", "/v1/models", 405),
    ):
        reply = await client.request(method, path)
        assert reply.status_code == status
        assert reply.json()["error"]["code"] == status
    assert "XVULNCARD01" not in (await client.get("/metrics")).text


async def test_prompts_are_not_logged(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    messages = [{"role": "user", "content": "private words"}]
    with caplog.at_level("DEBUG"):
        await client.post("/v1/chat/completions", json={**CHAT, "messages": messages})
        await refused(client, messages=messages, temperature=-1)
    assert "private words" not in caplog.text


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [1] * 300_000},
        {"messages": [{"role": "u"}] * 100_000},
        {"messages": [], "stop_token_ids": ["x"] * 300_000},
        {"messages": [], "preference": dict.fromkeys(map("s{}".format, range(100_000)), 1)},
        {"messages": [], "preference": {"S" * 2_000_000: 1}},
        {"messages": [], "logit_bias": dict.fromkeys(map("s{}".format, range(100_000)), 1)},
        {"messages": [{"role": "u", "content": [1] * 300_000}]},
        {"messages": [], "model": "random@" + "x" * 2_000_000},
        {"messages": [], "x" * 2_000_000: 1},
    ],
    ids=range(9),
)
async def test_large_nonsense_is_refused_quickly_and_briefly(
    client: httpx.AsyncClient, body: dict[str, Any]
) -> None:
    content = json.dumps(body).encode()
    started = time.process_time()
    error = await post(client, content)
    assert time.process_time() - started < 2
    assert len(error["message"]) <= 4003


async def test_repeated_keys_among_many_are_found_quickly() -> None:
    keys = ", ".join(f'"k{number}": 1' for number in range(100_000))
    started = time.process_time()
    with pytest.raises(SchemaError, match="k99999"):
        parse(f'{{{keys}, "k99999": 1}}'.encode())
    assert time.process_time() - started < 3
