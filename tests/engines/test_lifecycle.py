import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from dynmerge.adapters.base_model import BaseModel
from dynmerge.bank.bank import BaseIdentity
from dynmerge.bank.build import build_bank
from dynmerge.engines.engine import Chunk, Generation
from dynmerge.engines.transformers import TransformersEngine
from dynmerge.errors import (
    BankError,
    EngineDead,
    Overloaded,
    RequestError,
)
from tests.conftest import tiny_model
from tests.engines.conftest import (
    GREEDY,
    LONG,
    SMALL,
    Bench,
    answer,
    bench_of,
    prompt,
    until,
)


@pytest.fixture(scope="module")
def narrow(base_folder: Path) -> Iterator[Bench]:
    """Runs one request at a time and lets one wait."""
    config = replace(SMALL, max_batch=1, max_queue=1)
    made = bench_of(tiny_model(), AutoTokenizer.from_pretrained(base_folder), config)
    yield made
    made.engine.close()


async def test_a_client_that_leaves_frees_everything_running_or_queued(narrow: Bench) -> None:
    engine = narrow.engine
    async with aclosing(stream(engine, narrow.ask(prompt(40), LONG, ada=1.0))) as running:
        await anext(running)
        waiting = asyncio.create_task(answer(engine, narrow.ask(prompt(9), LONG, bob=1.0)))
        await until(lambda: (engine.load().running, engine.load().waiting) == (1, 1))
        assert engine.load().cache_usage > 0
        with pytest.raises(Overloaded):
            engine.check(narrow.ask(prompt(3)))
        with pytest.raises(Overloaded):
            await answer(engine, narrow.ask(prompt(3)))
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert engine.load().waiting == 0
    assert engine.load().running == 0
    await until(lambda: engine.load().cache_usage == 0)
    processor = engine._worker._manager.batch_processor
    assert not processor.scheduler.has_pending_requests()
    assert len((await answer(engine, narrow.ask(prompt(5), cyd=1.0))).ids) == GREEDY.max_tokens


@pytest.mark.parametrize("batching", ["continuous", "single"])
async def test_who_leaves_the_queue_is_counted_no_more(base_folder: Path, batching: str) -> None:
    config = replace(SMALL, max_batch=1, batching=batching)
    made = bench_of(tiny_model(), AutoTokenizer.from_pretrained(base_folder), config)
    engine = made.engine

    def busy() -> tuple[int, int]:
        return engine.load().running, engine.load().waiting

    async with aclosing(stream(engine, made.ask(prompt(9), LONG, ada=1.0))) as running:
        await anext(running)
        queued = [
            asyncio.create_task(answer(engine, made.ask(prompt(5 + i), GREEDY, bob=1.0)))
            for i in range(5)
        ]
        await until(lambda: busy() == (1, 5))
        for leaving in queued[::2]:
            leaving.cancel()
        await asyncio.gather(*queued[::2], return_exceptions=True)
        assert busy() == (1, 2)
    stayed = await asyncio.wait_for(asyncio.gather(*queued[1::2]), 30)
    assert [len(found.ids) for found in stayed] == [GREEDY.max_tokens] * 2
    assert busy() == (0, 0)
    engine.close()


def stream(engine: TransformersEngine, generation: Generation) -> AsyncIterator[Chunk]:
    return engine.generate(generation)


async def test_a_request_that_fails_fails_alone(bench: Bench) -> None:
    impossible = replace(GREEDY, allowed_token_ids=(5,), bad_words=((5, 5),))
    fine, failed = await asyncio.gather(
        answer(bench.engine, bench.ask(prompt(7), ada=1.0)),
        answer(bench.engine, bench.ask(prompt(7), impossible, ada=1.0)),
        return_exceptions=True,
    )
    assert isinstance(failed, RequestError)
    assert str(failed) == "after 1 tokens, allowed_token_ids and bad_words allow no other"
    assert not isinstance(fine, BaseException)
    assert fine.ids == (await answer(bench.engine, bench.ask(prompt(7), ada=1.0))).ids
    assert bench.engine.load().running == 0


async def test_a_dead_engine_is_restarted_once_and_then_given_up(base_folder: Path) -> None:
    made = bench_of(tiny_model(), AutoTokenizer.from_pretrained(base_folder), SMALL)
    engine, generation = made.engine, made.ask(prompt(7), ada=1.0)
    expected = await answer(engine, generation)
    embedding = made.model.get_input_embeddings()

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory, say")

    hook = embedding.register_forward_pre_hook(fail)
    assert (await answer(engine, generation)).last.finish_reason == "error"
    await until(lambda: not engine._worker.alive())
    hook.remove()
    assert (await answer(engine, generation)).ids == expected.ids  # restarted on demand
    assert engine.healthy()

    hook = embedding.register_forward_pre_hook(fail)
    assert (await answer(engine, generation)).last.finish_reason == "error"
    await until(lambda: not engine._worker.alive())
    assert not engine.healthy()  # and this restarts it
    await until(engine._worker.alive)
    assert (await answer(engine, generation)).last.finish_reason == "error"
    await until(lambda: not engine._worker.alive())
    with pytest.raises(EngineDead):
        await answer(engine, generation)
    assert not engine.healthy()
    engine.close()


async def test_close_aborts_what_runs_and_refuses_what_comes(base_folder: Path) -> None:
    made = bench_of(tiny_model(), AutoTokenizer.from_pretrained(base_folder), SMALL)
    running = made.engine.generate(made.ask(prompt(9), LONG, ada=1.0))
    await anext(running)
    await asyncio.to_thread(made.engine.close)
    rest = [chunk async for chunk in running]
    assert rest[-1].finish_reason == "abort"
    made.engine.close()
    assert not made.engine.healthy()
    with pytest.raises(EngineDead):
        await answer(made.engine, made.ask(prompt(9)))


def test_a_base_model_is_loaded_as_it_is(base_folder: Path, bench: Bench) -> None:
    base = BaseModel.open(base_folder)
    bank = build_bank(BaseIdentity("tiny", base.fingerprint), bench.adapters)
    engine = TransformersEngine.from_base(base, bank, SMALL)
    assert engine.dtype == torch.float32
    assert engine.device == torch.device("cpu")
    assert (engine.context_length, engine.vocabulary_size) == (512, 384)
    loaded = replace(bench, engine=engine, bank=bank)
    found = asyncio.run(answer(engine, loaded.ask(prompt(9), ada=1.0)))
    assert found.ids == asyncio.run(answer(bench.engine, bench.ask(prompt(9), ada=1.0))).ids
    engine.close()


def test_another_base_model_than_the_banks_is_refused(base_folder: Path, bench: Bench) -> None:
    with pytest.raises(BankError, match="another base model"):
        TransformersEngine.from_base(BaseModel.open(base_folder), bench.bank, SMALL)


def test_a_process_that_forgets_to_close_still_ends(base_folder: Path) -> None:
    script = f"""
import asyncio, torch
torch.set_num_threads(1)
from transformers import AutoTokenizer
from tests.conftest import tiny_model
from tests.engines.conftest import LONG, SMALL, bench_of, prompt

bench = bench_of(tiny_model(), AutoTokenizer.from_pretrained({str(base_folder)!r}), SMALL)

async def begin():
    chunks = bench.engine.generate(bench.ask(prompt(9), LONG, ada=1.0))
    print((await anext(chunks)).finish_reason)

asyncio.run(begin())
"""
    ended = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (0, "None\n"), ended.stderr
