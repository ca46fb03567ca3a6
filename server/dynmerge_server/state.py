"""Serving: what every endpoint needs, made once by `create_app` and kept in `app.state`."""

from dataclasses import dataclass

from starlette.requests import Request

from dynmerge.errors import ConfigError
from dynmerge.runtime import Runtime
from dynmerge_server.config import ServerConfig
from dynmerge_server.metrics import Metrics
from dynmerge_server.models import Models
from dynmerge_server.openai.logprobs import Pieces
from dynmerge_server.openai.prompts import Prompts
from dynmerge_server.preferences import Preferences


@dataclass(frozen=True, slots=True)
class Serving:
    """One application's parts."""

    runtime: Runtime
    config: ServerConfig
    models: Models
    preferences: Preferences
    prompts: Prompts
    pieces: Pieces
    metrics: Metrics

    @classmethod
    def of(cls, runtime: Runtime, config: ServerConfig) -> "Serving":
        """The parts of a server of `runtime`. Raises ConfigError on what the bank cannot serve."""
        if config.adapter_root is not None:
            raise ConfigError("adapter_root: only vLLM's server loads skills while it serves")
        models = Models.of(runtime.offer, config, runtime.engine.context_length)
        return cls(
            runtime,
            config,
            models,
            Preferences(runtime.offer, models, config),
            Prompts(runtime.engine, config.limits.prompts),
            Pieces(runtime.engine.tokenizer),
            Metrics(runtime, models),
        )


def serving(request: Request) -> Serving:
    """The parts of the application a request came to."""
    parts = request.app.state.serving
    assert isinstance(parts, Serving)
    return parts
