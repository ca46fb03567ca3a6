"""Overheard: what vLLM's reply to one request says of itself, for the log of experiments."""

import json
import re
from collections.abc import Mapping
from typing import Any

from dynmerge_server.errors import INTERNAL
from dynmerge_server.experiments.trial import Trial

USAGE_ONLY = b'"choices":[],'  # of the chunk that counts tokens, in vLLM's events
_TEXT = re.compile(rb'"(?:content|text|delta)":("[^"\\]*(?:\\.[^"\\]*)*")')
_CALL = re.compile(rb'"(?:tool_calls|function_call)":\[?\{|"type":"(?:function_call|tool_use)"')
_REASON = re.compile(rb'"(?:finish_reason|stop_reason)":"([a-z_]+)"')
_USAGE = b'"usage":{'
_DATA = b"data: "
# How an event begins that ends a stream with an error: as OpenAI, Anthropic and Cohere have it.
_ERRORS = (
    b'data: {"error":',
    b"event: error\n",
    b'data: {"type": "message-end", "delta": {"error":',
)


class Overheard:
    """Reads a reply as it passes, and tells its trial how it ended."""

    def __init__(self, trial: Trial, cache: str) -> None:
        self._trial = trial
        self._cache = cache
        self._usage: Mapping[str, Any] = {}
        self._reasons: list[str] = []
        self._empty = True
        self._failed = False

    def event(self, event: bytes) -> None:
        """Take in one event of a stream."""
        if event.startswith(_ERRORS):
            self._failed = True
            return
        self._trial.first_token()
        self._empty = self._empty and _is_empty(event)
        self._reasons += [found.decode() for found in _REASON.findall(event)]
        if _USAGE in event and event.startswith(_DATA):
            self._usage = _usage(json.loads(event.removeprefix(_DATA)))

    def whole(self, content: object) -> None:
        """Take in a reply that is one JSON value. When its first token came, it does not say."""
        text = json.dumps(content, separators=(",", ":")).encode()
        self._empty = _is_empty(text)
        self._reasons += [found.decode() for found in _REASON.findall(text)]
        self._usage = _usage(content)

    def end(self, status: int) -> None:
        """Tell how it ended, with an error if an event said so; the first time counts."""
        status = INTERNAL.status if self._failed else status
        usage = self._usage
        self._trial.end(
            status,
            cache=self._cache,
            prompt_tokens=usage.get("prompt_tokens", usage.get("input_tokens")),
            completion_tokens=usage.get("completion_tokens", usage.get("output_tokens")),
            reasons=self._reasons,
            empty=self._empty if status == 200 else None,
        )


def _is_empty(text: bytes) -> bool:
    """Whether there is neither a tool's call in it nor text other than blanks."""
    says = any(json.loads(found).strip() for found in _TEXT.findall(text))
    return not says and _CALL.search(text) is None


def _usage(content: object) -> Mapping[str, Any]:
    found = content.get("usage") if isinstance(content, dict) else None
    return found if isinstance(found, dict) else {}
