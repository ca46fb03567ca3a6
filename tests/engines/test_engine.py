import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from dynmerge.engines.engine import Grammar, Sampling
from dynmerge.engines.transformers import EngineConfig
from dynmerge.engines.transformers.batching import ContinuousWorker
from tests.conftest import tiny_model
from tests.engines.conftest import (
    ASKED,
    GREEDY,
    LONG,
    SMALL,
    Bench,
    answer,
    answers,
    bench_of,
    check_batch,
    checksum,
    greedy_steps,
    logprobs,
    prompt,
    until,
)


async def test_each_of_a_batch_gets_what_it_gets_alone_and_what_its_merge_written_out_gives(
    bench: Bench,
) -> None:
    before = checksum(bench.model)
    asked = [bench.ask(prompt(length, length), **weights) for length, weights in ASKED]
    together = await answers(bench.engine, asked)
    for (length, weights), generation, found in zip(ASKED, asked, together, strict=True):
        alone = await answer(bench.engine, generation)
        assert alone.ids == found.ids
        assert logprobs(alone) == pytest.approx(logprobs(found), abs=1e-4)
        dense = bench.written_out(tiny_model(), **weights)
        ids, expected = greedy_steps(dense, prompt(length, length), GREEDY.max_tokens)
        assert found.ids == ids
        assert logprobs(found) == pytest.approx(expected, abs=1e-4)
        assert [token.top[0][0] for token in found.tokens] == ids
        assert all(len(token.top) == 3 for token in found.tokens)
        assert found.text == bench.engine.tokenizer.decode(ids)
        assert found.last.finish_reason == "length"
    assert checksum(bench.model) == before


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.3), (torch.float16, 0.05)], ids=str
)
async def test_half_precision_gives_the_same_up_to_its_rounding(
    dtype: torch.dtype, tolerance: float, base_folder: Path
) -> None:
    model = tiny_model().to(dtype)
    before = checksum(model)
    made = bench_of(model, AutoTokenizer.from_pretrained(base_folder), SMALL)
    assert isinstance(made.engine._worker, ContinuousWorker)
    assert made.engine.dtype == dtype
    await check_batch(made, tolerance)
    assert checksum(model) == before
    made.engine.close()


async def test_the_base_model_and_its_spelled_out_preference_are_the_base_model(
    bench: Bench,
) -> None:
    spelled = bench.ask(prompt(9), ada=0.0)
    silent = bench.ask(prompt(9))
    one, other = await answers(bench.engine, [spelled, silent])
    assert logprobs(one) == logprobs(other)
    assert one.ids == greedy_steps(tiny_model(), prompt(9), GREEDY.max_tokens)[0]


async def test_a_seed_gives_the_same_text_alone_and_in_a_batch(bench: Bench) -> None:
    sampling = replace(GREEDY, temperature=1.3, top_p=0.9, top_k=50)
    asked = [
        bench.ask(prompt(6 + place), replace(sampling, seed=place), ada=place / 8)
        for place in range(8)
    ]
    together = await answers(bench.engine, asked)
    alone = [await answer(bench.engine, generation) for generation in asked]
    assert [found.ids for found in alone] == [found.ids for found in together]
    other = await answer(bench.engine, bench.ask(prompt(13), replace(sampling, seed=9), ada=7 / 8))
    assert other.ids != together[7].ids


async def test_stop_strings_tokens_and_end_of_sequence(bench: Bench) -> None:
    engine = bench.engine
    whole = await answer(engine, bench.ask(prompt(8), bob=1.0))
    # A stop string that crosses from one token into the next.
    cut = next(i for i in range(2, 11) if (engine.tokenizer.decode(whole.ids[:i]) + "�")[-2] != "�")
    stop = engine.tokenizer.decode(whole.ids)[
        len(engine.tokenizer.decode(whole.ids[: cut - 1])) - 1 :
    ][:2]
    shown = whole.text[: whole.text.index(stop)]
    for include in (False, True):
        sampling = replace(GREEDY, stop=("never", stop), include_stop_str_in_output=include)
        found = await answer(engine, bench.ask(prompt(8), sampling, bob=1.0))
        assert found.text == shown + (stop if include else "")
        assert (found.last.finish_reason, found.last.stop_reason) == ("stop", stop)
        assert found.ids == whole.ids[: len(found.ids)]

    third = whole.ids[2]
    by_id = replace(GREEDY, stop_token_ids=(third,))
    found = await answer(engine, bench.ask(prompt(8), by_id, bob=1.0))
    assert (found.last.finish_reason, found.last.stop_reason) == ("stop", third)
    assert found.ids == whole.ids[: whole.ids.index(third) + 1]
    assert found.text == engine.tokenizer.decode(found.ids[:-1])

    eos = engine.tokenizer.eos_token_id
    ends = replace(GREEDY, ignore_eos=False, min_tokens=3, logit_bias={eos: 100.0})
    found = await answer(engine, bench.ask(prompt(8), ends, bob=1.0))
    assert (found.last.finish_reason, found.last.stop_reason) == ("stop", None)
    assert len(found.ids) == 4
    assert found.ids[-1] == eos
    on = replace(ends, ignore_eos=True, max_tokens=5)
    found = await answer(engine, bench.ask(prompt(8), on, bob=1.0))
    assert (found.ids[3:], found.last.finish_reason) == ([eos, eos], "length")


