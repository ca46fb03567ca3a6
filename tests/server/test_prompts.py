"""Prompts by themselves: what is done to a text, and how often."""

from collections.abc import Iterator

import pytest

from dynmerge_server.openai.prompts import Prompts
from dynmerge_server.openai.requests import CompletionRequest
from tests.server.echo_engine import EchoEngine


class Counted(str):
    """A text that knows how often its bytes were made."""

    encoded = 0

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        self.encoded += 1
        return super().encode(encoding, errors)


@pytest.fixture
def prompts(engine: EchoEngine) -> Iterator[Prompts]:
    prompts = Prompts(engine, 1)
    yield prompts
    prompts.close()


async def test_the_size_of_a_text_is_taken_once(prompts: Prompts) -> None:
    text = Counted("hello")
    (prompt,) = await prompts.completion(CompletionRequest.model_construct(prompt=text))
    assert prompt.ids == tuple(prompts.encode("hello", True))
    assert prompts._longest is not None  # so that its length was looked at
    assert text.encoded == 1
