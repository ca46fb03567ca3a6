"""A recipe is the same recipe after it has travelled through vLLM as a path."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynmerge.engines.vllm.ticket import PREFIX, recipe_of, ticket
from dynmerge.errors import DynmergeError
from dynmerge.merging.choice import choose, default_method, parse_method
from dynmerge.merging.methods import AFTER, CALIBRATION, METHODS, SCALE, STEPS, Method, Step
from dynmerge.merging.parameters import Choice, Parameter
from dynmerge.preference import GRID, MAX_ENTRIES, Preference
from dynmerge.recipe import MethodChoice, Recipe

BANK = "b" * 64
SKILLS = ("a", "*", "b-1", "base-2", "raw", "scale", "c_.*-", "z" * 64)


@st.composite
def preferences(draw: st.DrawFn) -> Preference:
    """Points of the simplex, `base` among them or alone, and multipliers of either sign."""
    raw = draw(st.booleans())
    names = st.sampled_from(SKILLS if raw else [*SKILLS, "base"])
    # A share of the whole that is below the grid would be refused.
    thousandths = st.integers(-2 * GRID, 2 * GRID) if raw else st.just(0) | st.integers(10, GRID)
    weights = draw(st.dictionaries(names, thousandths, min_size=1, max_size=8))
    scaled = {name: value / GRID for name, value in weights.items()}
    return Preference.of(scaled, normalize=not raw, allow_negative=raw)


def values_of(parameter: Parameter) -> st.SearchStrategy[Any]:
    """What the parameter takes, on its grid of thousandths."""
    if isinstance(parameter, Choice):
        return st.sampled_from(parameter.choices)
    low, high = parameter.low, parameter.high
    if parameter.whole:
        return st.integers(int(low), int(high))
    numbers = st.integers(round(low * GRID), round(high * GRID)).map(lambda value: value / GRID)
    return numbers | st.just("inf") if parameter.infinite else numbers


@st.composite
def choices(draw: st.DrawFn, merger: str) -> MethodChoice:
    """`merger` under random parameters, alone or with what may stand around it."""
    before, after = draw(st.booleans()), METHODS[merger].takes_svc and draw(st.booleans())
    parts = [CALIBRATION] * before + [merger] + [AFTER] * after
    rows: list[Method | Step] = [
        METHODS[merger],
        *(STEPS[part] for part in parts if part != merger),
    ]
    known = [SCALE, *(parameter for row in rows for parameter in row.parameters)]
    given = {p.name: draw(values_of(p)) for p in known if draw(st.booleans())}
    if given.get("space", "core") != "full":  # elsewhere a rank is refused
        given.pop("rank", None)
    if {"density", "epsilon"} & set(given) and merger == "della":
        given.update(density=0.5, epsilon=min(given.get("epsilon", 0.07), 0.4))
    return choose("+".join(parts), given, "test")


@pytest.mark.parametrize("merger", METHODS)
@settings(max_examples=30)
@given(data=st.data())
def test_a_ticket_is_read_back_to_the_same_digest(merger: str, data: st.DataObject) -> None:
    recipe = Recipe(data.draw(preferences()), data.draw(choices(merger)), BANK)
    text = ticket(recipe)
    read = recipe_of(text)
    assert read == recipe
    assert read.digest == recipe.digest
    assert ticket(read) == text
    assert text.startswith(PREFIX)
    assert text.isascii()


@given(st.permutations(["ada", "bob", "cyd", "base"]))
def test_the_order_in_which_skills_were_named_is_not_in_the_ticket(names: list[str]) -> None:
    weights = {name: 0.1 * (1 + ord(name[0]) - ord("a")) for name in names}
    recipe = Recipe(Preference.of(weights), default_method(), BANK)
    same = Recipe(Preference.of(dict(sorted(weights.items()))), default_method(), BANK)
    assert ticket(recipe) == ticket(same)


def test_what_differs_in_a_recipe_differs_in_its_ticket() -> None:
    half, other = Preference.of({"ada": 1, "bob": 1}), Preference.of({"ada": 0.5}, normalize=False)
    recipes = [
        Recipe(half, default_method(), BANK),
        Recipe(other, default_method(), BANK),
        Recipe(half, parse_method("linear;scale=0.999"), BANK),
        Recipe(half, parse_method("ties"), BANK),
        Recipe(half, default_method(), "c" * 64),
    ]
    assert len({ticket(recipe) for recipe in recipes}) == len(recipes)


@pytest.mark.parametrize("text", ["", "/adapters/sql", "dynmerge", "DYNMERGE:{}", " dynmerge:{}"])
def test_a_path_is_no_ticket(text: str) -> None:
    with pytest.raises(DynmergeError, match="is no merge of dynmerge"):
        recipe_of(text)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("method", "lineal", r"^ticket: no method 'lineal'"),
        ("method", "ties;density=2", r"^ticket: ties;density must lie within"),
        ("method", 1, "is no ticket that dynmerge wrote"),
        ("preference", {}, r"^ticket: names no skill"),
        ("preference", {"Ada": 1000}, r"^ticket: 'Ada' is not a skill name"),
        ("preference", "ada=1", "is no ticket that dynmerge wrote"),
        ("bank", None, "is no ticket that dynmerge wrote"),
    ],
)
def test_a_ticket_that_was_changed_to_what_nobody_can_ask_for_is_refused(
    key: str, value: object, reason: str
) -> None:
    recipe = Recipe(Preference.of({"ada": 1}), default_method(), BANK)
    fields = json.loads(ticket(recipe).removeprefix(PREFIX))
    assert recipe_of(PREFIX + json.dumps(fields)) == recipe
    with pytest.raises(DynmergeError, match=reason):
        recipe_of(PREFIX + json.dumps({**fields, key: value}))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "garbage",
        "[]",
        '"ada=1"',
        "{}",
        '{"preference": "ada=1", "method": "linear"}',
        '{"preference": 1, "method": "linear", "bank": "b"}',
        '{"preference": "ada=1", "method": 1, "bank": "b"}',
        '{"preference": "ada=1", "method": "linear", "bank": 3}',
    ],
)
def test_a_prefix_before_garbage_is_refused(text: str) -> None:
    with pytest.raises(DynmergeError):
        recipe_of(PREFIX + text)


def test_the_largest_preference_there_is_travels_too() -> None:
    weights = {f"{'s' * 60}.{place:03}": 1.999 for place in range(MAX_ENTRIES)}
    recipe = Recipe(Preference.of(weights, normalize=False), default_method(), BANK)
    assert recipe_of(ticket(recipe)) == recipe
