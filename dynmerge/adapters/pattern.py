"""Pattern: a regular expression that came with an adapter, and so is matched against the clock."""

from dataclasses import dataclass
from typing import Protocol

import regex  # type: ignore[import-untyped]

from dynmerge.errors import AdapterError

# Python's own `re` cannot be stopped: 30 characters of nested repetition would hang the server.
SECONDS = 1.0


class Match(Protocol):
    """What a match gives: its groups."""

    def __getitem__(self, group: str) -> str | None: ...


class Matcher(Protocol):
    """A bound method of a compiled expression."""

    def __call__(self, string: str, *, timeout: float) -> Match | None:
        """Raises TimeoutError after `timeout` seconds."""


class Compiled(Protocol):
    """A compiled expression of the `regex` package, which comes without types."""

    match: Matcher
    fullmatch: Matcher


@dataclass(frozen=True, slots=True)
class Pattern:
    """A regular expression to match module names with, as Python's `re` would."""

    source: str
    compiled: Compiled

    @classmethod
    def of(cls, source: str) -> "Pattern":
        """Raises AdapterError if `source` is no regular expression."""
        try:
            return cls(source, regex.compile(source))
        except (regex.error, RecursionError, OverflowError) as exc:
            raise AdapterError(
                f"the pattern {shown(source)} is no regular expression: {exc}"
            ) from exc

    def match(self, name: str) -> Match | None:
        """The match at the start of `name`, or None; AdapterError if it takes over SECONDS."""
        return self._timed(self.compiled.match, name)

    def fullmatch(self, name: str) -> Match | None:
        """The match of all of `name`, or None; AdapterError if it takes over SECONDS."""
        return self._timed(self.compiled.fullmatch, name)

    def _timed(self, match: Matcher, name: str) -> Match | None:
        try:
            return match(name, timeout=SECONDS)
        except TimeoutError as exc:
            raise AdapterError(f"the pattern {shown(self.source)} takes too long to match") from exc


def shown(value: object) -> str:
    """`value` as a message may repeat it: on one line, and short."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
