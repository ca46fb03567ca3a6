"""Ticket: a recipe as the text that a LoRARequest carries where others have a path."""

import json

import pydantic

from dynmerge.errors import DynmergeError
from dynmerge.merging.choice import parse_method
from dynmerge.preference import Preference
from dynmerge.recipe import Recipe

PREFIX = "dynmerge:"


class Fields(pydantic.BaseModel):
    """What a ticket says; weights in thousandths."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    preference: dict[str, int]
    raw: bool
    method: str
    bank: str


def ticket(recipe: Recipe) -> str:
    """`recipe` in words that `recipe_of` reads back to the same digest."""
    preference = recipe.preference
    fields = Fields(
        preference=dict(preference.thousandths),
        raw=preference.is_raw,
        method=str(recipe.method),
        bank=recipe.bank,
    )
    return PREFIX + json.dumps(fields.model_dump(), separators=(",", ":"))


def recipe_of(text: str) -> Recipe:
    """The recipe of a ticket. Raises DynmergeError on what `ticket` did not write."""
    if not text.startswith(PREFIX):
        raise DynmergeError(f"{text[:80]!r} is no merge of dynmerge")
    try:
        fields = Fields.model_validate_json(text[len(PREFIX) :])
    except pydantic.ValidationError:
        raise DynmergeError(f"{text[:80]!r} is no ticket that dynmerge wrote") from None
    weights = {name: value / 1000 for name, value in fields.preference.items()}
    preference = Preference.of(
        weights, normalize=not fields.raw, allow_negative=True, source="ticket"
    )
    return Recipe(preference, parse_method(fields.method, "ticket"), fields.bank)
