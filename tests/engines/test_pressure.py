"""A cache too small for what is asked, and clients that leave: nobody may wait for ever."""

import asyncio
import random
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from dynmerge.engines.transformers import EngineConfig
from tests.conftest import tiny_model
from tests.engines.conftest import GREEDY, Bench, answers, bench_of, prompt, until

SECONDS = 60  # a few are enough
CRAMPED = EngineConfig(device="cpu", max_batch=6, max_batch_tokens=16, cache_tokens=80)


@pytest.fixture
def cramped(base_folder: Path, request: pytest.FixtureRequest) -> Iterator[Bench]:
    config = replace(CRAMPED, cache_tokens=getattr(request, "param", CRAMPED.cache_tokens))
    made = bench_of(tiny_model(), AutoTokenizer.from_pretrained(base_folder), config)
    yield made
    made.engine.close()


@pytest.mark.parametrize(
    ("seed", "leaving", "count", "cramped"),
    [(1, 0.3, 24, 80), (2, 0.4, 12, 80)],
    indirect=["cramped"],
)
async def test_clients_that_leave_a_full_cache_hold_nobody_up(
    seed: int, leaving: float, count: int, cramped: Bench
) -> None:
    dice = random.Random(seed)
    room = cramped.engine.context_length
    done = 0

    async def visit(visitor: int) -> None:
        nonlocal done
        length = dice.randint(1, room - 5)
        tokens = dice.randint(1, room - length) if visitor % 7 else room - length
        patience = tokens // 2 if dice.random() < leaving else tokens
        sampling = replace(GREEDY, max_tokens=tokens, logprobs=None)
        asked = cramped.ask(prompt(length, visitor % 3), sampling, ada=1.0)
        received = 0
        async with aclosing(cramped.engine.generate(asked)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                received += len(chunk.tokens)
                if patience < received < tokens:
                    break
        assert received in (patience + 1, tokens)
        done += 1

    visitors = [visit(visitor) for visitor in range(count)]
    await asyncio.wait_for(asyncio.gather(*visitors), SECONDS)
    assert done == count
    await until(lambda: cramped.engine.load().cache_usage == 0)
    assert (cramped.engine.load().running, cramped.engine.load().waiting) == (0, 0)


async def test_stop_strings_in_a_full_cache_hold_nobody_up(cramped: Bench) -> None:
    sampling = replace(
        GREEDY, max_tokens=60, logprobs=None, temperature=1.0, stop=("a", "e", "q", "x", "s")
    )
    asked = [
        cramped.ask(prompt(5 + i % 9, i), replace(sampling, seed=i), ada=1.0) for i in range(60)
    ]
    found = await asyncio.wait_for(answers(cramped.engine, asked), SECONDS)
    assert {one.last.finish_reason for one in found} <= {"stop", "length"}
    await asyncio.wait_for(answers(cramped.engine, [cramped.ask(prompt(3))]), SECONDS)
