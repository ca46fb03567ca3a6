"""The `openai` package, unmodified."""

import openai
import pytest

from tests.contract.server import Served

HELLO = [{"role": "user", "content": "hello"}]
ASKED = {"messages": HELLO, "max_tokens": 12, "temperature": 0}


@pytest.fixture
def api(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def test_a_preference_in_a_header_or_in_the_body_or_in_the_name(api: openai.OpenAI) -> None:
    with api:
        by_header, by_body, by_name, base = (
            api.chat.completions.create(**ASKED, **more)  # type: ignore[call-overload]
            for more in (
                {"model": "tiny", "extra_headers": {"X-Dynmerge-Preference": "ada=7, bob=3"}},
                {"model": "tiny", "extra_body": {"preference": {"ada": 0.7, "bob": 0.3}}},
                {"model": "tiny@mixed"},
                {"model": "tiny"},
            )
        )
    texts = {reply.choices[0].message.content for reply in (by_header, by_body, by_name)}
    assert len(texts) == 1
    assert base.choices[0].message.content not in texts
    assert by_header.model_extra["dynmerge"]["text"] == "ada=0.7, bob=0.3"


def test_streams_and_raw_headers(api: openai.OpenAI) -> None:
    with api:
        raw = api.chat.completions.with_raw_response.create(model="tiny@ada", **ASKED)  # type: ignore[call-overload]
        assert raw.headers["x-dynmerge-applied"] == "ada=1;source=model"
        chunks = list(
            api.chat.completions.create(  # type: ignore[call-overload]
                model="tiny@ada", **ASKED, stream=True, stream_options={"include_usage": True}
            )
        )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == raw.parse().choices[0].message.content
    assert chunks[-1].model_extra["dynmerge"]["text"] == "ada=1"


def test_models_and_errors(api: openai.OpenAI) -> None:
    with api:
        assert [model.id for model in api.models.list()][:2] == ["tiny", "ada"]
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            api.completions.create(model="nobody", prompt="a")
        with pytest.raises(openai.BadRequestError, match="column 5") as caught:
            api.completions.create(
                model="tiny", prompt="a", extra_headers={"X-Dynmerge-Preference": "ada=.5"}
            )
        assert caught.value.param == "X-Dynmerge-Preference"
