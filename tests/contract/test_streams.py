"""A stream is the whole answer in pieces, under the same merge."""

import httpx
import pytest

from tests.contract.asking import GREEDY, HEADER, chunks_of, merge_of, reply_to, said, say
from tests.server.asking import COMPLETION_PATH, events, text_of

pytestmark = pytest.mark.oldest

PATHS = ["/v1/chat/completions", COMPLETION_PATH]
TEXT = "ada=0.2, cyd=0.8"


@pytest.mark.parametrize("path", PATHS)
async def test_a_stream_joins_to_the_whole(client: httpx.AsyncClient, path: str) -> None:
    whole = (await reply_to(client, {HEADER: TEXT}, path)).json()
    reply = await reply_to(client, {HEADER: TEXT}, path, stream=True)
    chunks = events(reply)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert "".join(map(text_of, choices)) == said(whole)
    assert [choice["finish_reason"] for choice in choices][-1] == "length"
    assert sum(choice["finish_reason"] is not None for choice in choices) == 1
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["model"] for chunk in chunks} == {whole["model"]}
    assert reply.headers["x-dynmerge-applied"] == f"{TEXT};source=header"
    assert reply.headers["x-dynmerge-merge-id"] == merge_of(whole)
    assert reply.headers["x-dynmerge-method"] == whole["dynmerge"]["method"]
    assert reply.headers["cache-status"] == "dynmerge; hit"


@pytest.mark.parametrize("path", PATHS)
async def test_the_last_chunk_says_what_was_applied_and_no_other_does(
    client: httpx.AsyncClient, path: str
) -> None:
    whole = (await reply_to(client, path=path, preference=TEXT)).json()
    for options in (None, {"include_usage": True}):
        more = {} if options is None else {"stream_options": options}
        chunks = await chunks_of(client, path=path, preference=TEXT, **more)
        assert [chunk for chunk in chunks if "dynmerge" in chunk] == chunks[-1:]
        assert (chunks[-1]["choices"] == []) is (options is not None)
        assert chunks[-1]["dynmerge"]["text"] == TEXT
        assert merge_of(chunks[-1]) == merge_of(whole)
    assert chunks[-1]["usage"]["completion_tokens"] == GREEDY["max_tokens"]


async def test_several_answers_in_one_stream_are_one_merge(client: httpx.AsyncClient) -> None:
    several = {"model": "bob", "n": 3, "temperature": 1, "seed": 3}
    whole = await say(client, **several)
    chunks = await chunks_of(client, **several)
    texts = ["", "", ""]
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += text_of(choice)
    assert texts == [text_of(choice) for choice in whole["choices"]]
    assert {chunk["model"] for chunk in chunks} == {"bob"}
    assert [merge_of(chunk) for chunk in chunks if "dynmerge" in chunk] == [merge_of(whole)]
