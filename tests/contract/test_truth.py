"""What is answered is what the merged weights say, to the fourth decimal of a log probability.

The oracle is transformers in float32 with the update written into the weights. The prompt is longer
than an engine's blocks of keys and values, and the same for all: a merge that read those of another
would not pass.
"""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from torch.testing import assert_close
from transformers import AutoTokenizer, PreTrainedModel

from dynmerge.merging.choice import parse_method
from dynmerge.merging.merge import merge
from dynmerge.preference import Preference
from dynmerge.recipe import Recipe
from tests.conftest import ADAPTERS
from tests.contract import oracle
from tests.contract.asking import ASKED_OF_ALL, complete, merge_of, said, say
from tests.contract.server import Served
from tests.merging.dense import written_out

pytestmark = pytest.mark.oldest

PROMPT = " ".join(f"{number} sheep jumped over the fence;" for number in range(8))
MIXES: Mapping[str, Mapping[str, float]] = {
    "ada=0.4, bob=0.1, cyd=0.2, dee=0.3": {"ada": 0.4, "bob": 0.1, "cyd": 0.2, "dee": 0.3},
    "base=0.5, bob=0.5": {"bob": 0.5},
    "ada=1.2, cyd=0.4;raw": {"ada": 1.2, "cyd": 0.4},
    "ada=0.5, bob=-0.7;raw": {"ada": 0.5, "bob": -0.7},
}
TELLING = {"logprobs": 1, "return_token_ids": True, "max_tokens": 12}
# In the shared bases: dense cores of one kind and another. Outside them: factors of its own.
# And what the bank's calibrations say, as a diagonal and as cores.
METHODS = (
    *("ties", "tsv-m", "pico+ties", "iso-c", "dare-ties;seed=3", "knots-ties"),
    *("tara-a", "tara-b", "core", "regmean"),
)


@pytest.fixture(scope="session")
def truths(base_folder: Path, adapter_folders: Mapping[str, Path]) -> dict[str, PreTrainedModel]:
    """Preference -> the model that it stands for; one skill alone is PEFT's."""
    base, adapters = base_folder, adapter_folders
    alone = {f"{name}=1": oracle.with_adapter(base, adapters[name]) for name in ADAPTERS}
    mixed = {text: oracle.with_weights(base, adapters, weights) for text, weights in MIXES.items()}
    return {"base=1": oracle.base_of(base), **alone, **mixed}


async def told(client: httpx.AsyncClient, preference: str, **more: Any) -> dict[str, Any]:
    """The answer to the prompt, and what determines how it is judged."""
    wish = {"preference": preference, **more}
    return await complete(client, prompt=PROMPT, **TELLING, **wish)


def hold(reply: dict[str, Any], model: PreTrainedModel) -> None:
    """The reply is what `model` would say, token by token."""
    (choice,) = reply["choices"]
    assert len(choice["prompt_token_ids"]) > 128
    expected = oracle.greedy_logprobs(model, choice["prompt_token_ids"], choice["token_ids"])
    found = choice["logprobs"]["token_logprobs"]
    assert_close(found, expected, rtol=0, atol=1e-4)


async def test_all_preferences_in_one_batch_say_what_their_weights_say(
    client: httpx.AsyncClient, truths: Mapping[str, PreTrainedModel]
) -> None:
    for _ in range(2):  # the second time from kept keys and values, where an engine keeps them
        replies = await asyncio.gather(*(told(client, text) for text in truths))
        for (text, model), reply in zip(truths.items(), replies, strict=True):
            assert reply["dynmerge"]["text"] == text
            hold(reply, model)
    assert len({said(reply) for reply in replies}) == len(truths)


@pytest.mark.parametrize("wish", [{}, {"preference": "ada=0"}, {"preference": {"base": 1}}])
async def test_nothing_and_all_zero_are_the_base_model(
    client: httpx.AsyncClient, truths: Mapping[str, PreTrainedModel], wish: dict[str, Any]
) -> None:
    reply = await complete(client, prompt=PROMPT, **TELLING, **wish)
    hold(reply, truths["base=1"])
    assert reply["dynmerge"]["preference"] == {"base": 1}
    assert reply["dynmerge"]["cache"] == "base"


async def test_methods_in_one_batch_say_what_their_merges_say(
    client: httpx.AsyncClient, served: Served, base_folder: Path
) -> None:
    preference = Preference.parse(ASKED_OF_ALL)
    replies = await asyncio.gather(
        *(told(client, str(preference), method=method) for method in METHODS)
    )
    for method, reply in zip(METHODS, replies, strict=True):
        recipe = Recipe(preference, parse_method(method), served.bank.digest)
        assert merge_of(reply) == recipe.digest
        deltas = written_out(served.bank, merge(served.bank, recipe))
        hold(reply, oracle.with_deltas(base_folder, deltas))
    assert len({said(reply) for reply in replies}) > len(METHODS) // 2


async def test_a_chat_is_its_template_under_the_same_weights(
    client: httpx.AsyncClient, base_folder: Path, truths: Mapping[str, PreTrainedModel]
) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    reply = await say(
        client, messages=messages, preference="dee", logprobs=True, return_token_ids=True
    )
    (choice,) = reply["choices"]
    prompt = AutoTokenizer.from_pretrained(base_folder).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert reply["prompt_token_ids"] == prompt
    expected = oracle.greedy_logprobs(truths["dee=1"], prompt, choice["token_ids"])
    found = [row["logprob"] for row in choice["logprobs"]["content"]]
    assert_close(found, expected, rtol=0, atol=1e-4)
