"""Served: one version of a bank, as this API process offers it. Replaced whole, never changed."""

from collections.abc import Mapping
from dataclasses import dataclass

from dynmerge.bank.outline import Outline
from dynmerge.engines.vllm.forms import Form, form_of
from dynmerge.merging.demands import outside_rank
from dynmerge.offer import Offer
from dynmerge.recipe import Recipe
from dynmerge_server.config import ServerConfig
from dynmerge_server.models import Models
from dynmerge_server.preferences import Preferences


@dataclass(frozen=True, slots=True)
class Terms:
    """What all versions have in common.

    `names` are the base model's, `room` is how many merges of a form may be in flight, `own_rank`
    the largest rank of merges with factors of their own.
    """

    config: ServerConfig
    names: tuple[str, ...]
    context_length: int
    room: Mapping[Form, int]
    own_rank: int


@dataclass(frozen=True, slots=True)
class Served:
    """The merges, the names and the way from a request to a recipe."""

    offer: Offer
    models: Models
    preferences: Preferences

    @classmethod
    def of(cls, outline: Outline, terms: Terms) -> "Served":
        """What a bank offers. Raises ConfigError where settings name what it does not have."""
        offer = Offer(outline, lambda recipe: _no_slot(outline, terms, recipe))
        models = Models.of(offer, terms.config, terms.context_length, terms.names)
        return cls(offer, models, Preferences(offer, models, terms.config))


def _no_slot(outline: Outline, terms: Terms, recipe: Recipe) -> str | None:
    form, name = form_of(recipe.method), recipe.method.name
    if not terms.room[form]:
        return f"{name} needs a slot of the form {form}; this server has none ({form}_slots)"
    rank = outside_rank(outline, recipe)
    if rank > terms.own_rank:
        return (
            f"a merge by {name} has a rank of up to {rank} here; a slot holds {terms.own_rank} "
            "(own_rank)"
        )
    return None
