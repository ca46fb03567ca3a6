"""Serving: what every endpoint needs, made once by `create_app` and kept in `app.state`."""

from dataclasses import dataclass

from starlette.requests import Request

from dynmerge.errors import ConfigError
from dynmerge.runtime import Runtime
from dynmerge_server.config import ServerConfig
from dynmerge_server.experiments.lab import Lab, open_lab
from dynmerge_server.experiments.live import Experiments
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
    lab: Lab | None

    @property
    def experiments(self) -> Experiments | None:
        """Those of this server, if it has any."""
        return self.lab.experiments if self.lab else None

    @classmethod
    def of(cls, runtime: Runtime, config: ServerConfig) -> "Serving":
        """The parts of a server of `runtime`. Raises ConfigError on what the bank cannot serve."""
        if config.adapter_root is not None:
            raise ConfigError("adapter_root: only vLLM's server loads skills while it serves")
        models = Models.of(runtime.offer, config, runtime.engine.context_length)
        preferences = Preferences(runtime.offer, models, config)
        return cls(
            runtime,
            config,
            models,
            preferences,
            Prompts(runtime.engine, config.limits.prompts),
            Pieces(runtime.engine.tokenizer),
            Metrics(runtime, models),
            open_lab(config.experiments, lambda: preferences),
        )


def serving(request: Request) -> Serving:
    """The parts of the application a request came to."""
    parts = request.app.state.serving
    assert isinstance(parts, Serving)
    return parts
