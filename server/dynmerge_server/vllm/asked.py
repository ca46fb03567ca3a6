"""Asked: what a request's body says of its merge, taken out of it; the rest is vLLM's to read."""

import json
from dataclasses import dataclass, replace
from typing import Any

from dynmerge_server.errors import SchemaError
from dynmerge_server.json_body import parse, validate
from dynmerge_server.openai.requests import XARGS, MergeFields
from dynmerge_server.preferences import Wish

_EXTRA, _MODEL = "vllm_xargs", "model"
_OPTIONS, _USAGE = "stream_options", "include_usage"


@dataclass(frozen=True, slots=True)
class Asked:
    """A request's body as it came, and without what is ours; the wish in it; its model's name.

    `rest` is None for what is no JSON object: vLLM has an error for that.
    """

    data: bytes
    rest: dict[str, Any] | None
    wish: Wish
    model: str | None = None

    @classmethod
    def of(cls, data: bytes) -> "Asked":
        """Read a body. Raises SchemaError on what vLLM would read in another way than we."""
        rest = _object(data)
        if rest is None:
            return cls(data, None, Wish())
        fields = {name: rest.pop(name) for name in MergeFields.model_fields if name in rest}
        user = rest.get("user")
        known = user if isinstance(user, str) else None
        wish = validate(MergeFields, fields).asked(_taken(rest), known)
        model = rest.get(_MODEL)
        return cls(data, rest, wish, model if isinstance(model, str) else None)

    @property
    def streams(self) -> bool:
        """Whether the reply comes in pieces."""
        return self.rest is not None and self.rest.get("stream") is True

    def counting(self) -> "Asked | None":
        """The same stream with its tokens counted at its end; None where that is there, or cannot
        be asked for.
        """
        options = (self.rest or {}).get(_OPTIONS) or {}
        if not self.streams or not isinstance(options, dict) or options.get(_USAGE):
            return None
        return replace(self, rest={**(self.rest or {}), _OPTIONS: {**options, _USAGE: True}})

    def body(self, model: str) -> bytes:
        """What vLLM is to read: `model` in place of the client's name for it."""
        if self.rest is None:
            return self.data
        # A model that is no text is left for vLLM to refuse.
        named = isinstance(self.rest.get(_MODEL), str | None)
        return json.dumps({**self.rest, _MODEL: model} if named else self.rest).encode()


def _object(data: bytes) -> dict[str, Any] | None:
    try:
        value = parse(data)
    except SchemaError:
        # What Python reads and we do not could hold a wish that would be ignored.
        if _readable(data):
            raise
        return None
    return value if isinstance(value, dict) else None


def _readable(data: bytes) -> bool:
    try:
        return isinstance(json.loads(data), dict)
    except RecursionError:
        return True
    except ValueError:
        return False


def _taken(body: dict[str, Any]) -> dict[str, Any] | None:
    """Our extra arguments, taken out of vLLM's."""
    extra = body.get(_EXTRA)
    if not isinstance(extra, dict):
        return None
    ours = {name: extra[name] for name in XARGS if name in extra}
    others = {name: value for name, value in extra.items() if name not in ours}
    if ours and not others:
        del body[_EXTRA]
    elif ours:
        body[_EXTRA] = others
    return ours
