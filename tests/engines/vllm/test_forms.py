"""The form that is told by a method's name alone is the form its merges have."""

import pytest

from dynmerge.engines.vllm.forms import FORMS, form_of
from dynmerge.merging.choice import parse_method, parts_of
from dynmerge.merging.methods import METHODS
from tests.merging.dense import made_by

OWN = ("iso-c-dense", "knots-ties", "knots-dare-ties")
COMPOSED = (
    "linear+svc",
    "pico+linear",
    "pico+lora-soups",
    "lora-soups+svc",
    "pico+ties+svc",
    "pico+knots-ties",
    "knots-ties+svc",
    "pico+iso-c-dense",
    "pico+tara-a",
    "tara-a+svc",
    "adamerging+svc",
)
DIAGONAL = ["linear", "lora-soups", "tuned", "adamerging", "tara-a"]
SPACED = tuple(
    f"{name};space={space}"
    for name in METHODS
    for space in ("core", "knots", "full")
    if any(parameter.name == "space" for parameter in METHODS[name].parameters)
)


@pytest.mark.parametrize("text", [*METHODS, *COMPOSED, *SPACED, "ties;space=full;rank=2"])
def test_a_merge_has_the_form_that_its_method_says(text: str) -> None:
    takes_negative = METHODS[parts_of(parse_method(text).name)[1]].takes_negative
    made = made_by({"ada": 0.5, "bob": -0.25 if takes_negative else 0.25, "cyd": 0.75}, text)
    form = form_of(parse_method(text))
    assert (form == "own") == (made.core is None)
    assert (form == "own") == (made.own is not None)


def test_what_weighs_directions_is_diagonal_and_nothing_made_of_it_is() -> None:
    found = {text: form_of(parse_method(text)) for text in (*METHODS, *COMPOSED, *SPACED)}
    assert [text for text, form in found.items() if form == "diagonal"] == DIAGONAL
    assert [text for text in METHODS if found[text] == "own"] == sorted(OWN, key=[*METHODS].index)
    assert set(found.values()) == set(FORMS)


@pytest.mark.parametrize(
    "text", ["linear;p=4", "linear;p=inf;scale=2", "lora-soups;scale=0", "tara-a;scale=2"]
)
def test_parameters_leave_a_diagonal_method_diagonal(text: str) -> None:
    assert form_of(parse_method(text)) == "diagonal"
