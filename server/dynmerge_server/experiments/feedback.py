"""Feedback: the body of `POST /v1/feedback`, checked, as an outcome for the log.

Knows no experiments; what a request was exposed to is the log's to know.
"""

import math
import time
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    field_validator,
    model_validator,
)
from starlette.responses import JSONResponse, Response

from dynmerge_server.experiments.log import Log
from dynmerge_server.experiments.records import OUTCOME_NAME, VOTE, VOTES, DataType, Outcome
from dynmerge_server.json_body import validate

MAX_CATEGORY = 256
PREFIXES = ("chatcmpl-", "cmpl-")  # of a reply's `id`, before what X-Request-Id has

STATUS = {"stored": 200, "again": 200, "queued": 202}

Text = Annotated[StrictStr, Field(min_length=1)]


class Feedback(BaseModel):
    """What somebody says about one reply, or about two that were compared."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    request_id: Annotated[Text, Field(max_length=256)]
    name: Annotated[StrictStr, Field(pattern=OUTCOME_NAME)]
    value: StrictBool | StrictInt | StrictFloat | Annotated[Text, Field(max_length=MAX_CATEGORY)]
    data_type: Literal["NUMERIC", "BOOLEAN", "CATEGORICAL"] | None = None  # by the value's type
    comment: Annotated[StrictStr, Field(max_length=4096)] | None = None
    id: Annotated[Text, Field(max_length=128)] | None = None  # sent again, it counts once

    @field_validator("value")
    @classmethod
    def _finite(cls, value: bool | int | float | str) -> bool | int | float | str:
        try:
            if isinstance(value, str) or math.isfinite(value):
                return value
        except OverflowError:
            pass
        raise ValueError("a number is finite")

    @model_validator(mode="after")
    def _voted(self) -> "Feedback":
        if self.name == VOTE and self.value not in VOTES:
            raise ValueError(f"a {VOTE} is {', '.join(VOTES[:-1])} or {VOTES[-1]}")
        return self

    @model_validator(mode="after")
    def _matched(self) -> "Feedback":
        if self.data_type not in (None, fits := _type_of(self.value)):
            raise ValueError(f"the value is {fits}, and data_type says {self.data_type}")
        return self


def outcome_of(feedback: Feedback, now: float) -> Outcome:
    """As the log keeps it, under a new id where the client gave none."""
    value = feedback.value
    return Outcome(
        id=feedback.id or uuid.uuid4().hex,
        request_id=bare(feedback.request_id),
        time=now,
        name=feedback.name,
        data_type=_type_of(value),
        value=None if isinstance(value, str) else float(value),
        category=value if isinstance(value, str) else None,
        comment=feedback.comment,
    )


def bare(request_id: str) -> str:
    """A request's id as X-Request-Id has it, from that or from the reply's `id`."""
    for prefix in PREFIXES:
        if request_id.startswith(prefix):
            return bare(request_id[len(prefix) :]) or request_id
    return request_id


async def answer(log: Log, body: Mapping[str, Any]) -> Response:
    """Log it. Raises SchemaError, UnknownRequest, OutcomeConflict or LogError."""
    outcome = outcome_of(validate(Feedback, body), time.time())
    status = await log.outcome(outcome)
    content = {"object": "feedback", "id": outcome.id, "status": status}
    return JSONResponse(content, STATUS[status])


def _type_of(value: bool | int | float | str) -> DataType:
    if isinstance(value, bool):
        return "BOOLEAN"
    return "CATEGORICAL" if isinstance(value, str) else "NUMERIC"
