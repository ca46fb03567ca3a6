"""create_app: every route on one screen. Its parts are in `app.state`, nothing is global."""

from pathlib import Path

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from dynmerge.runtime import Runtime
from dynmerge_server.auth import AuthMiddleware
from dynmerge_server.catalogue import get_model, list_merges, list_models, list_presets
from dynmerge_server.config import ServerConfig
from dynmerge_server.errors import HANDLERS
from dynmerge_server.experiments.routes import ROUTES as EXPERIMENT_ROUTES
from dynmerge_server.health import health, load, metrics, version
from dynmerge_server.limits import LimitsMiddleware
from dynmerge_server.openai.chat import chat_completions
from dynmerge_server.openai.completions import completions
from dynmerge_server.openai.invocations import invocations
from dynmerge_server.openai.tokens import detokenize, tokenize
from dynmerge_server.state import Serving

PLAYGROUND = Path(__file__).parent / "playground"

ROUTES = (
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/models", list_models, methods=["GET"]),
    Route("/v1/models/{id:path}", get_model, methods=["GET"]),
    Route("/v1/preferences/presets", list_presets, methods=["GET"]),
    Route("/v1/merges", list_merges, methods=["GET"]),
    *EXPERIMENT_ROUTES,
    Route("/invocations", invocations, methods=["POST"]),
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/detokenize", detokenize, methods=["POST"]),
    Route("/health", health, methods=["GET"]),
    Route("/ping", health, methods=["GET", "POST"]),
    Route("/version", version, methods=["GET"]),
    Route("/load", load, methods=["GET"]),
    Route("/metrics", metrics, methods=["GET"]),
    Mount("/playground", StaticFiles(directory=PLAYGROUND, html=True)),
)


def create_app(runtime: Runtime, config: ServerConfig) -> Starlette:
    """The server's application around `runtime`, which it does not close. Raises ConfigError."""
    app = Starlette(
        routes=ROUTES,
        middleware=[
            Middleware(LimitsMiddleware, limits=config.limits),
            Middleware(AuthMiddleware, keys=config.auth.keys),
        ],
        exception_handlers=HANDLERS,
    )
    app.state.serving = Serving.of(runtime, config)
    app.state.lab = app.state.serving.lab
    return app
