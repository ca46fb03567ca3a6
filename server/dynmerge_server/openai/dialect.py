"""Dialect: how one endpoint writes what a run produces. The two differ in little else."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from dynmerge import __version__
from dynmerge.engines.engine import FinishReason
from dynmerge_server.openai.asked import Asked
from dynmerge_server.openai.logprobs import Entry
from dynmerge_server.openai.run import Update


@dataclass(slots=True)
class Answer:
    """One sequence, complete; built up from its updates."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    entries: list[Entry] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def add(self, update: Update) -> None:
        """Take in what is new."""
        self.text += update.text
        self.token_ids.extend(update.token_ids)
        if update.entries is not None:
            self.entries = [*(self.entries or []), *update.entries]
        self.finish_reason = update.finish_reason
        self.stop_reason = update.stop_reason


class Dialect(Protocol):
    """The shapes of one endpoint's replies."""

    @property
    def whole_object(self) -> str:
        """The `object` of a whole reply."""
        ...

    @property
    def chunk_object(self) -> str:
        """The `object` of a stream's chunk."""
        ...

    def opening(self, asked: Asked, index: int) -> dict[str, Any] | None:
        """A stream's first choice for a sequence, before any text."""
        ...

    def delta(self, asked: Asked, update: Update) -> dict[str, Any]:
        """A stream's choice for an update."""
        ...

    def choice(self, asked: Asked, answer: Answer) -> dict[str, Any]:
        """A whole reply's choice."""
        ...

    def extra(self, asked: Asked) -> dict[str, Any]:
        """What stands beside the choices of a whole reply, and of a stream's first chunk."""
        ...


def envelope(asked: Asked, kind: str) -> dict[str, Any]:
    """What every reply and every chunk begins with."""
    return {
        "id": asked.id,
        "object": kind,
        "created": asked.created,
        "model": asked.model,
        "system_fingerprint": f"dynmerge-{__version__}-{asked.recipe.bank[:8]}",
    }
