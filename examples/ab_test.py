"""A complete experiment: declared, served, judged by users, reported, and followed by the next one.

The users are simulated, and what they like is known: dictionary=0.6, cynic=0.4. The nearer the mix
that answered is to that, the more of them find it helpful. Everything else is real: the server, the
demo's adapters, the arms, the log and the statistics. It fails if the report finds anything else.

Usage: python examples/ab_test.py BANK [--page PAGE.html]
"""

import argparse
import asyncio
import random
import sys
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "dictionary"))

import httpx
from demo import served

from dynmerge.preference import Preference
from dynmerge_server.experiments.reading import open_readonly
from dynmerge_server.experiments.report.page import page
from dynmerge_server.experiments.report.report import report_of
from dynmerge_server.experiments.tune import propose

LIKED = 0.6  # how much of the dictionary, the rest cynic
USERS, VOTERS, AT_ONCE = 600, 60, 16
SETTINGS = """
[experiments]
file = "{folder}/experiments.toml"
[experiments.log]
path = "{folder}/experiments.sqlite"
"""
EXPERIMENTS = """
[experiments.voice]
primary = { outcome = "helpful" }
guardrails = [{ metric = { measure = "empty" }, at_most = 0.5 }]
[experiments.voice.arms]
plain = { preference = "dictionary=1" }
dry = { preference = "dictionary=0.5, cynic=0.5" }
bitter = { preference = "cynic=1" }
"""
REQUEST = {"messages": [{"role": "user", "content": "Define: money"}], "max_tokens": 2}


def main() -> None:
    """Run the experiment, and check what its report says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bank", type=Path)
    parser.add_argument("--page", type=Path, help="where the report's page is written")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "dynmerge.toml").write_text(SETTINGS.format(folder=folder))
        (folder / "experiments.toml").write_text(EXPERIMENTS)
        with served(options.bank, 0, "--config", str(folder / "dynmerge.toml")) as url:
            asyncio.run(serve_users(url))
        log = folder / "experiments.sqlite"
        check_report(log, options.page)
        check_proposals(log)


async def serve_users(url: str) -> None:
    """Everybody asks once and says whether that helped; some are shown two answers and choose."""
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        await all_of(USERS, lambda number: ask(client, f"user-{number}"))
        await all_of(VOTERS, lambda number: choose(client, f"voter-{number}"))


async def all_of(count: int, each: Callable[[int], Awaitable[None]]) -> None:
    """Do something `count` times, a few at once."""
    slots = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> None:
        async with slots:
            await each(number)

    await asyncio.gather(*map(one, range(count)))


async def ask(client: httpx.AsyncClient, user: str) -> None:
    """One user's request and feedback."""
    reply = await post(client, "/v1/chat/completions", REQUEST, user)
    helpful = random.Random(user).random() < likes(reply["dynmerge"])
    said = {"request_id": reply["id"], "name": "helpful", "value": helpful}
    await post(client, "/v1/feedback", said)


async def choose(client: httpx.AsyncClient, user: str) -> None:
    """One user's vote between two answers; who sees which is known to the simulation only."""
    asked = {**REQUEST, "reveal": True}
    found = await post(client, "/v1/experiments/voice/compare", asked, user)
    first, second = (likes(answer["dynmerge"]) for answer in found["answers"])
    better = random.Random(user).random() < first / (first + second)
    vote = {"request_id": found["id"], "name": "vote", "value": "first" if better else "second"}
    await post(client, "/v1/feedback", vote)


def likes(block: dict[str, Any]) -> float:
    """How likely somebody likes what the reply says was applied."""
    return 0.95 - abs(block["preference"].get("dictionary", 0.0) - LIKED)


async def post(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], unit: str | None = None
) -> dict[str, Any]:
    """What the server answers."""
    headers = {"X-Dynmerge-Unit": unit} if unit else {}
    reply = await client.post(path, json=body, headers=headers)
    reply.raise_for_status()
    content: dict[str, Any] = reply.json()
    return content


def check_report(log: Path, target: Path | None) -> None:
    """The arm that users like is found, and nothing is lost on the way."""
    found = report_of(log, "voice")
    print(found.verdict.text)
    for arm, units in zip(found.arms, found.units, strict=True):
        mean = next(each.mean for each in found.metrics[0].arms if each.arm == arm)
        print(f"  {arm:7} {units} users, {mean:.0%} of them helped")
    assert found.pairs is not None
    for strength in found.pairs.arms:
        print(f"  {strength.arm:7} wins {strength.wins:g} of {strength.comparisons} comparisons")
    if target is not None:
        target.write_text(page(found), encoding="utf-8")
        print(f"the report's page is {target}")
    assert sum(found.units) == USERS
    assert not found.sample_ratio.red
    assert found.verdict.better == ("dry",)


def check_proposals(log: Path) -> None:
    """What to try next is nearer to what users like than any arm was."""
    with closing(open_readonly(log)) as connection:
        found = propose(connection, "voice")
    print(found)
    shares = [weight(each.preference) for each in found.proposals]
    assert min(abs(share - LIKED) for share in shares) < abs(0.5 - LIKED)


def weight(preference: Preference) -> float:
    """How much of the dictionary."""
    return preference.weights.get("dictionary", 0.0)


if __name__ == "__main__":
    main()
