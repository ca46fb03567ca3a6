"""What there is: models, presets, and merges in the cache."""

from itertools import islice

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

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
    data = [
        {"id": name, "object": "preset", "preference": preference.weights, "text": str(preference)}
        for name, preference in serving(request).models.presets.items()
    ]
    return JSONResponse({"object": "list", "data": data})


async def list_merges(request: Request) -> Response:
    """GET /v1/merges: the cache's counters, and the merges used last."""
    cache = serving(request).runtime.cache
    data = [
        {
            "id": recipe.digest,
            "object": "merge",
            "preference": str(recipe.preference),
            "method": str(recipe.method),
            "bank": recipe.bank,
        }
        for recipe in islice(reversed(cache.recipes()), MAX_MERGES)
    ]
    stats = cache.stats()
    counters = {name: getattr(stats, name) for name in stats.__dataclass_fields__}
    return JSONResponse({"object": "list", "cache": counters, "data": data})
