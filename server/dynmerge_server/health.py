"""Is it well, how busy is it, and which version: what load balancers and scrapers ask."""

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dynmerge import __version__
from dynmerge_server.state import serving


async def health(request: Request) -> Response:
    """GET /health, GET and POST /ping: 200, or 503 when the engine is dead."""
    return Response(status_code=200 if serving(request).runtime.engine.healthy() else 503)


async def version(_request: Request) -> Response:
    """GET /version."""
    return JSONResponse({"version": __version__})


async def load(request: Request) -> Response:
    """GET /load: requests being answered now."""
    return JSONResponse({"server_load": serving(request).metrics.in_flight})


async def metrics(request: Request) -> Response:
    """GET /metrics, in Prometheus' text format."""
    text = generate_latest(serving(request).metrics.registry)
    return Response(text, media_type=CONTENT_TYPE_LATEST)
