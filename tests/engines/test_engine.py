import asyncio
import hashlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from dynmerge.engines.engine import Chunk, Generation, Grammar, Sampling
from dynmerge.engines.transformers import EngineConfig, TransformersEngine
from dynmerge.errors import (
    BaseModelError,
    ConfigError,
    DynmergeError,
    EngineDead,
    Overloaded,
    PromptTooLong,
    RequestError,
)
from tests.conftest import tiny_model
from tests.engines.conftest import GREEDY, SMALL, Answer, Bench, answer, answers, bench_of

# Eight merges and the base model; prompts longer than a step (24 tokens) are taken in pieces.
ASKED: list[tuple[int, dict[str, float]]] = [
    (5, {"ada": 1.0}),
    (61, {"bob": 1.0}),
    (9, {"cyd": 1.0}),
    (17, {"ada": 0.5, "bob": 0.5}),
    (33, {"ada": 0.2, "bob": 0.3, "cyd": 0.5}),
    (1, {"bob": 0.9, "cyd": 0.1}),
    (26, {"ada": -0.4, "cyd": 0.8}),
    (12, {"ada": 1.5, "bob": -1.0}),
    (40, {}),
]
LONG = replace(GREEDY, max_tokens=400, logprobs=None)


def prompt(length: int, start: int = 0) -> list[int]:
    return [3 + (start + 7 * i * i + i) % 317 for i in range(length)]


def checksum(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def greedy_steps(
    model: nn.Module, ids: Sequence[int], tokens: int
) -> tuple[list[int], list[float]]:
    """The plain model, everything computed anew for each token."""
    sequence, logprobs = list(ids), []
    with torch.no_grad():
        for _ in range(tokens):
            row = torch.log_softmax(model(torch.tensor([sequence])).logits[0, -1], dim=-1)
            sequence.append(int(row.argmax()))
            logprobs.append(float(row.max()))
    return sequence[len(ids) :], logprobs


def logprobs(found: Answer) -> list[float]:
    return [token.logprob for token in found.tokens if token.logprob is not None]


async def until(condition: object) -> None:
    """Wait for something another thread does within a second."""
    for _ in range(200):
        if condition():  # type: ignore[operator]
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come to pass")


@pytest.fixture(scope="module")
def narrow(base_folder: Path) -> Iterator[Bench]:
    """Runs one request at a time and lets one wait."""
    config = replace(SMALL, max_batch=1, max_queue=1)
    made = bench_of(tiny_model(), AutoTokenizer.from_pretrained(base_folder), config)
    yield made
    made.engine.close()


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


@pytest.mark.parametrize(
    "grammar",
    [Grammar("json", '{"type":'), Grammar("regex", "[ab"), Grammar("lark", 'start: "a" b')],
)
def test_a_grammar_that_does_not_compile_is_refused_before_it_waits(
    bench: Bench, grammar: Grammar
) -> None:
    with pytest.raises(RequestError) as refused:
        bench.engine.check(bench.ask(prompt(3), replace(GREEDY, grammar=grammar)))
    assert refused.value.param == "structured_outputs"


@pytest.mark.parametrize("length", [501, 512, 4000])
async def test_a_prompt_that_does_not_fit_is_refused_and_harms_nobody(
    bench: Bench, length: int
) -> None:
    generation = bench.ask(prompt(length))
    sentence = r"^This model's maximum context length is 512 tokens\. However, .*reduce the length"
    with pytest.raises(PromptTooLong, match=sentence):
        bench.engine.check(generation)
    with pytest.raises(PromptTooLong, match=str(length)):
        await answer(bench.engine, generation)
    bench.engine.check(bench.ask(prompt(500)))
    assert len((await answer(bench.engine, bench.ask(prompt(500)))).ids) == GREEDY.max_tokens


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"logit_bias": {384: 1.0}}, "logit_bias"),
        ({"allowed_token_ids": (3, -1)}, "allowed_token_ids"),
        ({"bad_words": ((3, 400),)}, "bad_words"),
        ({"stop_token_ids": (384,)}, "stop_token_ids"),
    ],
)
def test_token_ids_the_model_does_not_have_are_refused(
    bench: Bench, change: dict[str, object], param: str
) -> None:
    with pytest.raises(RequestError, match="out of vocabulary") as refused:
        bench.engine.check(bench.ask(prompt(3), replace(GREEDY, **change)))
    assert refused.value.param == param


@pytest.mark.parametrize("ids", [(3, 384), (-1, 3), ()])
def test_prompts_the_model_cannot_read_are_refused(bench: Bench, ids: tuple[int, ...]) -> None:
    with pytest.raises(RequestError) as refused:
        bench.engine.check(Generation(ids, None, GREEDY))
    assert refused.value.param == "prompt"


async def test_a_merge_of_another_bank_is_an_error(bench: Bench) -> None:
    generation = bench.ask(prompt(3), ada=1.0)
    assert generation.merge is not None
    foreign = replace(generation.merge, recipe=replace(generation.merge.recipe, bank="f" * 64))
    with pytest.raises(DynmergeError, match="another bank"):
        await answer(bench.engine, replace(generation, merge=foreign))


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


def stream(engine: TransformersEngine, generation: Generation) -> AsyncIterator[Chunk]:
    return engine.generate(generation)


async def test_a_request_that_fails_fails_alone(bench: Bench) -> None:
    impossible = replace(GREEDY, allowed_token_ids=(5,), bad_words=((5,),))
    fine, failed = await answers(
        bench.engine,
        [bench.ask(prompt(7), ada=1.0), bench.ask(prompt(7), impossible, ada=1.0)],
    )
    assert (failed.last.finish_reason, failed.ids) == ("error", [])
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


def test_a_folder_is_loaded_as_it_is(base_folder: Path, bench: Bench) -> None:
    engine = TransformersEngine.from_folder(base_folder, bench.bank, SMALL)
    assert engine.dtype == torch.float32
    assert engine.device == torch.device("cpu")
    assert (engine.context_length, engine.vocabulary_size) == (512, 384)
    found = asyncio.run(answer(engine, bench.ask(prompt(9), ada=1.0)))
    assert found.ids == asyncio.run(answer(bench.engine, bench.ask(prompt(9), ada=1.0))).ids
    engine.close()


def test_a_folder_without_a_model_is_refused(tmp_path: Path, bench: Bench) -> None:
    with pytest.raises(BaseModelError):
        TransformersEngine.from_folder(tmp_path, bench.bank, SMALL)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float64"},
        {"device": "tpu"},
        {"batching": "static"},
        {"max_batch": 0},
        {"max_queue": "many"},
        {"cache_tokens": -5},
        {"threads": True},
        {"prefix_cache": 1},
        {"max_batch": 64, "max_batch_tokens": 32},
    ],
)
def test_a_configuration_out_of_range_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        EngineConfig(**change)  # type: ignore[arg-type]


def test_a_process_that_forgets_to_close_still_ends(base_folder: Path) -> None:
    script = f"""
import asyncio, torch
torch.set_num_threads(1)
from transformers import AutoTokenizer
from tests.conftest import tiny_model
from tests.engines.conftest import SMALL, bench_of
from tests.engines.test_engine import LONG, prompt

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
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (0, "None\n"), ended.stderr
