from collections.abc import Callable
from dataclasses import replace

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.datastructures import Headers

from dynmerge.errors import ConfigError, MethodError, RequestError
from dynmerge.recipe import Recipe
from dynmerge.runtime import Runtime
from dynmerge_server.app import create_app
from dynmerge_server.config import ServerConfig
from dynmerge_server.models import Models
from dynmerge_server.preferences import Preferences, Wish
from tests.server.asking import CHAT, chat, refused

HEADER = "X-Dynmerge-Preference"


def resolver(runtime: Runtime, config: ServerConfig) -> Preferences:
    return Preferences(runtime.offer, Models.of(runtime.offer, config, 512), config)


def resolving(preferences: Preferences) -> Callable[..., tuple[Recipe, str]]:
    """From a request that no experiment sees to its recipe, and who chose the preference."""

    def resolve(headers: Headers, wish: Wish, model: str | None) -> tuple[Recipe, str]:
        said = preferences.read(headers, wish, model)
        return preferences.recipe(said), said.source

    return resolve


# Each way of saying: seven tenths ada, three tenths bob.
WAYS: dict[str, tuple[dict[str, str], dict[str, object]]] = {
    "header": ({HEADER: "ada=0.7, bob=0.3"}, {}),
    "header, other order and zeros": ({HEADER: "bob=0.30,ada=0.700"}, {}),
    "header, not normalised": ({HEADER: "ada=7, bob=3"}, {}),
    "header, multipliers": ({HEADER: "ada=0.7;raw, bob=0.3"}, {}),
    "body": ({}, {"preference": {"ada": 0.7, "bob": 0.3}}),
    "body, as text": ({}, {"preference": "ada=0.7, bob=0.3"}),
    "body, multipliers": ({}, {"preference": {"ada": 0.7, "bob": 0.3}, "normalize": False}),
    "body, text, multipliers": ({}, {"preference": "ada=0.7, bob=0.3", "normalize": False}),
    "xargs": ({}, {"vllm_xargs": {"preference": "ada=0.7, bob=0.3"}}),
    "llama.cpp": ({}, {"lora": [{"id": "ada", "scale": 0.7}, {"id": "bob", "scale": 0.3}]}),
    "model": ({}, {"model": "random@ada=0.7,bob=0.3"}),
    "preset header": ({"X-Dynmerge-Preset": "mixed"}, {}),
    "preset": ({}, {"preset": "mixed"}),
    "preset xargs": ({}, {"vllm_xargs": {"preset": "mixed"}}),
    "preset as model": ({}, {"model": "mixed"}),
    "model at preset": ({}, {"model": "random@mixed"}),
}


@pytest.fixture
def config() -> ServerConfig:
    return ServerConfig(presets={"mixed": "ada=0.7, bob=0.3", "careful": {"cyd": 1}})


@pytest.mark.parametrize("way", WAYS)
async def test_every_way_of_saying_it_names_the_same_merge(
    client: httpx.AsyncClient, way: str
) -> None:
    headers, body = WAYS[way]
    plain = await chat(client, {HEADER: "ada=0.7, bob=0.3"})
    said = await chat(client, headers, **body)
    assert said["dynmerge"]["merge_id"] == plain["dynmerge"]["merge_id"]
    assert said["choices"] == plain["choices"]


async def test_a_thousandth_more_is_another_merge(client: httpx.AsyncClient) -> None:
    ids = {
        (await chat(client, {HEADER: text}))["dynmerge"]["merge_id"]
        for text in ("ada=0.7, bob=0.3", "ada=0.701, bob=0.299")
    }
    assert len(ids) == 2


