import threading
from typing import Any

import httpx
import pytest

from tests.server.asking import (
    CHAT,
    CHAT_PATH,
    COMPLETION_PATH,
    chat,
    events,
    refused,
    stream,
    text_of,
)
from tests.server.echo_engine import CONTEXT, EchoEngine


async def test_the_shape_of_a_reply(client: httpx.AsyncClient) -> None:
    reply = await chat(client)
    assert reply["id"].startswith("chatcmpl-")
    assert (reply["object"], reply["model"]) == ("chat.completion", "random")
    (choice,) = reply["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"]
    assert (choice["index"], choice["finish_reason"], choice["stop_reason"]) == (0, "length", None)
    usage = reply["usage"]
    assert usage["completion_tokens"] == 8
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


async def test_a_stream_joins_to_the_whole(client: httpx.AsyncClient) -> None:
    body = {"max_tokens": 40, "seed": 3, "n": 3, "preference": {"ada": 1}}
    whole = await chat(client, **body)
    chunks = await stream(client, **body)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    for index, wanted in enumerate(whole["choices"]):
        own = [choice for choice in choices if choice["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(map(text_of, own)) == text_of(wanted)
        reasons = [choice["finish_reason"] for choice in own]
        assert reasons == [None] * (len(own) - 1) + ["length"]


async def test_answers_to_one_prompt_differ_by_their_seed(client: httpx.AsyncClient) -> None:
    three = await chat(client, n=3, seed=7)
    texts = [text_of(choice) for choice in three["choices"]]
    assert len(set(texts)) == 3
    assert text_of((await chat(client, seed=7))["choices"][0]) == texts[0]
    assert text_of((await chat(client, seed=8))["choices"][0]) == texts[1]
    await chat(client, n=2, seed=2**63 - 1)
    await chat(client, n=2, seed=-(2**63))


async def test_usage_in_streams(client: httpx.AsyncClient) -> None:
    assert not any("usage" in chunk for chunk in await stream(client))
    final = await stream(client, stream_options={"include_usage": True}, n=2)
    assert [bool(chunk.get("usage")) for chunk in final] == [False] * (len(final) - 1) + [True]
    assert final[-1]["choices"] == []
    assert final[-1]["usage"]["completion_tokens"] == 16
    every = await stream(
        client, stream_options={"include_usage": True, "continuous_usage_stats": True}
    )
    counts = [chunk["usage"]["completion_tokens"] for chunk in every]
    assert counts == sorted(counts)
    assert counts[-1] == 8


@pytest.mark.parametrize("body", [{}, {"preference": {"ada": 1}}])
async def test_logprobs_join_to_the_text(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    body = {**body, "logprobs": True, "top_logprobs": 2, "max_tokens": 60, "seed": 5}
    reply = await chat(client, **body)
    (choice,) = reply["choices"]
    rows = choice["logprobs"]["content"]
    assert len(rows) == 60
    assert "".join(row["token"] for row in rows) == choice["message"]["content"]
    assert (
        bytes(byte for row in rows for byte in row["bytes"]).decode(errors="replace")
        == (choice["message"]["content"])
    )
    assert all(row["logprob"] <= 0 and len(row["top_logprobs"]) == 2 for row in rows)
    chunks = await stream(client, **body)
    streamed = [
        row
        for chunk in chunks
        for each in chunk["choices"]
        for row in (each["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == rows


async def test_tokens_can_be_named_by_their_ids(client: httpx.AsyncClient) -> None:
    reply = await chat(
        client, logprobs=True, return_token_ids=True, return_tokens_as_token_ids=True
    )
    (choice,) = reply["choices"]
    names = [row["token"] for row in choice["logprobs"]["content"]]
    assert names == [f"token_id:{token}" for token in choice["token_ids"]]
    assert len(reply["prompt_token_ids"]) == reply["usage"]["prompt_tokens"]
    chunks = await stream(client, return_token_ids=True)
    streamed = [
        token
        for chunk in chunks
        for each in chunk["choices"]
        for token in each.get("token_ids", [])
    ]
    assert streamed == choice["token_ids"]


async def test_content_as_parts_is_the_same_prompt(
    client: httpx.AsyncClient, engine: EchoEngine
) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    await chat(client, messages=[{"role": "user", "content": "hel\nlo"}])
    await chat(client, messages=[{"role": "user", "content": parts}])
    assert engine.seen[0].prompt == engine.seen[1].prompt
    image = {"type": "image_url", "image_url": {"url": "http://x/y.png"}}
    error = await refused(client, messages=[{"role": "user", "content": [image]}])
    assert "image_url" in error["message"]
    assert error["param"] == "messages.0.content.0"


async def test_the_prompt_can_be_left_open_or_continued(
    client: httpx.AsyncClient, engine: EchoEngine
) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "well, "}]
    reply = await chat(
        client,
        messages=messages,
        add_generation_prompt=False,
        continue_final_message=True,
        echo=True,
        return_prompt_text=True,
    )
    assert reply["prompt_text"].rstrip().endswith("<|im_start|>assistant\nwell,")
    assert text_of(reply["choices"][0]).startswith("well, ")
    error = await refused(
        client, messages=messages, continue_final_message=True, add_generation_prompt=True
    )
    assert error["type"] == "BadRequestError"


async def test_past_tool_calls_and_unoffered_tools(client: httpx.AsyncClient) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    past = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
    ]
    await chat(client, messages=past)
    await chat(client, tools=[tool], tool_choice="none")
    for choice in ({}, {"tool_choice": "auto"}, {"tool_choice": "required"}):
        error = await refused(client, tools=[tool], **choice)
        assert error["param"] == "tools"
    assert (await refused(client, tools=[]))["param"] == "tools"
    assert (await refused(client, tool_choice="auto"))["param"] == "tool_choice"
    call["function"]["arguments"] = "{"  # type: ignore[index]
    await refused(client, messages=past)


async def test_template_trouble_is_the_callers(
    client: httpx.AsyncClient, engine: EchoEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    await chat(client, chat_template_kwargs={"enable_thinking": False}, reasoning_effort="low")
    for reserved in ("chat_template", "tokenize", "messages", "tools"):
        error = await refused(client, chat_template_kwargs={reserved: "x"})
        assert reserved in error["message"]
    assert (await refused(client, chat_template="{{ 1 }}"))["param"] == "chat_template"
    monkeypatch.setattr(engine.tokenizer, "chat_template", "{{ raise_exception('no system') }}")
    assert "no system" in (await refused(client))["message"]
    monkeypatch.setattr(engine.tokenizer, "chat_template", "{{ 1 / 0 }}")
    assert "template" in (await refused(client))["message"]
    monkeypatch.setattr(engine.tokenizer, "chat_template", None)
    assert "no chat template" in (await refused(client))["message"]


async def test_the_context_is_a_limit_that_clients_recognise(client: httpx.AsyncClient) -> None:
    long = [{"role": "user", "content": "hello " * 200_000}]
    for body in ({"messages": long}, {"messages": [{"role": "user", "content": "hello " * 400}]}):
        error = await refused(client, **body)
        assert error["message"].startswith(
            f"This model's maximum context length is {CONTEXT} tokens. However, "
        )
        assert error["reason"] == "context_length_exceeded"
    assert (await refused(client, max_tokens=CONTEXT))["reason"] == "context_length_exceeded"
    error = await refused(client, max_tokens=CONTEXT + 1)
    assert "cannot be greater than max_model_len" in error["message"]


async def test_without_max_tokens_the_context_is_filled(
    client: httpx.AsyncClient, engine: EchoEngine
) -> None:
    reply = await chat(client, max_tokens=None)
    assert reply["usage"]["total_tokens"] == CONTEXT
    await refused(client, max_tokens=None, min_tokens=CONTEXT)


async def test_prompts_can_be_cut(client: httpx.AsyncClient, engine: EchoEngine) -> None:
    long = [{"role": "user", "content": "hello " * 400}]
    await chat(client, messages=long, truncate_prompt_tokens=20)
    await chat(client, messages=long, truncate_prompt_tokens=20, truncation_side="right")
    await chat(client, messages=long, truncate_prompt_tokens=-1, max_tokens=1)
    left, right, most = (seen.prompt for seen in engine.seen)
    assert (len(left), len(right), len(most)) == (20, 20, CONTEXT - 1)
    assert left == most[-20:]
    assert right != left
    assert (await refused(client, truncate_prompt_tokens=0))["param"] == "truncate_prompt_tokens"


async def test_request_ids_are_echoed_or_refused(client: httpx.AsyncClient) -> None:
    reply = await client.post("/v1/chat/completions", json=CHAT, headers={"X-Request-Id": "a-1"})
    assert reply.json()["id"] == "chatcmpl-a-1"
    assert reply.headers["x-request-id"] == "a-1"
    assert (await chat(client, request_id="b.2"))["id"] == "chatcmpl-b.2"
    for wrong in ("x\r\nSet-Cookie: a=b", "", "x" * 129, "é"):
        assert (await refused(client, request_id=wrong))["param"] == "request_id"


async def test_an_overloaded_or_dead_engine_is_told_before_a_stream_begins(
    client: httpx.AsyncClient, engine: EchoEngine
) -> None:
    engine.room = 0
    for more in ({}, {"stream": True}):
        reply = await client.post("/v1/chat/completions", json={**CHAT, **more})
        assert reply.status_code == 503
        assert reply.headers["retry-after"] == "1"
        assert "queue is full" in reply.json()["error"]["message"]
    engine.dead = True
    assert (await client.get("/health")).status_code == 503
    assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 503


async def test_a_failure_is_an_error_without_secrets(
    client: httpx.AsyncClient, engine: EchoEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.fail_after = 0
    reply = await client.post("/v1/chat/completions", json=CHAT)
    assert reply.status_code == 500
    assert reply.json()["error"]["type"] == "InternalServerError"
    engine.fail_after = 3
    reply = await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
    assert reply.status_code == 200
    *chunks, last = events(reply)
    assert any(text_of(choice) for chunk in chunks for choice in chunk["choices"])
    assert last["error"]["code"] == 500
    assert "secret" not in reply.text
    assert "0x7f00" not in reply.text
    assert engine.running == 0
    assert (await client.get("/load")).json() == {"server_load": 0}
    assert "secret" in caplog.text  # the log is where it belongs


async def test_a_text_too_large_to_tokenise_is_refused_though_it_would_be_cut(
    client: httpx.AsyncClient,
) -> None:
    long = [{"role": "user", "content": "hello " * 200_000}]
    for path, body in (
        (CHAT_PATH, {"messages": long, "truncate_prompt_tokens": 20}),
        (COMPLETION_PATH, {"prompt": "hello " * 200_000, "truncate_prompt_tokens": 20}),
        ("/tokenize", {"prompt": "hello " * 200_000}),
        ("/tokenize", {"messages": long}),
    ):
        reply = await client.post(path, json=body)
        assert reply.status_code == 400
        assert "bytes, of which at most 1048576 are read" in reply.json()["error"]["message"]


@pytest.mark.parametrize("strings", [True, False])
async def test_token_strings_are_made_off_the_loop_and_only_on_demand(
    client: httpx.AsyncClient,
    engine: EchoEngine,
    monkeypatch: pytest.MonkeyPatch,
    strings: bool,
) -> None:
    threads = []
    convert = engine.tokenizer.convert_ids_to_tokens

    def noted(ids: list[int]) -> list[str]:
        threads.append(threading.current_thread().name)
        return convert(ids)

    monkeypatch.setattr(engine.tokenizer, "convert_ids_to_tokens", noted)
    reply = await client.post("/tokenize", json={"prompt": "hi", "return_token_strs": strings})
    assert (reply.json()["token_strs"] is not None) is strings
    assert [name.startswith("dynmerge-prompts") for name in threads] == [True] * strings


async def test_bad_words_are_tokenised_off_the_loop(
    client: httpx.AsyncClient, engine: EchoEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []
    encode = engine.tokenizer.encode

    def noted(text: str, **options: bool) -> list[int]:
        threads.append(threading.current_thread().name)
        return encode(text, **options)  # type: ignore[no-any-return]

    monkeypatch.setattr(engine.tokenizer, "encode", noted)
    await chat(client, bad_words=["skill"])
    assert len(threads) == 3
    assert all(name.startswith("dynmerge-prompts") for name in threads)
