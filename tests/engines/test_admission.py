import asyncio
import threading
from dataclasses import replace

import pytest

from dynmerge.engines.engine import Generation, Grammar
from dynmerge.engines.transformers import EngineConfig
from dynmerge.engines.transformers import grammar as grammar_module
from dynmerge.engines.transformers.grammar import _reason, _source
from dynmerge.errors import (
    ConfigError,
    DynmergeError,
    PromptTooLong,
    RequestError,
)
from tests.engines.conftest import (
    GREEDY,
    Bench,
    answer,
    answers,
    prompt,
)


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


@pytest.mark.parametrize("count", [14, 100])  # llguidance gives the first up, the other never ends
def test_a_grammar_that_cannot_begin_is_refused_with_a_short_reason(
    bench: Bench, count: int
) -> None:
    words = " & ".join(f"/.*q{index:03}.*/" for index in range(count))
    grammar = Grammar("lark", f"start: A\nA: {words}")
    with pytest.raises(RequestError, match="not usable") as refused:
        bench.engine.check(bench.ask(prompt(3), replace(GREEDY, grammar=grammar)))
    assert refused.value.param == "structured_outputs"
    assert len(str(refused.value)) < 200


def test_a_reason_has_no_dump_and_no_endless_line() -> None:
    reason = _reason("at 1(8): no\n" + "x" * 9999 + "\n<state>\nsecret\n</state>")
    assert reason == "at 1(8): no\n" + "x" * 200


async def test_a_grammar_is_compiled_once_for_all_answers(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[int] = []

    def source(grammar: Grammar) -> str:
        compiled.append(threading.get_ident())
        return _source(grammar)

    monkeypatch.setattr(grammar_module, "_source", source)
    sampling = replace(GREEDY, grammar=Grammar("regex", "only here [ab]{3}"), ignore_eos=False)
    generation = bench.ask(prompt(3), sampling)
    await asyncio.to_thread(bench.engine.check, generation)
    one, other = await answers(bench.engine, [generation, generation])
    assert one.text == other.text
    assert len(compiled) == 1
    bench.engine._grammars._compiled.cache_clear()
    await answer(bench.engine, generation)
    assert len(compiled) == 2
    assert threading.get_ident() not in compiled


@pytest.mark.parametrize(
    "change",
    [
        {"allowed_token_ids": (2,), "min_tokens": 1, "ignore_eos": False},
        {"allowed_token_ids": (5,), "stop_token_ids": (5,), "min_tokens": 3},
        {"allowed_token_ids": (5, 6), "bad_words": ((5,), (6,))},
    ],
)
def test_a_choice_of_no_token_is_refused(bench: Bench, change: dict[str, object]) -> None:
    with pytest.raises(RequestError) as refused:
        bench.engine.check(bench.ask(prompt(3), replace(GREEDY, **change)))
    assert refused.value.param == "allowed_token_ids"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"min_tokens": 9, "ignore_eos": False}, "structured_outputs and min_tokens"),
        ({"allowed_token_ids": (300,)}, "after 0 tokens, structured_outputs and allowed_token_ids"),
    ],
)
async def test_a_grammar_that_ends_or_never_begins_is_the_callers_and_is_not_logged(
    bench: Bench, caplog: pytest.LogCaptureFixture, change: dict[str, object], says: str
) -> None:
    sampling = replace(GREEDY, grammar=Grammar("regex", "private"), **change)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=says):
        await answer(bench.engine, bench.ask(prompt(3), sampling))
    assert "failed: RequestError" in caplog.text
    assert "private" not in caplog.text


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


@pytest.mark.parametrize("words", [((),), ((3, 4), ())])
def test_a_bad_word_without_tokens_is_refused(
    bench: Bench, words: tuple[tuple[int, ...], ...]
) -> None:
    with pytest.raises(RequestError, match="at least one token") as refused:
        bench.engine.check(bench.ask(prompt(3), replace(GREEDY, bad_words=words)))
    assert refused.value.param == "bad_words"


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