async def test_header_over_body_over_model_over_default(client: httpx.AsyncClient) -> None:
    body = {"preference": {"bob": 1}, "model": "random@cyd"}
    said = await chat(client, {HEADER: "ada"}, **body)
    assert said["dynmerge"]["preference"] == {"ada": 1}
    assert said["dynmerge"]["source"] == "header"
    said = await chat(client, **body)
    assert (said["dynmerge"]["text"], said["dynmerge"]["source"]) == ("bob=1", "body")
    said = await chat(client, model="random@cyd")
    assert (said["dynmerge"]["text"], said["dynmerge"]["source"]) == ("cyd=1", "model")
    assert said["model"] == "random@cyd"
    said = await chat(client)
    assert (said["dynmerge"]["text"], said["dynmerge"]["source"]) == ("base=1", "default")


async def test_a_skill_as_model_is_that_skill_alone(client: httpx.AsyncClient) -> None:
    said = await chat(client, model="ada")
    assert said["dynmerge"]["preference"] == {"ada": 1}
    assert said["model"] == "ada"


def test_the_method_has_the_same_precedence_of_its_own(
    runtime: Runtime, config: ServerConfig
) -> None:
    resolve = resolving(resolver(runtime, config))
    headers = Headers({"X-Dynmerge-Method": "linear;scale=0.5"})
    recipe, source = resolve(headers, Wish({"ada": 1}, method="linear;scale=2"), None)
    assert (str(recipe.method), source) == ("linear;p=1;scale=0.5", "body")
    recipe, _ = resolve(Headers(), Wish(xargs={"method": "linear;scale=2"}), None)
    assert str(recipe.method) == "linear;p=1;scale=2"


def test_the_servers_defaults_serve_where_nobody_chose(runtime: Runtime) -> None:
    config = ServerConfig(default_preference="bob=0.25, ada=0.75", default_method="linear;scale=3")
    recipe, source = resolving(resolver(runtime, config))(Headers(), Wish(), None)
    assert (str(recipe.preference), source) == ("ada=0.75, bob=0.25", "default")
    assert str(recipe.method) == "linear;p=1;scale=3"
    for wrong in ({"default_preference": "nobody=1"}, {"default_method": "magic"}):
        with pytest.raises(ConfigError, match=r"nobody|magic"):
            resolver(runtime, ServerConfig(**wrong))


SOUPS = "lora-soups"
IN_METHOD_HEADER = {"X-Dynmerge-Method": SOUPS}


@pytest.mark.parametrize(
    ("headers", "body", "source"),
    [
        (IN_METHOD_HEADER, {}, "X-Dynmerge-Method"),
        ({}, {"method": SOUPS}, "method"),
        ({}, {"vllm_xargs": {"method": SOUPS}}, "vllm_xargs.method"),
        ({"X-Dynmerge-Method": "linear"}, {"method": SOUPS}, "method"),
        (IN_METHOD_HEADER, {"method": "linear"}, "X-Dynmerge-Method"),
    ],
)
async def test_a_method_that_the_bank_cannot_serve_is_refused_where_it_was_said(
    client: httpx.AsyncClient, headers: dict[str, str], body: dict[str, object], source: str
) -> None:
    error = await refused(client, headers=headers, preference={"ada": 1}, **body)
    assert error["param"] == source
    assert error["message"].startswith(f"{source}: lora-soups needs learned weights")


def test_a_default_method_that_the_bank_cannot_serve_is_a_configuration_error(
    runtime: Runtime,
) -> None:
    with pytest.raises(ConfigError, match=r"^default_method: lora-soups needs learned weights"):
        create_app(runtime, ServerConfig(default_method=SOUPS))


@pytest.mark.parametrize(
    ("headers", "wish", "source"),
    [
        ({"X-Dynmerge-Method": "knots-ties"}, Wish(method="linear"), "X-Dynmerge-Method"),
        ({}, Wish(method="knots-ties"), "method"),
        ({}, Wish(xargs={"method": "knots-ties"}), "vllm_xargs.method"),
        ({}, Wish(), "default_method"),
    ],
)
def test_a_merge_that_never_fits_is_refused_where_its_method_comes_from(
    runtime: Runtime, headers: dict[str, str], wish: Wish, source: str
) -> None:
    config = ServerConfig(default_preference="ada", default_method="ties;space=full")
    offer = replace(runtime.offer, refusal=lambda recipe: f"a merge by {recipe.method.name}")
    resolve = resolving(Preferences(offer, Models.of(offer, config, 512), config))
    with pytest.raises(MethodError, match=rf"^{source}: a merge by (knots-)?ties") as caught:
        resolve(Headers(headers), wish, None)
    assert caught.value.param == source


