"""Records: what the log keeps of an experiment, of a request in it, and of what came of that."""

from dataclasses import dataclass
from typing import Literal

# assigned: by the hash, or kept from before. flagged: by a team's own flags. forced: asked for by
# name, counted apart. holdout: kept out of all arms. pair: one of two answers to one prompt.
# outside: in no experiment, kept for the time before one.
Kind = Literal["assigned", "flagged", "forced", "holdout", "pair", "outside"]
DataType = Literal["NUMERIC", "BOOLEAN", "CATEGORICAL"]

OUTCOME_NAME = r"^[A-Za-z0-9_.:-]{1,64}$"
POSITIONS = ("first", "second")  # of two answers to one prompt
TIE = "tie"
VOTE, VOTES = "vote", (*POSITIONS, TIE)  # the outcome that is a vote on them, and its categories


@dataclass(frozen=True, slots=True)
class Revision:
    """An experiment as it is from `time` on. A `phase` begins where weights change.

    `declaration` is JSON; `source` says who made it: file, api or guardrail.
    """

    experiment: str
    number: int  # from 1
    phase: int  # from 0
    time: float  # seconds since 1970
    source: str
    declaration: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Exposure:
    """A request at the moment its arm was decided. `unit` is hashed with the log's own key."""

    id: str
    request_id: str
    time: float
    unit: str
    kind: Kind
    preference: str
    method: str
    merge_id: str
    experiment: str | None = None
    arm: str | None = None
    phase: int = 0
    pair: str | None = None  # what both answers of a comparison have in common
    position: int | None = None  # 0 for the first shown


@dataclass(frozen=True, slots=True)
class Finish:
    """How the request of an exposure ended. Times are seconds; None where it is not known.

    vLLM's whole replies do not show when their first token came: `ttft` is None there.
    """

    exposure: str
    status: int  # of HTTP; 499 for a client that left
    cache: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    ttft: float | None = None
    latency: float | None = None
    finish_reason: str | None = None
    empty: bool | None = None  # neither text nor a tool's call in any answer


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a request. A category has no value, anything else has; booleans are 0 and 1."""

    id: str
    request_id: str  # as the reply called it, or a comparison's
    time: float
    name: str
    data_type: DataType
    value: float | None = None
    category: str | None = None
    comment: str | None = None
