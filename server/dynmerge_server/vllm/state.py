"""Door: what the middleware and the routes need, made once by the plugin, kept in `app.state`."""

from dataclasses import dataclass
from typing import Any

from dynmerge.recipe import Recipe
from dynmerge_server.experiments.lab import Lab
from dynmerge_server.experiments.live import Experiments
from dynmerge_server.vllm.hold import Hold
from dynmerge_server.vllm.metrics import Metrics
from dynmerge_server.vllm.residents import Residents
from dynmerge_server.vllm.skills import Skills
from dynmerge_server.vllm.versions import Versions
from dynmerge_server.vllm.workers import Workers


@dataclass(frozen=True, slots=True)
class Door:
    """One API process's parts."""

    versions: Versions
    residents: Residents
    workers: Workers
    metrics: Metrics
    skills: Skills | None  # None where none may be loaded
    lab: Lab | None = None

    @property
    def experiments(self) -> Experiments | None:
        """Those of this server, if it has any."""
        return self.lab.experiments if self.lab else None

    def hold(self, recipe: Recipe) -> Hold:
        """A request's grip on its merge, not taken yet."""
        return Hold(self.versions, self.residents, self.workers, recipe)


def door(app: Any) -> Door:
    """The parts of the application a request came to."""
    parts = app.state.dynmerge
    assert isinstance(parts, Door)
    return parts
