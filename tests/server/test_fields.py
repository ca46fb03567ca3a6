import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from dynmerge_server.openai.fields import HARMLESS, REFUSED
from dynmerge_server.openai.requests import ChatRequest, CompletionRequest
from tests.server.asking import COMPLETION_PATH, chat, refused
from tests.server.echo_engine import EchoEngine

CONTRACT = Path(__file__).parents[3] / "shared" / "conformance" / "vllm_0.33.0_openapi.json"


@pytest.mark.skipif(not CONTRACT.exists(), reason=f"vLLM's contract is not at {CONTRACT}")
@pytest.mark.parametrize("model", [ChatRequest, CompletionRequest])
def test_every_field_of_vllm_is_offered_harmless_or_refused_with_a_reason(model: type) -> None:
    schemas = json.loads(CONTRACT.read_text())["components"]["schemas"]
    known = set(schemas[model.__name__.replace("Chat", "ChatCompletion")]["properties"])
    both = set(ChatRequest.model_fields) | set(CompletionRequest.model_fields)
    assert known - both - HARMLESS - set(REFUSED) == set()


def test_no_field_has_two_fates() -> None:
    offered = set(ChatRequest.model_fields) | set(CompletionRequest.model_fields)
    assert not offered & HARMLESS
    assert not offered & set(REFUSED)
    assert not HARMLESS & set(REFUSED)


@pytest.mark.parametrize("name", sorted(REFUSED))
async def test_a_refused_field_is_named_and_its_neutral_values_pass(
    client: httpx.AsyncClient, name: str
) -> None:
    error = await refused(client, **{name: {"some": "wish"}})
    assert error["param"] == name
    assert name in error["message"]
    for neutral in REFUSED[name].neutral:
        await chat(client, max_tokens=1, **{name: neutral})


async def test_neutral_is_not_what_merely_compares_equal(client: httpx.AsyncClient) -> None:
    await refused(client, priority=False)
    await refused(client, best_of=True)


async def test_harmless_fields_change_nothing(client: httpx.AsyncClient) -> None:
    plain = await chat(client)
    said = await chat(client, **dict.fromkeys(HARMLESS, "x"))
    assert said["choices"] == plain["choices"]


async def test_an_unknown_field_is_named(client: httpx.AsyncClient) -> None:
    assert (await refused(client, temprature=1))["param"] == "temprature"
    error = await refused(client, path=COMPLETION_PATH, messages=[])
    assert error["param"] == "messages"
    assert len((await refused(client, **{"x" * 10_000: 1}))["message"]) < 200


async def test_what_is_offered_reaches_the_engine(
    client: httpx.AsyncClient, engine: EchoEngine
) -> None:
    body: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
        "logit_bias": {"5": 400, "6": -1},
        "allowed_token_ids": [5, 6, 7],
        "bad_words": ["skill"],
        "seed": 11,
        "stop": ["x", "yy"],
        "stop_token_ids": [9],
        "min_tokens": 2,
        "max_tokens": 4,
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "logprobs": True,
        "top_logprobs": 2,
        "cache_salt": "x",
        "response_format": {"type": "json_object"},
    }
    await chat(client, **body)
    (seen,) = engine.seen
    sampling = seen.sampling
    for name in ("temperature", "top_p", "top_k", "min_p", "seed", "min_tokens", "max_tokens"):
        assert getattr(sampling, name) == body[name]
    assert sampling.presence_penalty == 0.2
    assert sampling.frequency_penalty == 0.3
    assert sampling.repetition_penalty == 1.1
    assert sampling.logit_bias == {5: 100, 6: -1}
    assert sampling.allowed_token_ids == (5, 6, 7)
    encode = engine.tokenizer.encode
    assert sampling.bad_words[0] == tuple(encode("skill", add_special_tokens=False))
    assert (sampling.stop, sampling.stop_token_ids) == (("x", "yy"), (9,))
    assert sampling.ignore_eos
    assert sampling.include_stop_str_in_output
    assert not sampling.skip_special_tokens
    assert sampling.logprobs == 2
    assert sampling.grammar is not None


async def test_defaults_are_vllms(client: httpx.AsyncClient, engine: EchoEngine) -> None:
    await chat(client, temperature=None, top_k=-1)
    (seen,) = engine.seen
    sampling = seen.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1, 1, 0, 0)
    assert sampling.grammar is None
    assert sampling.seed is None


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"bad_words": [""]}, "bad_words"),
        ({"stop_token_ids": ["x"]}, "stop_token_ids"),
        ({"temperature": "hot"}, "temperature"),
        ({"repetition_penalty": 1e300}, "repetition_penalty must be in [1e-06, 1e+06]"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty must be in [1e-06, 1e+06]"),
        ({"structured_outputs": {"choice": ["a"] * 100_000}}, "at most 10000 strings"),
        ({"structured_outputs": {"choice": ["a" * 999] * 999}}, "at most 131072 characters"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"$comment": "x" * 200_000}},
                }
            },
            "response_format takes a grammar of at most",
        ),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"logit_bias": {"1.5": 1}}, "1.5"),
        ({"logit_bias": {"9" * 30: 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "-1"),
        ({"allowed_token_ids": [10**6]}, "1000000"),
        ({"stream_options": {}}, "stream=True"),
        ({"messages": []}, "messages"),
        ({"n": 17}, "n must be at most 16"),
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        ({"response_format": {"type": "structural_tag"}}, "structural_tag"),
        ({"structured_outputs": {}}, "exactly one"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "exactly one"),
        ({"structured_outputs": {"json": "{"}}, "not a JSON schema"),
        ({"structured_outputs": {"json": "[]"}}, "not a JSON schema"),
        ({"structured_outputs": {"choice": []}}, "choice"),
        ({"structured_outputs": {"grammar": "bad"}}, "not usable"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structural_tag"),
        ({"structured_outputs": {"regx": "x"}}, "regx"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "both",
        ),
    ],
)
async def test_values_out_of_range_are_refused(
    client: httpx.AsyncClient, body: dict[str, Any], says: str
) -> None:
    assert says in (await refused(client, **body))["message"]
