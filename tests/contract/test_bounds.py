"""Nothing that a server keeps or shows grows with the number of preferences it has met."""

import asyncio

import httpx

from tests.contract.asking import merge_of, say
from tests.contract.server import SLOTS


async def shown(client: httpx.AsyncClient) -> tuple[int, int]:
    """How many models are listed, and how many lines /metrics has."""
    models = (await client.get("/v1/models")).json()["data"]
    return len(models), len((await client.get("/metrics")).text.splitlines())


async def merges_of(client: httpx.AsyncClient, numbers: range) -> set[str]:
    """Ask for one preference per number, a few at a time; the merges that answered."""
    merges: set[str] = set()
    for start in range(0, len(numbers), SLOTS):
        wishes = (
            {"bob": number / 1000, "cyd": 1 - number / 1000}
            for number in numbers[start : start + SLOTS]
        )
        asked = (say(client, preference=wish, max_tokens=1) for wish in wishes)
        merges |= {merge_of(reply) for reply in await asyncio.gather(*asked)}
    return merges


async def test_hundreds_of_preferences_grow_nothing(client: httpx.AsyncClient) -> None:
    merges = await merges_of(client, range(1, 51))
    await shown(client)  # looking at it may be counted, which makes a line
    early = await shown(client)
    merges |= await merges_of(client, range(51, 301))
    assert await shown(client) == early
    assert len(merges) == 300
    metrics = (await client.get("/metrics")).text
    assert not any(merge in metrics for merge in merges)


async def test_more_preferences_at_once_than_there_are_slots_are_all_served(
    client: httpx.AsyncClient,
) -> None:
    wishes = [f"tiny@ada={number},dee={50 - number}" for number in range(1, 3 * SLOTS + 1)]
    alone = [await say(client, model=wish) for wish in wishes]
    together = await asyncio.gather(*(say(client, model=wish) for wish in wishes))
    assert [reply["choices"] for reply in together] == [reply["choices"] for reply in alone]
    assert [merge_of(reply) for reply in together] == [merge_of(reply) for reply in alone]


async def test_equal_cold_preferences_at_once_are_one_merge(client: httpx.AsyncClient) -> None:
    before = (await client.get("/v1/merges")).json()["cache"]["misses"]
    wish = {"preference": {"cyd": 0.111, "dee": 0.889}, "max_tokens": 1}
    replies = await asyncio.gather(*(say(client, **wish) for _ in range(40)))
    outcomes = [reply["dynmerge"]["cache"] for reply in replies]
    assert outcomes.count("stored") == 1
    assert set(outcomes) <= {"stored", "collapsed", "hit"}
    assert (await client.get("/v1/merges")).json()["cache"]["misses"] == before + 1
