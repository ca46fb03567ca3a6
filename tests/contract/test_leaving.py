"""A client that leaves takes nothing with it and leaves nothing behind."""

import asyncio
import time

import httpx
import pytest

from tests.contract.asking import GREEDY, said, say
from tests.contract.server import SLOTS
from tests.server.asking import CHAT, CHAT_PATH

pytestmark = pytest.mark.oldest

PATIENCE = 20  # seconds, of which a healthy server needs a fraction
LONG = {**CHAT, **GREEDY, "max_tokens": 450, "stream": True}


async def begin_and_leave(client: httpx.AsyncClient, preference: str) -> int:
    """Read the beginning of a long stream, and close the connection.

    Returns how many merges were held meanwhile.
    """
    body = {**LONG, "preference": preference}
    async with client.stream("POST", CHAT_PATH, json=body) as reply:
        assert reply.status_code == 200
        lines = reply.aiter_lines()  # kept: httpx closes the stream with its iterator
        assert (await anext(lines)).startswith("data: {")
        return await pinned(client)


async def pinned(client: httpx.AsyncClient) -> int:
    """How many merges are held by requests in flight."""
    return int((await client.get("/v1/merges")).json()["cache"]["pinned"])


async def wait_until_nothing_is_pinned(client: httpx.AsyncClient) -> None:
    deadline = time.monotonic() + PATIENCE
    while await pinned(client):
        assert time.monotonic() < deadline, "a merge is still pinned"
        await asyncio.sleep(0.05)


async def test_a_client_that_leaves_in_the_middle_of_a_stream_gives_its_merge_back(
    client: httpx.AsyncClient,
) -> None:
    before = await say(client, preference="ada=0.9, dee=0.1")
    assert await begin_and_leave(client, "ada=0.9, dee=0.1") >= 1
    await wait_until_nothing_is_pinned(client)
    assert said(await say(client, preference="ada=0.9, dee=0.1")) == said(before)


async def test_more_clients_than_slots_leave_at_once_and_the_next_are_served(
    client: httpx.AsyncClient,
) -> None:
    wishes = [f"ada={number}, bob={20 - number}" for number in range(1, 2 * SLOTS + 1)]
    # Not each of them: those admitted first may be answered whole before they hear what is held.
    assert max(await asyncio.gather(*(begin_and_leave(client, wish) for wish in wishes))) >= 1
    await wait_until_nothing_is_pinned(client)
    again = await asyncio.gather(*(say(client, preference=wish) for wish in wishes))
    assert len({reply["dynmerge"]["merge_id"] for reply in again}) == len(wishes)
