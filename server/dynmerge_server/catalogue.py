"""What there is: models, presets, and merges in the cache."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dynmerge.recipe import Recipe
from dynmerge_server.models import Models
from dynmerge_server.state import serving

MAX_MERGES = 100


async def list_models(request: Request) -> Response:
    """GET /v1/models."""
    return JSONResponse({"object": "list", "data": serving(request).models.cards()})


async def get_model(request: Request) -> Response:
    """GET /v1/models/{id}."""
    return JSONResponse(serving(request).models.card(request.path_params["id"]))


async def list_presets(request: Request) -> Response:
    """GET /v1/preferences/presets."""
    return presets_reply(serving(request).models)


async def list_merges(request: Request) -> Response:
    """GET /v1/merges: the cache's counters, and the merges used last."""
    cache = serving(request).runtime.cache
    return merges_reply(cache.recipes(), asdict(cache.stats()))


def presets_reply(models: Models) -> Response:
    """The presets and what they stand for."""
    data = [
        {"id": name, "object": "preset", "preference": preference.weights, "text": str(preference)}
        for name, preference in models.presets.items()
    ]
    return JSONResponse({"object": "list", "data": data})


def merges_reply(recipes: Sequence[Recipe], counters: Mapping[str, float]) -> Response:
    """The last of `recipes`, which are in order of use, and the counters of what keeps them."""
    data = [
        {
            "id": recipe.digest,
            "object": "merge",
            "preference": str(recipe.preference),
            "method": str(recipe.method),
            "bank": recipe.bank,
        }
        for recipe in islice(reversed(recipes), MAX_MERGES)
    ]
    return JSONResponse({"object": "list", "cache": counters, "data": data})
