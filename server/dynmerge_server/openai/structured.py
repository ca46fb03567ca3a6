"""response_format and structured_outputs as one `Grammar`. The engine compiles it and judges it."""

import json
from typing import Any

from dynmerge.engines.engine import Grammar
from dynmerge.errors import RequestError
from dynmerge_server.openai.requests import ResponseFormat, StructuredOutputs

# Where JSON allows any white space a model can go on with it for ever: at most one space is taken.
WHITESPACE = " ?"
# What an engine compiles in seconds at the worst.
MAX_GRAMMAR = 128 << 10  # characters, as the engine gets it
MAX_CHOICES = 10_000
ANY_OBJECT = {"type": "object"}


def grammar(
    response_format: ResponseFormat | None, structured: StructuredOutputs | None
) -> Grammar | None:
    """What the answer must match, None for anything.

    Raises RequestError on two constraints, and on one too large to be compiled.
    """
    from_format = None if response_format is None else _from_format(response_format)
    from_structured = None if structured is None else _from_structured(structured)
    if from_format is not None and from_structured is not None:
        raise RequestError(
            "response_format and structured_outputs both constrain the answer; give one of them",
            "structured_outputs",
        )
    param = "response_format" if from_structured is None else "structured_outputs"
    return _bounded(from_format or from_structured, param)


def _bounded(made: Grammar | None, param: str) -> Grammar | None:
    if made is not None and len(made.text) > MAX_GRAMMAR:
        raise RequestError(
            f"{param} takes a grammar of at most {MAX_GRAMMAR} characters, got {len(made.text)}",
            param,
        )
    return made


def _from_format(given: ResponseFormat) -> Grammar | None:
    if given.type == "text":
        return None
    if given.type == "json_object":
        return _json(ANY_OBJECT)
    if given.type == "structural_tag":
        raise RequestError("structural_tag is not offered", "response_format")
    schema = given.json_schema.json_schema if given.json_schema else None
    if schema is None:
        message = (
            "When response_format type is 'json_schema', the 'json_schema.schema' must be given."
        )
        raise RequestError(message, "response_format")
    return _json(schema)


def _from_structured(given: StructuredOutputs) -> Grammar:
    kinds = {
        "json": given.json_schema,
        "regex": given.regex,
        "choice": given.choice,
        "grammar": given.grammar,
        "json_object": given.json_object or None,
        "structural_tag": given.structural_tag,
    }
    named = [name for name, value in kinds.items() if value is not None]
    if len(named) != 1:
        raise RequestError(
            f"structured_outputs takes exactly one of {', '.join(kinds)}; "
            f"this has {' and '.join(named) or 'none'}",
            "structured_outputs",
        )
    if given.disable_additional_properties:
        raise RequestError(
            "disable_additional_properties is not offered; say additionalProperties in the schema",
            "structured_outputs",
        )
    return _of_kind(named[0], given)


def _of_kind(kind: str, given: StructuredOutputs) -> Grammar:
    if kind == "structural_tag":
        raise RequestError("structural_tag is not offered", "structured_outputs")
    if kind == "regex":
        return Grammar("regex", given.regex or "")
    if kind == "grammar":
        return Grammar("lark", given.grammar or "")
    if kind == "choice":
        return _choice(given.choice or [])
    schema = ANY_OBJECT if kind == "json_object" else _schema(given.json_schema)
    pattern = "" if given.disable_any_whitespace else given.whitespace_pattern
    return _json(schema, WHITESPACE if pattern is None else pattern)


def _schema(given: str | dict[str, Any] | None) -> dict[str, Any]:
    try:
        schema = json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError):
        raise RequestError("json is not a JSON schema", "structured_outputs") from None
    if not isinstance(schema, dict):
        raise RequestError("json is not a JSON schema: it is no object", "structured_outputs")
    return schema


def _json(schema: dict[str, Any], whitespace: str = WHITESPACE) -> Grammar:
    options = {"whitespace_pattern": whitespace} if whitespace else {"whitespace_flexible": False}
    return Grammar("json", json.dumps({"x-guidance": options, **schema}))


def _choice(choices: list[str]) -> Grammar:
    """One of the strings, exactly. A JSON string in ASCII is a Lark string too.

    As one terminal they are one automaton, not a rule of the parser each.
    """
    if len(choices) > MAX_CHOICES:
        raise RequestError(
            f"choice takes at most {MAX_CHOICES} strings, got {len(choices)}", "structured_outputs"
        )
    if not choices or "" in choices:
        raise RequestError("choice takes strings that are not empty", "structured_outputs")
    return Grammar("lark", "start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, choices)))
