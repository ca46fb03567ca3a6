"""The `openai` package, unmodified, against a real socket."""

import openai
import pytest

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def api(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_chat_with_a_preference_in_a_header_or_in_the_body(api: openai.OpenAI) -> None:
    with api:
        by_header = api.chat.completions.create(
            model="random",
            messages=HELLO,  # type: ignore[arg-type]
            max_tokens=8,
            extra_headers={"X-Dynmerge-Preference": "ada=0.7, bob=0.3"},
        )
        by_body = api.chat.completions.create(
            model="random",
            messages=HELLO,  # type: ignore[arg-type]
            max_tokens=8,
            extra_body={"preference": {"ada": 0.7, "bob": 0.3}},
        )
        base = api.chat.completions.create(model="random", messages=HELLO, max_tokens=8)  # type: ignore[arg-type]
    said = by_header.choices[0].message.content
    assert said == by_body.choices[0].message.content
    assert said != base.choices[0].message.content
    assert by_header.model_extra is not None
    assert by_header.model_extra["dynmerge"]["text"] == "ada=0.7, bob=0.3"


def test_streams_and_raw_headers(api: openai.OpenAI) -> None:
    with api:
        raw = api.chat.completions.with_raw_response.create(
            model="random@ada",
            messages=HELLO,
            max_tokens=8,  # type: ignore[arg-type]
        )
        assert raw.headers["x-dynmerge-applied"] == "ada=1;source=model"
        whole = raw.parse().choices[0].message.content
        chunks = list(
            api.chat.completions.create(
                model="random@ada",
                messages=HELLO,  # type: ignore[arg-type]
                max_tokens=8,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8


def test_completions_models_and_errors(api: openai.OpenAI) -> None:
    with api:
        names = [model.id for model in api.models.list()]
        assert names[:2] == ["random", "ada"]
        completion = api.completions.create(
            model="ada", prompt=["a", "b"], max_tokens=4, logprobs=1
        )
        assert [choice.index for choice in completion.choices] == [0, 1]
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            api.completions.create(model="nobody", prompt="a")
        with pytest.raises(openai.BadRequestError, match="column 5") as caught:
            api.completions.create(
                model="random", prompt="a", extra_headers={"X-Dynmerge-Preference": "ada=.5"}
            )
        assert caught.value.param == "X-Dynmerge-Preference"
