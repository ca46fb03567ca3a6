from dataclasses import replace

import pytest

from dynmerge.engines.engine import Generation, Grammar
from dynmerge.engines.transformers import EngineConfig
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