async def test_a_json_schema_gives_valid_json(bench: Bench) -> None:
    schema = {
        "type": "object",
        "properties": {"mix": {"enum": ["law", "sql"]}, "sure": {"type": "boolean"}},
        "required": ["mix", "sure"],
        "additionalProperties": False,
    }
    sampling = Sampling(
        max_tokens=200, temperature=1.0, seed=1, grammar=Grammar("json", json.dumps(schema))
    )
    plain = replace(GREEDY, max_tokens=30)
    asked = [
        bench.ask(prompt(9), sampling, ada=1.0),
        bench.ask(prompt(9), plain, bob=1.0),
        bench.ask(prompt(4), replace(sampling, grammar=Grammar("regex", "[ab]{3}c")), cyd=1.0),
    ]
    for generation in asked:
        bench.engine.check(generation)
    constrained, _, regex = await answers(bench.engine, asked)
    assert set(json.loads(constrained.text)) == {"mix", "sure"}
    assert constrained.last.finish_reason == "stop"
    assert len(regex.text) == 4
    assert regex.text.endswith("c")


async def test_the_prefix_cache_serves_one_merge_only(base_folder: Path) -> None:
    config = replace(SMALL, prefix_cache=True)
    made = bench_of(tiny_model(), AutoTokenizer.from_pretrained(base_folder), config)
    engine = made.engine
    shared = prompt(70)
    weights: list[dict[str, float]] = [{"ada": 1.0}, {"bob": 1.0}, {}, {"ada": 0.999}]
    for mix in weights:
        hits = engine.load().prefix_hits
        first = await answer(engine, made.ask(shared, **mix))
        assert engine.load().prefix_hits == hits  # others' keys and values are not for it
        again = await answer(engine, made.ask(shared, **mix))
        assert engine.load().prefix_hits == hits + 64
        dense = made.written_out(tiny_model(), **mix)
        assert first.ids == again.ids == greedy_steps(dense, shared, GREEDY.max_tokens)[0]
    # Cancelled in the middle of its prompt: what it leaves is under its own merge, not the base's.
    leaving = asyncio.create_task(answer(engine, made.ask(prompt(300, 5), cyd=1.0)))
    await until(lambda: engine.load().running == 1)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    found = await answer(engine, made.ask(prompt(300, 5)))
    assert found.ids == greedy_steps(tiny_model(), prompt(300, 5), GREEDY.max_tokens)[0]
    engine.close()


@pytest.mark.parametrize("batching", ["continuous", "single"])
async def test_more_requests_than_fit_are_preempted_or_wait_and_all_are_right(
    base_folder: Path, batching: str
) -> None:
    config = EngineConfig(
        device="cpu", max_batch=8, max_batch_tokens=24, cache_tokens=96, batching=batching
    )
    made = bench_of(tiny_model(), AutoTokenizer.from_pretrained(base_folder), config)
    sampling = replace(GREEDY, max_tokens=40, repetition_penalty=1.2)
    asked = [made.ask(prompt(20 + i, i), sampling, ada=i / 10, bob=0.4) for i in range(6)]
    together = await answers(made.engine, asked)
    for generation, found in zip(asked, together, strict=True):
        assert len(found.ids) == 40
        assert (await answer(made.engine, generation)).ids == found.ids
    made.engine.close()


async def test_one_at_a_time_gives_the_same_answers(bench: Bench, base_folder: Path) -> None:
    config = replace(SMALL, batching="single")
    made = bench_of(tiny_model(), AutoTokenizer.from_pretrained(base_folder), config)
    sampled = replace(GREEDY, temperature=1.0, seed=3)
    asked = [
        (prompt(length), sampling, weights)
        for (length, weights), sampling in zip(ASKED[3:7], [GREEDY, sampled] * 2, strict=True)
    ]
    found = await answers(made.engine, [made.ask(p, s, **w) for p, s, w in asked])
    expected = await answers(bench.engine, [bench.ask(p, s, **w) for p, s, w in asked])
    assert [one.ids for one in found] == [one.ids for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert logprobs(one) == pytest.approx(logprobs(other), abs=1e-4)
    leaving = made.engine.generate(made.ask(prompt(5), LONG, ada=1.0))
    await anext(leaving)
    await leaving.aclose()
    assert made.engine.load().running == 0
    assert len((await answer(made.engine, made.ask(prompt(5)))).ids) == GREEDY.max_tokens
    made.engine.close()
