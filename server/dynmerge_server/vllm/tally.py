"""Tally: what vLLM's reply to one request says of itself, for the log of experiments."""

import json
import re
from collections.abc import Mapping
from typing import Any

from dynmerge_server.experiments.trial import Trial

USAGE_ONLY = b'"choices":[],'  # of the chunk that counts tokens, in vLLM's events
_TEXT = re.compile(rb'"(?:content|text|delta)":"(?!")')
_REASON = re.compile(rb'"(?:finish_reason|stop_reason)":"([a-z_]+)"')
_USAGE = b'"usage":{'
_DATA = b"data: "


class Tally:
    """Reads a reply as it passes, and tells its trial how it ended."""

    def __init__(self, trial: Trial, cache: str) -> None:
        self._trial = trial
        self._cache = cache
        self._usage: Mapping[str, Any] = {}
        self._reasons: list[str] = []
        self._empty = True

    def event(self, event: bytes) -> None:
        """Take in one event of a stream."""
        self._trial.first_token()
        self._empty = self._empty and _TEXT.search(event) is None
        self._reasons += [found.decode() for found in _REASON.findall(event)]
        if _USAGE in event and event.startswith(_DATA):
            self._usage = _usage(json.loads(event.removeprefix(_DATA)))

    def whole(self, content: object) -> None:
        """Take in a reply that is one JSON value."""
        self._trial.first_token()
        text = json.dumps(content, separators=(",", ":")).encode()
        self._empty = _TEXT.search(text) is None
        self._reasons += [found.decode() for found in _REASON.findall(text)]
        self._usage = _usage(content)

    def end(self, status: int) -> None:
        """Tell how it ended; the first time counts."""
        usage, answered = self._usage, status == 200
        self._trial.end(
            status,
            cache=self._cache,
            prompt_tokens=usage.get("prompt_tokens", usage.get("input_tokens")),
            completion_tokens=usage.get("completion_tokens", usage.get("output_tokens")),
            reasons=self._reasons,
            empty=self._empty if answered else None,
        )


def _usage(content: object) -> Mapping[str, Any]:
    found = content.get("usage") if isinstance(content, dict) else None
    return found if isinstance(found, dict) else {}