async def test_repeated_header_lines_are_one_list(client: httpx.AsyncClient) -> None:
    lines = [(HEADER, "ada=0.7"), (HEADER, "bob=0.3")]
    reply = await client.post("/v1/chat/completions", json=CHAT, headers=lines)
    assert reply.headers["x-dynmerge-applied"] == "ada=0.7, bob=0.3;source=header"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ada=0.7,,bob=1", "column 9"),
        ("ada=.5", "column 5"),
        ("Ada=1", "column 1"),
        ("ada=nan", "ada"),
        ('ada="0.7"', "not a number"),
        ("ada=(1 2)", "not a number"),
        ("ada=0.7654", "column"),
        ("ada=0.7, ada=0.2", "twice"),
        ("ada=-0.5", "negative"),
        ("ada=-0.5;raw", "negative"),
        ("ada=3;raw", "within"),
        ("ada=1;rav", "rav"),
        ("nobody=1", "nobody"),
        ("ada=1, nobody=1", "known: ada, bob, cyd"),
        ("ada=\xe9", "not ASCII"),
        ("", "names no skill"),
        ("ada=1e999", "column"),
        (", ".join(f"s{index}=1" for index in range(1000)), HEADER),
    ],
)
async def test_a_bad_header_is_refused_with_its_name_and_place(
    client: httpx.AsyncClient, text: str, says: str
) -> None:
    headers = [(HEADER, text.encode("latin-1"))]
    error = await refused(client, headers=headers)  # type: ignore[arg-type]
    assert HEADER in error["message"]
    assert says in error["message"]
    assert error["param"] == HEADER


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"preference": {"nobody": 1}}, "preference"),
        ({"preference": {}}, "preference"),
        ({"preference": {"ada": "much"}}, "preference"),
        ({"preference": {"ada": None}}, "preference"),
        ({"preference": {"ada": True}}, "preference"),
        ({"preference": {"ada": 10**400}}, "preference"),
        ({"preference": {"ada": -1}}, "preference"),
        ({"preference": {"ada": 2.5}, "normalize": False}, "preference"),
        ({"preference": "ada=0.5;raw, bob=0.2", "normalize": True}, "normalize"),
        ({"normalize": False}, "normalize"),
        ({"preset": "nothing"}, "preset"),
        ({"method": "magic"}, "method"),
        ({"method": "linear;scale=99"}, "method"),
        ({"method": "linear;density=0.5"}, "method"),
        ({"lora": []}, "lora"),
        ({"lora": [{"id": 0, "scale": 1}]}, "lora"),
        ({"lora": [{"id": "ada", "scale": 1}, {"id": "ada", "scale": 1}]}, "lora"),
        ({"lora": [{"id": "ada", "scale": "x"}]}, "lora"),
        ({"lora": [{"id": "ada"}]}, "lora"),
        ({"vllm_xargs": {"preference": 1}}, "vllm_xargs.preference"),
        ({"vllm_xargs": {"preferense": "ada"}}, "vllm_xargs.preferense"),
        ({"model": "random@nobody"}, "model"),
        ({"model": "random@"}, "model"),
        ({"model": "random@ada=0.7,,"}, "model"),
        ({"model": "random@ada=1\r\nX: y"}, "model"),
    ],
)
async def test_a_bad_body_is_refused_with_its_field(
    client: httpx.AsyncClient, body: dict[str, object], param: str
) -> None:
    error = await refused(client, **body)
    assert error["param"] == param
    assert param.rsplit(".", maxsplit=1)[-1] in error["message"]


