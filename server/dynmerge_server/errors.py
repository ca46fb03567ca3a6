"""Errors as HTTP replies: one table from exception to status, in the form OpenAI's clients read.

No message carries a path, an address or a traceback: what is not in the table is answered with one
fixed sentence, and logged.
"""

import logging
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from dynmerge.errors import (
    AdapterError,
    DynmergeError,
    EngineDead,
    LogError,
    OutcomeConflict,
    Overloaded,
    PromptTooLong,
    RequestError,
    Unavailable,
    UnknownExperiment,
    UnknownModel,
    UnknownRequest,
)

logger = logging.getLogger("dynmerge.server")

MAX_ERRORS = 10
MAX_ECHO = 200
MAX_MESSAGE = 4000
RETRY_AFTER = 1  # seconds


class SchemaError(Exception):
    """A body of the wrong shape: vLLM's `Bad Request`, distinct from a value out of range."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    @classmethod
    def of(cls, error: ValidationError) -> "SchemaError":
        """Pydantic's findings: at most MAX_ERRORS, each input cut to MAX_ECHO characters."""
        found = error.errors(include_url=False, include_context=False)
        lines = [_line(item) for item in found[:MAX_ERRORS]]
        if len(found) > MAX_ERRORS:
            lines.append(f"... and {len(found) - MAX_ERRORS} more")
        return cls("; ".join(lines), _location(found[0]["loc"]))


@dataclass(frozen=True, slots=True)
class Kind:
    """How one kind of error is answered."""

    status: int
    type: str
    retry: bool = False


KINDS: dict[type[Exception], Kind] = {
    SchemaError: Kind(400, "Bad Request"),
    UnknownModel: Kind(404, "NotFoundError"),
    UnknownExperiment: Kind(404, "NotFoundError"),
    UnknownRequest: Kind(404, "NotFoundError"),
    OutcomeConflict: Kind(409, "ConflictError"),
    RequestError: Kind(400, "BadRequestError"),
    AdapterError: Kind(400, "BadRequestError"),
    LogError: Kind(503, "ServiceUnavailableError", retry=True),
    Unavailable: Kind(501, "NotImplementedError"),
    Overloaded: Kind(503, "ServiceUnavailableError", retry=True),
    EngineDead: Kind(503, "ServiceUnavailableError", retry=True),
}
LEFT = 499  # nginx's status for a client that left
INTERNAL = Kind(500, "InternalServerError")
REASONS: dict[type[Exception], str] = {  # what OpenAI says in `code`, where vLLM has the status
    PromptTooLong: "context_length_exceeded",
    UnknownModel: "model_not_found",
}

STATUS_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    431: "RequestTooLargeError",
}


def kind_of(error: Exception) -> Kind:
    """The nearest row of KINDS for `error`, INTERNAL where there is none."""
    return next((KINDS[base] for base in type(error).__mro__ if base in KINDS), INTERNAL)


def status_of(error: BaseException) -> int:
    """The status of what ended a request, LEFT where its client did."""
    if isinstance(error, ClientDisconnect) or not isinstance(error, Exception):
        return LEFT
    return kind_of(error).status


def describe(error: Exception) -> dict[str, Any]:
    """The `{"error": {...}}` of `error`, whatever it is."""
    kind = kind_of(error)
    if kind is INTERNAL:
        return body(kind.status, "The server failed on this request.", kind.type)
    extra = {"reason": REASONS[type(error)]} if type(error) in REASONS else {}
    param = getattr(error, "param", None)
    return body(kind.status, str(error), kind.type, param, **extra)


def body(
    status: int, message: str, kind: str, param: str | None = None, **extra: str
) -> dict[str, Any]:
    """OpenAI's error object. A message repeats what was sent, which may be long."""
    if len(message) > MAX_MESSAGE:
        message = message[:MAX_MESSAGE] + "..."
    return {"error": {"message": message, "type": kind, "param": param, "code": status, **extra}}


def reply(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error that has no exception of its own: a path, a method, a limit."""
    kind = STATUS_TYPES.get(status, "InternalServerError" if status >= 500 else "BadRequestError")
    return JSONResponse(body(status, message, kind), status, headers)


def note(error: Exception) -> None:
    """Log what the table does not know; a request's text is not in it."""
    if kind_of(error) is INTERNAL:
        logger.error("a request failed", exc_info=error)


def answer(error: Exception) -> Response:
    """The reply to an exception of the table."""
    note(error)
    kind = kind_of(error)
    headers = {"Retry-After": str(RETRY_AFTER)} if kind.retry else None
    return JSONResponse(describe(error), kind.status, headers)


async def on_error(_request: Request, error: Exception) -> Response:
    """Answer an exception of the table."""
    return answer(error)


async def on_crash(_request: Request, error: Exception) -> Response:
    """Answer anything else: Starlette's outermost handler, which then re-raises for the log."""
    return JSONResponse(describe(error), INTERNAL.status)


async def on_http(_request: Request, error: Exception) -> Response:
    """Answer an unknown path or method."""
    assert isinstance(error, HTTPException)
    return reply(error.status_code, error.detail, dict(error.headers or {}))


async def on_disconnect(_request: Request, _error: Exception) -> Response:
    """Nobody reads this."""
    return Response(status_code=LEFT)


HANDLERS = {
    ClientDisconnect: on_disconnect,
    HTTPException: on_http,
    SchemaError: on_error,
    DynmergeError: on_error,
    Exception: on_crash,
}


def _line(item: ErrorDetails) -> str:
    given = item["input"]
    echo = (reprlib.repr if isinstance(given, (list, dict)) else repr)(given)[:MAX_ECHO]
    return f"{_location(item['loc'])}: {item['msg']} ({item['type']}), got {echo}"


def _location(loc: Sequence[int | str]) -> str:
    return ".".join(["body", *(str(part) for part in loc)])
