import httpx
import pytest

from tests.server.asking import COMPLETION_PATH, complete, refused, stream, text_of
from tests.server.echo_engine import EchoEngine


async def test_the_shape_of_a_reply(client: httpx.AsyncClient) -> None:
    reply = await complete(client)
    assert reply["id"].startswith("cmpl-")
    assert reply["object"] == "text_completion"
    assert reply["usage"]["completion_tokens"] == 8
    (choice,) = reply["choices"]
    assert choice["logprobs"] is None
    assert (await complete(client, max_tokens=None))["usage"]["completion_tokens"] == 16


async def test_several_prompts_and_answers_are_numbered_prompt_by_prompt(
    client: httpx.AsyncClient, engine: EchoEngine
) -> None:
    both = await complete(client, prompt=["one", "two"], n=2, seed=1)
    assert [choice["index"] for choice in both["choices"]] == [0, 1, 2, 3]
    assert [seen.prompt for seen in engine.seen].count(engine.seen[0].prompt) == 2
    alone = await complete(client, prompt="two", n=2, seed=1)
    assert [text_of(c) for c in both["choices"][2:]] == [text_of(c) for c in alone["choices"]]
    chunks = await stream(client, COMPLETION_PATH, prompt=["one", "two"], n=2, seed=1)
    streamed = ["", "", "", ""]
    for chunk in chunks:
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["text"]
    assert streamed == [text_of(choice) for choice in both["choices"]]


async def test_token_ids_are_a_prompt(client: httpx.AsyncClient, engine: EchoEngine) -> None:
    ids = (await client.post("/tokenize", json={"prompt": "hello"})).json()["tokens"]
    texts = {
        text_of((await complete(client, prompt=prompt))["choices"][0])
        for prompt in ("hello", ids, ["hello"], [ids])
    }
    assert len(texts) == 1
    assert engine.seen[0].prompt == tuple(ids)


async def test_echo_puts_the_prompt_first(client: httpx.AsyncClient) -> None:
    plain = await complete(client, prompt=["ab", "cd"])
    echoed = await complete(client, prompt=["ab", "cd"], echo=True)
    assert [text_of(choice) for choice in echoed["choices"]] == [
        prompt + text_of(choice)
        for prompt, choice in zip(("ab", "cd"), plain["choices"], strict=True)
    ]
    chunks = await stream(client, COMPLETION_PATH, prompt="ab", echo=True)
    assert chunks[0]["choices"][0]["text"] == "ab"
    ids = (await client.post("/tokenize", json={"prompt": "ab"})).json()["tokens"]
    alone = await complete(client, prompt=ids, echo=True, max_tokens=0)
    assert text_of(alone["choices"][0]) == "ab"
    assert alone["usage"]["completion_tokens"] == 0


async def test_logprobs_in_the_older_shape(client: httpx.AsyncClient) -> None:
    reply = await complete(client, logprobs=2, max_tokens=30)
    (choice,) = reply["choices"]
    logprobs = choice["logprobs"]
    assert {len(column) for column in logprobs.values()} == {30}
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert all(2 <= len(row) <= 3 for row in logprobs["top_logprobs"])
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert choice["text"][offset:].startswith(token)
    error = await refused(client, path=COMPLETION_PATH, logprobs=1, echo=True)
    assert error["param"] == "logprobs"


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (None, "must be provided and non-empty"),
        ("", "must be provided and non-empty"),
        ([], "must be provided and non-empty"),
        ([[]], "must be provided and non-empty"),
        (["a", ""], "must be provided and non-empty"),
        ([10**9], "out of vocabulary"),
        ([-1], "out of vocabulary"),
        ([[3], [-1]], "out of vocabulary"),
        (["a"] * 1025, "exceeds the maximum"),
    ],
)
async def test_prompts_that_are_none(client: httpx.AsyncClient, prompt: object, says: str) -> None:
    error = await refused(client, path=COMPLETION_PATH, prompt=prompt)
    assert says in error["message"]
    assert error["type"] == "BadRequestError"


async def test_many_prompts_run_a_few_at_a_time(
    client: httpx.AsyncClient, engine: EchoEngine
) -> None:
    engine.room = 32
    reply = await complete(client, prompt=["x"] * 200, max_tokens=2)
    assert len(reply["choices"]) == 200
    assert len({text_of(choice) for choice in reply["choices"]}) == 1


async def test_tokenize_and_back(client: httpx.AsyncClient) -> None:
    text = "héllo ☃ <|im_end|>"
    tokens = (await client.post("/tokenize", json={"prompt": text})).json()
    assert tokens["count"] == len(tokens["tokens"])
    assert tokens["max_model_len"] == 512
    back = await client.post("/detokenize", json={"tokens": tokens["tokens"], "model": "ada"})
    assert back.json() == {"prompt": text}
    chat = {"messages": [{"role": "user", "content": "hi"}], "return_token_strs": True}
    with_prompt = (await client.post("/tokenize", json=chat)).json()
    without = (await client.post("/tokenize", json={**chat, "add_generation_prompt": False})).json()
    assert with_prompt["count"] > without["count"]
    assert len(with_prompt["token_strs"]) == with_prompt["count"]
    for path, body in (
        ("/detokenize", {"tokens": [10**9]}),
        ("/detokenize", {"tokens": "x"}),
        ("/tokenize", {"prompt": 1}),
        ("/tokenize", {"messages": []}),
        ("/tokenize", {"prompt": "x", "padding": True}),
    ):
        assert (await client.post(path, json=body)).status_code == 400
    unknown = await client.post("/tokenize", json={"prompt": "x", "model": "other"})
    assert unknown.status_code == 404


async def test_invocations_take_either_body(client: httpx.AsyncClient) -> None:
    for body, kind in (
        ({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}, "chat.completion"),
        ({"prompt": "x", "max_tokens": 1}, "text_completion"),
    ):
        assert (await client.post("/invocations", json=body)).json()["object"] == kind
    assert (await client.post("/invocations", json={"x": 1})).status_code == 400


async def test_a_streams_first_choice_brings_its_prompt(client: httpx.AsyncClient) -> None:
    prompts = ["hello", "good day"]
    for more in ({}, {"echo": True}, {"echo": True, "max_tokens": 0}):
        asked = {"prompt": prompts, "n": 2, "return_token_ids": True, **more}
        whole = await complete(client, **asked)
        seen: set[int] = set()
        for chunk in await stream(client, "/v1/completions", **asked):
            for choice in chunk["choices"]:
                index = choice["index"]
                expected = whole["choices"][index]["prompt_token_ids"]
                assert choice.get("prompt_token_ids") == (None if index in seen else expected)
                seen.add(index)
        assert seen == {0, 1, 2, 3}
    plain = await stream(client, "/v1/completions")
    assert not any("prompt_token_ids" in choice for chunk in plain for choice in chunk["choices"])
