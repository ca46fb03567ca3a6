"""Reading a request's JSON: strict where Python is lenient, and validated against a pydantic model.

Refuses what silently becomes another value: NaN, 1e999, a key that stands there twice, half a
surrogate pair; and nesting that would exhaust a stack.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import Request

from dynmerge_server.errors import SchemaError

JSON = "application/json"

Model = TypeVar("Model", bound=BaseModel)


async def read_object(request: Request) -> dict[str, Any]:
    """The JSON object a request carries. Raises SchemaError."""
    media = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media != JSON:
        raise SchemaError(f"Unsupported Media Type: Only '{JSON}' is allowed")
    value = parse(await request.body())
    if not isinstance(value, dict):
        raise SchemaError(f"The body is a JSON object, not {_kind(value)}", "body")
    return value


def parse(data: bytes) -> Any:
    """The value of a JSON text. Raises SchemaError on anything RFC 8259 would not have."""
    try:
        # The first reader is fast, bounds the nesting and knows UTF-8; the second sees repeated
        # keys.
        from_json(data, allow_inf_nan=False)
        return json.loads(data, object_pairs_hook=_once, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"The body is not valid JSON: {error}", "body") from None


def validate(model: type[Model], body: Mapping[str, Any]) -> Model:
    """`body` as a `model`. Raises SchemaError."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise SchemaError.of(error) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the key {name[:80]!r} stands there twice")
            seen.add(name)
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:40]} is too large")
    return number


def _kind(value: object) -> str:
    names = {type(None): "null", bool: "a boolean", str: "a string", list: "an array"}
    return names.get(type(value), "a number")