@pytest.mark.parametrize("model", ["other", "other@ada", "ada@bob", "adax", "Random", "\x00"])
async def test_an_unknown_model_is_not_found(client: httpx.AsyncClient, model: str) -> None:
    error = await refused(client, 404, model=model, stream=True)
    assert error["type"] == "NotFoundError"
    assert error["message"].startswith(f"The model `{model}` does not exist.")


@pytest.mark.parametrize(
    ("headers", "body", "names"),
    [
        ({HEADER: "ada", "X-Dynmerge-Preset": "mixed"}, {}, (HEADER, "X-Dynmerge-Preset")),
        ({}, {"preference": {"ada": 1}, "preset": "mixed"}, ("preference", "preset")),
        ({}, {"preset": "mixed", "lora": [{"id": "ada", "scale": 1}]}, ("preset", "lora")),
        (
            {},
            {"preference": "ada", "vllm_xargs": {"preference": "ada"}},
            ("preference", "vllm_xargs.preference"),
        ),
        (
            {},
            {"method": "linear", "vllm_xargs": {"method": "linear"}},
            ("method", "vllm_xargs.method"),
        ),
    ],
)
async def test_saying_it_twice_at_one_level_is_refused_naming_both(
    client: httpx.AsyncClient,
    headers: dict[str, str],
    body: dict[str, object],
    names: tuple[str, str],
) -> None:
    error = await refused(client, headers=headers, **body)
    for name in names:
        assert name in error["message"]


async def test_a_mistake_in_an_overridden_level_is_a_mistake(client: httpx.AsyncClient) -> None:
    await refused(client, headers={HEADER: "ada"}, preference={"nobody": 1})
    await refused(client, headers={HEADER: "ada"}, model="random@nobody")
    await refused(client, 404, headers={HEADER: "ada"}, model="other")


async def test_a_misspelt_header_of_ours_is_refused(client: httpx.AsyncClient) -> None:
    error = await refused(client, headers={"X-Dynmerge-Prefernce": "ada"})
    assert "x-dynmerge-prefernce" in error["message"]
    error = await refused(client, headers={"X_Dynmerge_Preference": "ada"})
    assert "x_dynmerge_preference" in error["message"]
    await chat(client, {"X-Dynmerge-Unit": "u_1"})


async def test_negative_multipliers_only_where_allowed(runtime: Runtime) -> None:
    allowing = resolver(runtime, ServerConfig(allow_negative=True))
    recipe, _ = resolving(allowing)(Headers({HEADER: "ada=1, bob=-0.5;raw"}), Wish(), None)
    assert recipe.preference.weights == {"ada": 1, "bob": -0.5}
    with pytest.raises(RequestError, match="negative"):
        resolving(resolver(runtime, ServerConfig()))(
            Headers({HEADER: "ada=1, bob=-0.5;raw"}), Wish(), None
        )


@pytest.mark.parametrize(
    "preset",
    [{"ada": "bob"}, {"x": "nobody=1"}, {"Bad": "ada"}, {"base": "ada"}, {"random": "ada"}],
)
def test_an_impossible_preset_is_a_configuration_error(
    runtime: Runtime, preset: dict[str, str]
) -> None:
    with pytest.raises(ConfigError, match="preset"):
        Models.of(runtime.offer, ServerConfig(presets=preset), 512)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    text=st.one_of(st.text(max_size=40), st.from_regex(r"(ada|bob|x)=?[0-9.]*(, ?bob=1)?(;raw)?"))
)
def test_any_header_is_applied_exactly_or_refused(
    runtime: Runtime, config: ServerConfig, text: str
) -> None:
    preferences = resolver(runtime, config)
    value = text.encode("utf-8", "surrogatepass")
    headers = Headers(raw=[(HEADER.lower().encode(), value)])
    try:
        recipe, source = resolving(preferences)(headers, Wish(), None)
    except RequestError as error:
        told = str(error)
    else:
        assert source == "header"
        again = Headers({HEADER: str(recipe.preference)})
        assert resolving(preferences)(again, Wish(), None)[0].digest == recipe.digest
        told = HEADER
    assert HEADER in told
